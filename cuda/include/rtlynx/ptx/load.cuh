// ld: PTX ISA, "Data Movement and Conversion Instructions: ld.global.nc".
#pragma once

#include <cstdint>

namespace rtlynx::ptx {

// 4 bytes of memory that nobody writes meanwhile, or 0 without touching it. A predicate instead of a branch lets many loads be in flight.
__device__ __forceinline__ uint32_t load_or_zero(const void* global, bool valid) {
  uint32_t value;
  asm("{.reg .pred valid;\n"
      "setp.ne.b32 valid, %2, 0;\n"
      "mov.b32 %0, 0;\n"
      "@valid ld.global.nc.b32 %0, [%1];}"
      : "=r"(value)
      : "l"(global), "r"(static_cast<int>(valid)));
  return value;
}

}  // namespace rtlynx::ptx
