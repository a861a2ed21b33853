// A norm before the selection, on registers of two elements: X = (h - mean) · rstd · weight + bias in float32, rounded once to T. Every operation is
// rounded by itself, as reference.py's are, so that the result is the same to the bit.
//
// mean and rstd are a row's, weight and bias a column's and a sample's: `norm_rows` neighbouring rows share one row of them.
//
//                  k columns
//               +-------------+
//   norm_rows   |   sample 0  |     weight[0], bias[0]
//               +-------------+
//   norm_rows   |   sample 1  |     weight[1], bias[1]
//               +-------------+
#pragma once

#include "rtlynx/lane_tile.cuh"

namespace rtlynx {

// What the norm of a row depends on. A block keeps those of its rows in shared memory: beside the accumulators of a branch there are no registers left
// for them.
struct __align__(16) RowNorm {
  float mean, rstd;
  int64_t modulation;  // where the row's weight and bias begin

  RowNorm() = default;
  template <class Params>
  __device__ __forceinline__ RowNorm(const Params& p, int row) {
    const float2 stats = __ldg(reinterpret_cast<const float2*>(p.norm_stats) + row);
    mean = stats.x, rstd = stats.y;
    modulation = static_cast<int64_t>(row / p.norm_rows) * p.k;
  }
};

// 8 neighbouring elements of a row of `vectors`, or this in every register where there are none.
__device__ __forceinline__ uint4 load_columns(const void* vectors, int64_t offset, uint32_t otherwise) {
  if (!vectors) return {otherwise, otherwise, otherwise, otherwise};
  return __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(vectors) + offset));
}

__device__ __forceinline__ float normed(const RowNorm& by, float h, float weight, float bias) {
  return __fadd_rn(__fmul_rn(__fmul_rn(__fsub_rn(h, by.mean), by.rstd), weight), bias);
}

template <class T>
__device__ __forceinline__ uint32_t normed(const RowNorm& by, uint32_t h_pair, uint32_t weight_pair, uint32_t bias_pair) {
  const float2 h = T::unpack(h_pair), weight = T::unpack(weight_pair), bias = T::unpack(bias_pair);
  return T::pack(normed(by, h.x, weight.x, bias.x), normed(by, h.y, weight.y, bias.y));
}

// The norm of a lane's tile: `norms` are those of its rows `row` and row + 8. Rows past the end stay zero: the metadata describes them as padding.
template <class T, class Params>
__device__ __forceinline__ void normalize(const Params& p, const RowNorm* norms, int row, int col, LaneTile& tile) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const RowNorm by = norms[8 * half];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      __syncwarp();  // bounds how many loads the compiler hoists, and so the registers they take
      if (row + 8 * half >= p.m) continue;
      const uint4 weight = load_columns(p.norm_weight, by.modulation + col + 8 * i, T::pack(1.0f, 1.0f));
      const uint4 bias = load_columns(p.norm_bias, by.modulation + col + 8 * i, T::pack(-0.0f, -0.0f));  // adding it keeps a zero's sign
      uint32_t* pairs = tile.pairs[half] + 4 * i;
      pairs[0] = normed<T>(by, pairs[0], weight.x, bias.x);
      pairs[1] = normed<T>(by, pairs[1], weight.y, bias.y);
      pairs[2] = normed<T>(by, pairs[2], weight.z, bias.z);
      pairs[3] = normed<T>(by, pairs[3], weight.w, bias.w);
    }
  }
}

}  // namespace rtlynx
