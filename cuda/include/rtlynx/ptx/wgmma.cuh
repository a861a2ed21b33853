// wgmma: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (sm_90a).
#pragma once

#include <cstdint>

#include "rtlynx/element.cuh"
#include "rtlynx/ptx/accumulators.cuh"

namespace rtlynx::ptx {

// Orders the warpgroup's register and shared-memory accesses before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the warpgroup's newest groups are in flight.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving uses of accumulators across this point: to it a wgmma has written them when it was issued.
template <int Count>
__device__ __forceinline__ void pin_registers(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The swizzle of an operand in shared memory, K-major, as the descriptor's top two bits name it.
enum class Swizzle : uint64_t { k128Bytes = 1, k64Bytes = 2 };

// Matrix descriptor of a K-major tile: rows of 128 or 64 bytes, 8 of them to an atom, atoms back to back.
//
//   bits 0-13  address / 16    16-29  unused here, 1    32-45  bytes from atom to atom / 16    62-63  swizzle
template <Swizzle kSwizzle>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared) {
  constexpr uint64_t kAtomBytes = 8 * (kSwizzle == Swizzle::k128Bytes ? 128 : 64);
  return (shared & 0x3ffff) >> 4 | uint64_t{1} << 16 | kAtomBytes >> 4 << 32 | static_cast<uint64_t>(kSwizzle) << 62;
}

// A descriptor moved by `bytes` along K inside its swizzled rows.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// One function for each element type, which the assembler text names. Undefined below.
#define RTLYNX_WGMMA_192(T, type)                                                                                                      \
  template <int Selector>                                                                                                              \
  __device__ __forceinline__ void wgmma_sp_m64n192k32(T, float (&d)[96], uint64_t a, uint64_t b, uint32_t metadata, bool accumulate) { \
    asm volatile(                                                                                                                      \
        "{.reg .pred add; setp.ne.b32 add, %100, 0;\n"                                                                                 \
        "wgmma.mma_async.sp.sync.aligned.m64n192k32.f32." type "." type " {" RTLYNX_REGISTERS_96                                       \
        "}, "                                                                                                                          \
        "%96, %97, %98, %99, add, 1, 1, 0, 0;}"                                                                                        \
        : RTLYNX_ACCUMULATE_96(d, 0)                                                                                                   \
        : "l"(a), "l"(b), "r"(metadata), "n"(Selector), "r"(static_cast<int>(accumulate)));                                            \
  }                                                                                                                                    \
  __device__ __forceinline__ void wgmma_m64n192k16(T, float (&d)[96], uint64_t a, uint64_t b) {                                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type " {" RTLYNX_REGISTERS_96                                 \
                 "}, "                                                                                                                 \
                 "%96, %97, 1, 1, 1, 0, 0;"                                                                                            \
                 : RTLYNX_ACCUMULATE_96(d, 0)                                                                                          \
                 : "l"(a), "l"(b));                                                                                                    \
  }

// wgmma_sp_m64n192k32: d (64 x 192) = or += A (64 x 32, 2:4 compressed, shared memory) · B^T (192 x 32, shared memory). Selector 0 takes the
// metadata of lanes 0 and 1 of every quad, selector 1 that of lanes 2 and 3.
// wgmma_m64n192k16: d (64 x 192) += A (64 x 16, dense, shared memory) · B^T (192 x 16, shared memory).
RTLYNX_WGMMA_192(Bf16, "bf16")
RTLYNX_WGMMA_192(F16, "f16")
#undef RTLYNX_WGMMA_192

}  // namespace rtlynx::ptx
