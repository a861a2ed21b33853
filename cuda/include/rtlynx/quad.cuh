// Exchanges within a quad, the 4 neighbouring lanes that share the rows of a tensor-core fragment.
#pragma once

#include <cstdint>

namespace rtlynx {

// v[j] of lane i becomes v[i] of lane j: a 4 x 4 transpose of registers across the quad.
//
//   lane:   0  1  2  3              0  1  2  3
//   v[0]    a0 b0 c0 d0             a0 a1 a2 a3
//   v[1]    a1 b1 c1 d1   becomes   b0 b1 b2 b3
//   v[2]    a2 b2 c2 d2             c0 c1 c2 c3
//   v[3]    a3 b3 c3 d3             d0 d1 d2 d3
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4], int lane) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    const bool high = lane & distance;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t& low_half = v[distance == 1 ? 2 * i : i];  // what stays in a low lane
      uint32_t& high_half = v[distance == 1 ? 2 * i + 1 : i + 2];
      const uint32_t received = __shfl_xor_sync(0xffffffffu, high ? low_half : high_half, distance);
      low_half = high ? received : low_half;
      high_half = high ? high_half : received;
    }
  }
}

}  // namespace rtlynx
