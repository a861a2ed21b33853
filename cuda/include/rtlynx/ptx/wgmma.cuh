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

// The swizzle of an operand's rows in shared memory, as the descriptor's top two bits name it.
enum class Swizzle : uint64_t { k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

// Matrix descriptor of a tile whose rows are as long as the swizzle says, 8 of them to an atom, atoms back to back. A row is a row of the matrix
// with K along it (then the tile may be wider than a row: see `advanced`), or one k with all of N along it.
//
//   bits 0-13  address / 16    16-29  unused here, 1    32-45  bytes from atom to atom / 16    62-63  swizzle
template <Swizzle kSwizzle>
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t shared) {
  constexpr uint64_t kRowBytes = kSwizzle == Swizzle::k128Bytes ? 128 : kSwizzle == Swizzle::k64Bytes ? 64 : 32;
  return (shared & 0x3ffff) >> 4 | uint64_t{1} << 16 | 8 * kRowBytes >> 4 << 32 | static_cast<uint64_t>(kSwizzle) << 62;
}

// A descriptor moved by `bytes`: along K inside its swizzled rows, or by whole atoms.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

// One function for each element type and N = 2 · count, which the assembler text names; x0 .. x4 name the operands after the accumulators.
// Undefined below.
#define RTLYNX_WGMMA_SS(T, type, n, count, x0, x1, x2, x3, x4)                                                                   \
  template <int Selector>                                                                                                        \
  __device__ __forceinline__ void wgmma_sp_k32(T, float (&d)[count], uint64_t a, uint64_t b, uint32_t metadata, bool add) {      \
    asm volatile("{.reg .pred add; setp.ne.b32 add, " x4                                                                         \
                 ", 0;\n"                                                                                                        \
                 "wgmma.mma_async.sp.sync.aligned.m64n" n "k32.f32." type "." type " {" RTLYNX_REGISTERS_##count                 \
                 "}, " x0 ", " x1 ", " x2 ", " x3 ", add, 1, 1, 0, 0;}"                                                          \
                 : RTLYNX_ACCUMULATE_##count(d, 0)                                                                               \
                 : "l"(a), "l"(b), "r"(metadata), "n"(Selector), "r"(static_cast<int>(add)));                                    \
  }                                                                                                                              \
  __device__ __forceinline__ void wgmma_k16(T, float (&d)[count], uint64_t a, uint64_t b) {                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" RTLYNX_REGISTERS_##count "}, " x0 ", " x1   \
                                                                                                              ", 1, 1, 1, 0, 0;" \
                 : RTLYNX_ACCUMULATE_##count(d, 0)                                                                               \
                 : "l"(a), "l"(b));                                                                                              \
  }
#define RTLYNX_WGMMA_SS_WIDTHS(T, type)                                  \
  RTLYNX_WGMMA_SS(T, type, "128", 64, "%64", "%65", "%66", "%67", "%68") \
  RTLYNX_WGMMA_SS(T, type, "160", 80, "%80", "%81", "%82", "%83", "%84") \
  RTLYNX_WGMMA_SS(T, type, "192", 96, "%96", "%97", "%98", "%99", "%100")

// wgmma_sp_k32: d (64 x N) = or += A (64 x 32, 2:4 compressed, shared memory) · B^T (N x 32, shared memory). Selector 0 takes the metadata of
// lanes 0 and 1 of every quad, selector 1 that of lanes 2 and 3.
// wgmma_k16: d (64 x N) += A (64 x 16, dense, shared memory) · B^T (N x 16, shared memory).
RTLYNX_WGMMA_SS_WIDTHS(Bf16, "bf16")
RTLYNX_WGMMA_SS_WIDTHS(F16, "f16")
#undef RTLYNX_WGMMA_SS_WIDTHS
#undef RTLYNX_WGMMA_SS

// One function for each N = 2 · count, as above. Undefined below.
#define RTLYNX_WGMMA_SP_E4M3(n, count, x0, x1, x2, x3)                                                                            \
  __device__ __forceinline__ void wgmma_sp_k64(E4m3, float (&d)[count], uint64_t a, uint64_t b, uint32_t metadata, bool add) {    \
    asm volatile("{.reg .pred add; setp.ne.b32 add, " x3                                                                          \
                 ", 0;\n"                                                                                                         \
                 "wgmma.mma_async.sp.sync.aligned.m64n" n "k64.f32.e4m3.e4m3 {" RTLYNX_REGISTERS_##count "}, " x0 ", " x1 ", " x2 \
                                                                                                         ", 0, add, 1, 1;}"       \
                 : RTLYNX_ACCUMULATE_##count(d, 0)                                                                                \
                 : "l"(a), "l"(b), "r"(metadata), "r"(static_cast<int>(add)));                                                    \
  }

// d (64 x N) = or += A (64 x 64, 2:4 compressed, shared memory) · B^T (N x 64, shared memory), in e4m3. The metadata of all lanes is taken, so
// there is no selector; the tensor cores sum with fewer bits than float32 has.
RTLYNX_WGMMA_SP_E4M3("128", 64, "%64", "%65", "%66", "%67")
RTLYNX_WGMMA_SP_E4M3("160", 80, "%80", "%81", "%82", "%83")
RTLYNX_WGMMA_SP_E4M3("192", 96, "%96", "%97", "%98", "%99")
#undef RTLYNX_WGMMA_SP_E4M3

}  // namespace rtlynx::ptx
