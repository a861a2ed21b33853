// cp.async: PTX ISA, "Data Movement and Conversion Instructions: cp.async" (sm_80+).
#pragma once

#include <cstdint>

namespace rtlynx::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Copies 16 bytes to shared memory past L1; with valid == false it reads nothing and writes zeros.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0) : "memory");
}

// The same, or nothing at all.
__device__ __forceinline__ void cp_async_16_if(uint32_t shared, const void* global, bool wanted) {
  asm volatile(
      "{.reg .pred wanted; setp.ne.b32 wanted, %2, 0;\n"
      "@wanted cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(shared),
      "l"(global), "r"(static_cast<int>(wanted))
      : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's newest groups are in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Makes this thread's writes to shared memory visible to what reads it asynchronously, such as wgmma (sm_90).
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace rtlynx::ptx
