// sparsify: one read of X gives the compressed values, the metadata, the row scale and the input of the rank-r branch.
//
// A block owns 16 rows (one m16 tile of the metadata); its 8 warps take units of 16 x 64 in turn (lane_tile.cuh).
//
// The branch is a dense m16n8k16 product. The order of k inside a product is free as long as both operands agree, so the lane's own
// group c (4 columns) serves as its part of k-step c, and comp_down is read in the same order: again no exchange, no shared memory.
// Sums across warps go through shared memory in a fixed order: the result does not depend on scheduling.

#include "rtlynx/lane_tile.cuh"
#include "rtlynx/ptx/mma.cuh"

namespace rtlynx {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

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
  extern __shared__ float partial[];           // [kWarps][kTileRows][kRankCapacity] branch sums by warp

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
      const SelectedTile<T> selected(p, col, x);
      word = selected.word;
      if (writes_selection) selected.store_values(p, row, col);
#pragma unroll
      for (int half = 0; half < 2; ++half) norm[half] += selected.norm[half], norm_kept[half] += selected.norm_kept[half];
      if constexpr (kRankCapacity > 0) project<T, kTiles>(p, n0, col, lane, selected.branch_input, d);
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

#define RTLYNX_SPARSIFY(name, T, rank_capacity)                                         \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, rank_capacity > 32 ? 1 \
                                                                 : rank_capacity    ? 2 \
                                                                                    : 3)   \
      name(const __grid_constant__ rtlynx::SparsifyParams p) {                          \
    rtlynx::sparsify<rtlynx::T, rank_capacity>(p);                                      \
  }
#define RTLYNX_SPARSIFY_RANKS(prefix, T) \
  RTLYNX_SPARSIFY(prefix##_r0, T, 0)     \
  RTLYNX_SPARSIFY(prefix##_r16, T, 16)   \
  RTLYNX_SPARSIFY(prefix##_r32, T, 32)   \
  RTLYNX_SPARSIFY(prefix##_r64, T, 64)

RTLYNX_SPARSIFY_RANKS(sparsify_bf16, Bf16)
RTLYNX_SPARSIFY_RANKS(sparsify_f16, F16)
