// wgmma with A from registers: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions" (sm_90a).
#pragma once

#include <cstdint>

#include "rtlynx/element.cuh"
#include "rtlynx/ptx/accumulators.cuh"

namespace rtlynx::ptx {

// One function for each element type and N = 2 · count, which the assembler text names. Undefined below.
#define RTLYNX_WGMMA_RS(name, transposed, T, type, n, count, a0, a1, a2, a3, desc)                            \
  __device__ __forceinline__ void name(T, float (&d)[count], const uint32_t (&a)[4], uint64_t b) {            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" RTLYNX_REGISTERS_##count \
                 "}, "                                                                                        \
                 "{" a0 ", " a1 ", " a2 ", " a3 "}, " desc ", 1, 1, 1, " transposed ";"                       \
                 : RTLYNX_ACCUMULATE_##count(d, 0)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                       \
  }
#define RTLYNX_WGMMA_RS_ALL(T, type)                                                            \
  RTLYNX_WGMMA_RS(wgmma_rs_k16_rows, "1", T, type, "16", 8, "%8", "%9", "%10", "%11", "%12")    \
  RTLYNX_WGMMA_RS(wgmma_rs_k16_rows, "1", T, type, "32", 16, "%16", "%17", "%18", "%19", "%20") \
  RTLYNX_WGMMA_RS(wgmma_rs_k16_rows, "1", T, type, "64", 32, "%32", "%33", "%34", "%35", "%36") \
  RTLYNX_WGMMA_RS(wgmma_rs_k16, "0", T, type, "192", 96, "%96", "%97", "%98", "%99", "%100")

// wgmma_rs_k16: d (64 x N) += A (64 x 16, registers: warp w holds rows 16w .. 16w + 15 as in mma m16n8k16) · B^T (N x 16, shared memory).
// wgmma_rs_k16_rows: the same with B (16 x N, shared memory: 16 rows of N).
RTLYNX_WGMMA_RS_ALL(Bf16, "bf16")
RTLYNX_WGMMA_RS_ALL(F16, "f16")
#undef RTLYNX_WGMMA_RS_ALL
#undef RTLYNX_WGMMA_RS

// One function for each element type, which the assembler text names. Undefined below.
#define RTLYNX_WGMMA_SP_RS_192(T, type)                                                                                       \
  template <int Selector>                                                                                                     \
  __device__ __forceinline__ void wgmma_sp_rs_k32(T, float (&d)[96], const uint32_t (&a)[4], uint64_t b, uint32_t metadata) { \
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n192k32.f32." type "." type " {" RTLYNX_REGISTERS_96                     \
                 "}, "                                                                                                        \
                 "{%96, %97, %98, %99}, %100, %101, %102, 1, 1, 1, 0;"                                                        \
                 : RTLYNX_ACCUMULATE_96(d, 0)                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(Selector));                         \
  }

// d (64 x 192) += A (64 x 32, 2:4 compressed, registers: as above on the 16 kept columns) · B^T (192 x 32, shared memory). Selector 0 takes
// the metadata of lanes 0 and 1 of every quad, selector 1 that of lanes 2 and 3.
RTLYNX_WGMMA_SP_RS_192(Bf16, "bf16")
RTLYNX_WGMMA_SP_RS_192(F16, "f16")
#undef RTLYNX_WGMMA_SP_RS_192

}  // namespace rtlynx::ptx
