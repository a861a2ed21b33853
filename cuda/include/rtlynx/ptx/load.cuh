// ld, prefetch: PTX ISA, "Data Movement and Conversion Instructions: ld", "ld.global.nc", "prefetch".
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

// 16 bytes, aligned to as many, in the same way.
__device__ __forceinline__ void load_or_zero(const void* global, bool valid, uint32_t (&words)[4]) {
  asm("{.reg .pred valid;\n"
      "setp.ne.b32 valid, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@valid ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
      : "l"(global), "r"(static_cast<int>(valid)));
}

// Two elements of 2 bytes that stand apart in shared memory, the first in the low half.
__device__ __forceinline__ uint32_t load_shared_pair(uint32_t low, uint32_t high) {
  uint32_t pair;
  asm volatile(
      "{.reg .b16 low, high;\n"
      "ld.shared.b16 low, [%1];\n"
      "ld.shared.b16 high, [%2];\n"
      "mov.b32 %0, {low, high};}"
      : "=r"(pair)
      : "r"(low), "r"(high)
      : "memory");
  return pair;
}

// One or two neighbouring words of memory that nobody writes meanwhile; two must be aligned to 8 bytes.
__device__ __forceinline__ void load_words(const uint32_t* global, uint32_t (&words)[1]) { words[0] = __ldg(global); }
__device__ __forceinline__ void load_words(const uint32_t* global, uint32_t (&words)[2]) {
  const uint2 pair = __ldg(reinterpret_cast<const uint2*>(global));
  words[0] = pair.x, words[1] = pair.y;
}

// Brings the line around an address into L2.
__device__ __forceinline__ void prefetch_l2(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

}  // namespace rtlynx::ptx
