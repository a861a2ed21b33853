// A libcuda that pretends: it answers what the FAKE_* environment variables say and prints the calls that matter. It lets the refusals and the
// launch sequence of rtlynx._core be tested on a machine without a GPU.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}
static int said(const char* call) {
  printf("%s\n", call);
  fflush(stdout);
  return 0;
}

static void* current;

int cuInit(unsigned flags) { return setting("FAKE_INIT", 0); }
int cuDriverGetVersion(int* version) { return *version = setting("FAKE_VERSION", 13000), 0; }
int cuDeviceGetCount(int* count) { return *count = 2, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char* name, int length, int device) { return strncpy(name, "Fake GPU", length), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = 1 << 30, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16: return *value = 132, 0;  // multiprocessors
    case 36: return *value = 2619000, 0;  // kHz of the memory
    case 37: return *value = 5120, 0;  // bits of its bus
    case 75: return *value = setting("FAKE_CAPABILITY", 90) / 10, 0;
    case 76: return *value = setting("FAKE_CAPABILITY", 90) % 10, 0;
    case 97: return *value = 227 * 1024, 0;  // shared memory a block may opt in to
    default: return 1;
  }
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)(intptr_t)(device + 1), said("retain"); }
int cuCtxGetCurrent(void** context) { return *context = current, 0; }
int cuCtxPushCurrent_v2(void* context) { return current = context, said("push"); }
int cuCtxPopCurrent_v2(void** context) { return *context = current, current = NULL, said("pop"); }
int cuThreadExchangeStreamCaptureMode(int* mode) {
  static int held = 0;
  const int before = held;
  held = *mode, *mode = before;
  return said(held == 2 ? "capture relaxed" : "capture restored");
}
int cuModuleLoadData(void** module, const void* image) { return *module = (void*)1, said("load"), setting("FAKE_LOAD", 0); }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = (void*)2, said(name); }
int cuFuncSetAttribute(void* function, int attribute, int value) { return attribute == 8 ? 0 : 1; }
int cuTensorMapEncodeTiled(uint64_t* map, int type, unsigned rank, void* address, const uint64_t* size, const uint64_t* strides,
                           const unsigned* box, const unsigned* element_strides, int interleave, int swizzle, int promotion, int fill) {
  memset(map, 0xff, 128);
  map[0] = (uint64_t)address;
  printf("map %#lx: type %d, rank %u, %lux%lu, stride %lu, box %ux%u of strides %u %u, interleave %d, swizzle %d, promotion %d, fill %d\n",
         (unsigned long)address, type, rank, (unsigned long)size[0], (unsigned long)size[1], (unsigned long)strides[0], box[0], box[1],
         element_strides[0], element_strides[1], interleave, swizzle, promotion, fill);
  fflush(stdout);
  return setting("FAKE_ENCODE", 0);
}
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  struct { int id; char pad[4]; unsigned value[16]; }* attributes;
  unsigned count;
};
int cuLaunchKernelEx(const struct LaunchConfig* config, void* function, void** params, void** extra) {
  if (!getenv("FAKE_SILENT")) {
    const unsigned *grid = config->grid, *block = config->block;
    const uint64_t* first = params[0];
    printf("launch %ux%ux%u of %ux%ux%u, %u bytes, stream %#lx, first pointer %#lx", grid[0], grid[1], grid[2], block[0], block[1], block[2],
           config->shared, (unsigned long)config->stream, (unsigned long)first[0]);
    for (unsigned i = 0; i < config->count; ++i) {
      const unsigned* value = config->attributes[i].value;
      printf(", attribute %d: %ux%ux%u", config->attributes[i].id, value[0], value[1], value[2]);
    }
    printf("\n");
    fflush(stdout);
  }
  return setting("FAKE_LAUNCH", 0);
}
