// cp.async.bulk.tensor: PTX ISA, "Data Movement and Conversion Instructions: Tensor copy" (sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace rtlynx::ptx {

// Copies the box at (column, row) of a 2-d tensor to shared memory; what lies outside the tensor arrives as zeros and counts as bytes too.
__device__ __forceinline__ void tma_load_2d(uint32_t shared, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
               "l"(&map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

// The same for a 5-d tensor, at (x, 0, 0, 0, z).
__device__ __forceinline__ void tma_load_5d(uint32_t shared, const CUtensorMap& map, int x, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, 0, 0, 0, %3}], [%4];" ::"r"(shared),
      "l"(&map), "r"(x), "r"(z), "r"(barrier)
      : "memory");
}

}  // namespace rtlynx::ptx
