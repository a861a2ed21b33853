// wgmma with A from registers: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (sm_90a).
#pragma once

#include <cstdint>

#include "rtlynx/element.cuh"
#include "rtlynx/ptx/accumulators.cuh"

namespace rtlynx::ptx {

// One function for each element type and N = 2 · count, which the assembler text names. Undefined below.
#define RTLYNX_WGMMA_RS(T, type, n, count, a0, a1, a2, a3, desc)                                              \
  __device__ __forceinline__ void wgmma_rs_k16(T, float (&d)[count], const uint32_t (&a)[4], uint64_t b) {    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" RTLYNX_REGISTERS_##count \
                 "}, "                                                                                        \
                 "{" a0 ", " a1 ", " a2 ", " a3 "}, " desc ", 1, 1, 1, 0;"                                    \
                 : RTLYNX_ACCUMULATE_##count(d, 0)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                       \
  }
#define RTLYNX_WGMMA_RS_WIDTHS(T, type)                                 \
  RTLYNX_WGMMA_RS(T, type, "16", 8, "%8", "%9", "%10", "%11", "%12")    \
  RTLYNX_WGMMA_RS(T, type, "32", 16, "%16", "%17", "%18", "%19", "%20") \
  RTLYNX_WGMMA_RS(T, type, "64", 32, "%32", "%33", "%34", "%35", "%36")

// d (64 x N) += A (64 x 16, registers: warp w holds rows 16w .. 16w + 15 as in mma m16n8k16) · B^T (N x 16, shared memory).
RTLYNX_WGMMA_RS_WIDTHS(Bf16, "bf16")
RTLYNX_WGMMA_RS_WIDTHS(F16, "f16")
#undef RTLYNX_WGMMA_RS_WIDTHS
#undef RTLYNX_WGMMA_RS

}  // namespace rtlynx::ptx
