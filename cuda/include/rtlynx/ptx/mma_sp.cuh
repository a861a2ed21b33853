// mma.sp::ordered_metadata: PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction with sparse matrix A", m16n8k32 with
// float32 accumulators (sm_80+, PTX 8.5). "Ordered" promises ascending positions in every group, which newer chips need to be fast.
#pragma once

#include <cstdint>

#include "rtlynx/element.cuh"

namespace rtlynx::ptx {

// Selector 0 takes the metadata of lanes 0 and 1 of every quad, selector 1 that of lanes 2 and 3.
template <int Selector>
__device__ __forceinline__ void mma_sp_m16n8k32(Bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(Selector));
}

template <int Selector>
__device__ __forceinline__ void mma_sp_m16n8k32(F16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(Selector));
}

}  // namespace rtlynx::ptx
