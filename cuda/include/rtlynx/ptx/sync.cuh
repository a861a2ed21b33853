// ld.acquire, red.release: PTX ISA, "Data Movement and Conversion Instructions: ld", "Parallel Synchronization and Communication
// Instructions: red" and "Memory Consistency Model" (sm_70+).
#pragma once

#include <cstdint>

namespace rtlynx::ptx {

// Sees everything that happened before the adds whose sum it reads.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* global) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}

// Adds, and lets whoever reads the sum with load_acquire see everything that happened before.
__device__ __forceinline__ void add_release(uint32_t* global, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

}  // namespace rtlynx::ptx
