// sparsify: one read of X gives the compressed values, the metadata, the row scale and the input of the rank-r branch.
//
// A block owns 16 rows (one m16 tile of the metadata); its 8 warps take 64-column units in turn. Inside a unit, lane (g = lane / 4,
// q = lane % 4) owns 16 columns of two rows, which is just what its metadata word describes, so no lane talks to another:
//
//                      64 columns
//            +--------+--------+--------+--------+
//   row g    |  q = 0 |  q = 1 |  q = 2 |  q = 3 |     32 bytes of X in, 16 bytes of values out, half a word of metadata
//   row g+8  |  q = 0 |  q = 1 |  q = 2 |  q = 3 |
//            +--------+--------+--------+--------+
//
// The branch is a dense m16n8k16 product. The order of k inside a product is free as long as both operands agree, so the lane's own
// group c (4 columns) serves as its part of k-step c, and comp_down is read in the same order: again no exchange, no shared memory.
// Sums across warps go through shared memory in a fixed order: the result does not depend on scheduling.

#include "rtlynx/element.cuh"
#include "rtlynx/format.cuh"
#include "rtlynx/params.cuh"
#include "rtlynx/ptx/mma.cuh"
#include "rtlynx/select24.cuh"

namespace rtlynx {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kLaneCols = 16;                    // columns a lane owns in a unit, of each of its two rows
constexpr int kLanePairs = kLaneCols / 2;        // registers they fill
constexpr int kLaneGroups = kLaneCols / kGroup;  // groups they form

// The lane's 2 x 16 elements of a unit.
struct LaneTile {
  uint32_t pairs[2][kLanePairs];
};

__device__ __forceinline__ LaneTile load_tile(const SparsifyParams& p, int row, int col) {
  LaneTile tile = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half < p.m && col < p.k) {
      const auto* source = static_cast<const uint16_t*>(p.x) + (row + 8 * half) * p.ldx + col;
      const uint4 low = __ldg(reinterpret_cast<const uint4*>(source));
      const uint4 high = __ldg(reinterpret_cast<const uint4*>(source) + 1);
      uint32_t(&r)[kLanePairs] = tile.pairs[half];
      r[0] = low.x, r[1] = low.y, r[2] = low.z, r[3] = low.w;
      r[4] = high.x, r[5] = high.y, r[6] = high.z, r[7] = high.w;
    }
  }
  return tile;
}

// Rows past the end stay zero: the metadata describes them as padding.
template <class T>
__device__ __forceinline__ void subtract_shift(const SparsifyParams& p, int row, int col, LaneTile& tile) {
#pragma unroll
  for (int i = 0; i < kLanePairs; ++i) {
    const float2 shift = __ldg(reinterpret_cast<const float2*>(p.shift + col) + i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= p.m) continue;
      const float2 x = T::unpack(tile.pairs[half][i]);
      tile.pairs[half][i] = T::pack(x.x - shift.x, x.y - shift.y);
    }
  }
}

template <class T>
__device__ __forceinline__ Selection select_scored(uint32_t x01, uint32_t x23, float4 score) {
  constexpr uint32_t kMagnitude = 0x7fffffffu;
  const float2 low = T::unpack(x01), high = T::unpack(x23);
  return select24(x01, x23, __float_as_uint(low.x * score.x) & kMagnitude, __float_as_uint(low.y * score.y) & kMagnitude,
                  __float_as_uint(high.x * score.z) & kMagnitude, __float_as_uint(high.y * score.w) & kMagnitude);
}

template <class T>
__device__ __forceinline__ float square(uint32_t pair) {
  const float2 x = T::unpack(pair);
  return x.x * x.x + x.y * x.y;
}

__device__ __forceinline__ float sum_over_quad(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// d[tile] += a · comp_down^T over the lane's unit, tile = 8 columns of the branch.
template <class T, int kTiles>
__device__ __forceinline__ void project(const SparsifyParams& p, int n0, int col, int lane, const LaneTile& a, float (&d)[kTiles][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile % 4 == 0) __syncwarp();  // bounds how many tiles' loads the compiler hoists, and so the registers they take
    const int n = n0 + tile * 8 + lane / 4;
    uint4 b[2] = {};
    if (n < p.rank) {
      const auto* source = static_cast<const uint16_t*>(p.comp_down) + static_cast<int64_t>(n) * p.k + col;
      b[0] = __ldg(reinterpret_cast<const uint4*>(source));
      b[1] = __ldg(reinterpret_cast<const uint4*>(source) + 1);
    }
#pragma unroll
    for (int c = 0; c < kLaneGroups; ++c) {
      const uint4 both = b[c / 2];
      const uint32_t b0 = c % 2 ? both.z : both.x, b1 = c % 2 ? both.w : both.y;
      const uint32_t fragment[4] = {a.pairs[0][2 * c], a.pairs[1][2 * c], a.pairs[0][2 * c + 1], a.pairs[1][2 * c + 1]};
      ptx::mma_m16n8k16(T{}, d[tile], fragment, b0, b1);
    }
  }
}

// kRankCapacity: the branch columns there are accumulators for (0: no branch). A larger rank is split over blockIdx.y, each block selecting
// anew: the second read of X comes from L2. Only blocks with blockIdx.y == 0 write what does not belong to the branch.
template <class T, int kRankCapacity>
__device__ __forceinline__ void sparsify(const SparsifyParams& p) {
  constexpr int kTiles = kRankCapacity ? kRankCapacity / 8 : 1;
  __shared__ float2 norms[kWarps][kTileRows];  // ‖X‖² and ‖S(X)‖² by warp and row
  extern __shared__ float partial[];             // [kWarps][kTileRows][kRankCapacity] branch sums by warp

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int row0 = blockIdx.x * kTileRows, row = row0 + g;
  const int n0 = blockIdx.y * kRankCapacity;  // first branch column of this block
  const bool writes_selection = blockIdx.y == 0;
  const int units = (p.k + kBlockCols - 1) / kBlockCols * (kBlockCols / kWordCols);  // the metadata is padded to whole blocks

  float norm[2] = {}, norm_kept[2] = {};
  float d[kTiles][4] = {};

  LaneTile next = load_tile(p, row, warp * kWordCols + q * kLaneCols);
  for (int unit = warp; unit < units; unit += kWarps) {
    const int col0 = unit * kWordCols, col = col0 + q * kLaneCols;
    LaneTile x = next;
    next = load_tile(p, row, col + kWarps * kWordCols);  // in flight while this unit is worked on

    uint32_t word = kPaddingWord;
    if (col0 < p.k) {
      if (p.shift) subtract_shift<T>(p, row, col, x);
      word = 0;
      LaneTile a;  // what the branch reads
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t compressed[kLaneGroups];
#pragma unroll
        for (int c = 0; c < kLaneGroups; ++c) {
          const uint32_t x01 = x.pairs[half][2 * c], x23 = x.pairs[half][2 * c + 1];
          const Selection s =
              p.score ? select_scored<T>(x01, x23, __ldg(reinterpret_cast<const float4*>(p.score + col) + c)) : select24(x01, x23);
          compressed[c] = s.kept;
          word |= s.nibble << (16 * half + 4 * c);
          norm[half] += square<T>(x01) + square<T>(x23);
          norm_kept[half] += square<T>(s.kept);
#pragma unroll
          for (int i = 0; i < 2; ++i) a.pairs[half][2 * c + i] = p.branch_of_dropped ? s.dropped[i] : x.pairs[half][2 * c + i];
        }
        if (writes_selection && row + 8 * half < p.m) {
          auto* target = static_cast<uint16_t*>(p.values) + static_cast<int64_t>(row + 8 * half) * (p.k / 2) + col / 2;
          *reinterpret_cast<uint4*>(target) = make_uint4(compressed[0], compressed[1], compressed[2], compressed[3]);
        }
      }
      if constexpr (kRankCapacity > 0) project<T, kTiles>(p, n0, col, lane, a, d);
    }
    if (writes_selection) p.metadata[metadata_index(row0, col0, lane, p.m)] = word;
  }

  if (p.row_scale && writes_selection) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float all = sum_over_quad(norm[half]), kept = sum_over_quad(norm_kept[half]);
      if (q == 0) norms[warp][g + 8 * half] = {all, kept};
    }
    __syncthreads();
    if (threadIdx.x < kTileRows && row0 + threadIdx.x < p.m) {
      float all = 0.0f, kept = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        all += norms[w][threadIdx.x].x;
        kept += norms[w][threadIdx.x].y;
      }
      p.row_scale[row0 + threadIdx.x] = sqrtf(all / (kept + p.eps));
    }
  }

  if constexpr (kRankCapacity > 0) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 sum = {d[tile][2 * half], d[tile][2 * half + 1]};
        float* target = partial + (warp * kTileRows + g + 8 * half) * kRankCapacity + tile * 8 + 2 * q;
        *reinterpret_cast<float2*>(target) = sum;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * kRankCapacity / 2; i += kThreads) {
      const int r = i / (kRankCapacity / 2), n = i % (kRankCapacity / 2) * 2;
      float2 sum = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 part = *reinterpret_cast<const float2*>(partial + (w * kTileRows + r) * kRankCapacity + n);
        sum.x += part.x;
        sum.y += part.y;
      }
      if (row0 + r < p.m && n0 + n < p.rank) {
        auto* target = static_cast<uint16_t*>(p.branch) + static_cast<int64_t>(row0 + r) * p.rank + n0 + n;
        *reinterpret_cast<uint32_t*>(target) = T::pack(sum.x, sum.y);
      }
    }
  }
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_SPARSIFY(name, T, rank_capacity)                                                                             \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, rank_capacity > 32 ? 1 : rank_capacity ? 2 : 3)                                 \
      name(const __grid_constant__ rtlynx::SparsifyParams p) {                                                             \
    rtlynx::sparsify<rtlynx::T, rank_capacity>(p);                                                                         \
  }
#define RTLYNX_SPARSIFY_RANKS(prefix, T)  \
  RTLYNX_SPARSIFY(prefix##_r0, T, 0)      \
  RTLYNX_SPARSIFY(prefix##_r16, T, 16)    \
  RTLYNX_SPARSIFY(prefix##_r32, T, 32)    \
  RTLYNX_SPARSIFY(prefix##_r64, T, 64)

RTLYNX_SPARSIFY_RANKS(sparsify_bf16, Bf16)
RTLYNX_SPARSIFY_RANKS(sparsify_f16, F16)
