// sparsify_sm90: what sparsify.cu does, arranged for a GPU with clusters, wgmma and much bandwidth.
//
// In sparsify.cu every 16 rows read all of comp_down from L2, which at rank 64 is four times the bytes of X. Here a block owns 64 rows, and the
// cluster it belongs to shares K, so that there are enough blocks to fill the GPU:
//
//               128 columns a step
//            +---------+---------+
//   16 rows  | warp 0  | warp 4  |      X: global memory -> registers, a step ahead
//   16 rows  | warp 1  | warp 5  |      comp_down: rank x 128 of it -> shared memory by cp.async, two steps ahead
//   16 rows  | warp 2  | warp 6  |      branch: wgmma, A (what the branch reads) from registers, B = comp_down
//   16 rows  | warp 3  | warp 7  |
//            +---------+---------+      block c of a cluster of n takes steps c, c + n, c + 2n, ...
//
// A lane holds 16 neighbouring columns of a row, not the columns that wgmma's A fragment names. The order of k in a product is free as long as A
// and B agree, so comp_down is put into shared memory in the lanes' order (see `shared_place`).
//
// At the end each block of the cluster sums its share of the rows over all blocks, through distributed shared memory, in a fixed order.

#include "rtlynx/lane_tile.cuh"
#include "rtlynx/ptx/cluster.cuh"
#include "rtlynx/ptx/cp_async.cuh"
#include "rtlynx/ptx/wgmma.cuh"
#include "rtlynx/ptx/wgmma_rs.cuh"

namespace rtlynx {
namespace {

constexpr int kThreads = 256;
constexpr int kRowTiles = 4;                  // m16 tiles of a block
constexpr int kRows = kRowTiles * kTileRows;  // rows of a block
constexpr int kUnits = 2;                     // 64-column units of a step, one for each column of warps
constexpr int kStepCols = kUnits * kWordCols;
constexpr int kStages = 3;

// Where a pair of neighbouring columns of comp_down stands in a unit's tile: rows n of 64 columns, 128 bytes, SW128. In k-step c of 16, A's
// fragment takes from lane q the k = 2q, 2q + 1 and the k = 2q + 8, 2q + 9; there the lane puts the two pairs of its group c, columns
// 16q + 4c .. + 3. So pair 8q + 2c + h of a row (columns 16q + 4c + 2h and + 1) goes to pair 8c + 4h + q, where the swizzle moves 16-byte chunks.
__device__ __forceinline__ uint32_t shared_place(int n, int pair) {
  const int q = pair / 8, c = pair / 2 % 4, h = pair % 2;
  const int chunk = 2 * c + h;  // 4 pairs to a chunk
  return n * 128 + (chunk ^ (n & 7)) * 16 + q * 4;
}

template <int kRankCapacity>
__device__ __forceinline__ void load_stage(const SparsifyParams& p, int n0, int col0, uint32_t stage) {
  constexpr int kPairs = kWordCols / 2;  // of a row of a unit's tile
  constexpr int kRowsAtOnce = kThreads / (kPairs * kUnits);
  const int unit = threadIdx.x / kPairs % kUnits, pair = threadIdx.x % kPairs, first = threadIdx.x / (kPairs * kUnits);
  const int col = col0 + unit * kWordCols + pair * 2;
  const auto* source = static_cast<const uint16_t*>(p.comp_down) + static_cast<int64_t>(n0 + first) * p.k + col;
  const uint32_t tile = stage + unit * kRankCapacity * 128;
#pragma unroll
  for (int i = 0; i < kRankCapacity / kRowsAtOnce; ++i) {
    const int n = first + i * kRowsAtOnce;
    const bool valid = n0 + n < p.rank && col < p.k;
    ptx::cp_async_4(tile + shared_place(n, pair), valid ? source : p.comp_down, valid);
    source += kRowsAtOnce * p.k;
  }
}

// d += a · comp_down^T over the unit of this warpgroup.
template <class T, int kCount>
__device__ __forceinline__ void project(uint32_t tile, const LaneTile& a, float (&d)[kCount]) {
  const uint64_t b = ptx::matrix_descriptor<ptx::Swizzle::k128Bytes>(tile);
  ptx::wgmma_fence();
#pragma unroll
  for (int c = 0; c < kLaneGroups; ++c) {
    const uint32_t fragment[4] = {a.pairs[0][2 * c], a.pairs[1][2 * c], a.pairs[0][2 * c + 1], a.pairs[1][2 * c + 1]};
    ptx::wgmma_rs_k16(T{}, d, fragment, ptx::advanced(b, c * 32));
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::pin_registers(d);
}

// kRankCapacity: the branch columns there are accumulators for (0: no branch). A larger rank is split over blockIdx.y; only blocks with
// blockIdx.y == 0 write what does not belong to the branch.
template <class T, int kRankCapacity>
__device__ __forceinline__ void sparsify_sm90(const SparsifyParams& p) {
  constexpr int kCount = kRankCapacity ? kRankCapacity / 2 : 4;  // accumulators of a lane: 2 rows x a quarter of the columns
  constexpr int kStageBytes = kRankCapacity * kStepCols * 2;
  static_assert(kUnits * kRows * kRankCapacity * 4 <= kStages * kStageBytes, "the partial branch takes the place of the stages");
  __shared__ __align__(8) float2 norms[kUnits][kRows];  // ‖X‖² and ‖S(X)‖² over this block's columns
  extern __shared__ __align__(1024) uint8_t ring[];  // kStages stages; at the end the partial branch, [kUnits][kRows][kRankCapacity] floats
  const uint32_t stages = ptx::shared_address(ring);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int row_tile = warp % kRowTiles, unit = warp / kRowTiles;
  const int clusters = ptx::cluster_size(), rank = ptx::cluster_rank();
  const int block_row = blockIdx.x / clusters * kRows, row0 = block_row + row_tile * kTileRows, row = row0 + g;
  const int n0 = blockIdx.y * kRankCapacity;
  const bool writes_selection = blockIdx.y == 0;
  const int steps = (p.k + kBlockCols - 1) / kBlockCols * (kBlockCols / kStepCols);  // the metadata is padded to whole blocks

  float norm[2] = {}, norm_kept[2] = {};
  float d[kCount] = {};

  if constexpr (kRankCapacity > 0) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (rank + s * clusters < steps) load_stage<kRankCapacity>(p, n0, (rank + s * clusters) * kStepCols, stages + s * kStageBytes);
      ptx::cp_async_commit();
    }
  }
  LaneTile next = load_tile(p, row, rank * kStepCols + unit * kWordCols + q * kLaneCols);

  int stage = 0, free_stage = kStages - 1;
  for (int step = rank; step < steps; step += clusters) {
    const int col0 = step * kStepCols + unit * kWordCols, col = col0 + q * kLaneCols;
    LaneTile x = next;
    next = load_tile(p, row, col + clusters * kStepCols);  // in flight while this step is worked on
    if constexpr (kRankCapacity > 0) {
      ptx::cp_async_wait<kStages - 2>();
      ptx::fence_proxy_async();
      __syncthreads();  // the stage is filled for all; all are done reading the one refilled now
      const int ahead = step + (kStages - 1) * clusters;
      if (ahead < steps) load_stage<kRankCapacity>(p, n0, ahead * kStepCols, stages + free_stage * kStageBytes);
      ptx::cp_async_commit();
    }
    uint32_t word = kPaddingWord;
    if (col0 < p.k) {
      if (p.shift) subtract_shift<T>(p, row, col, x);
      const SelectedTile<T> selected(p, col, x);
      word = selected.word;
      if (writes_selection) selected.store_values(p, row, col);
#pragma unroll
      for (int half = 0; half < 2; ++half) norm[half] += selected.norm[half], norm_kept[half] += selected.norm_kept[half];
      if constexpr (kRankCapacity > 0) project<T>(stages + stage * kStageBytes + unit * kRankCapacity * 128, selected.branch_input, d);
    }
    if (writes_selection) p.metadata[metadata_index(row0, col0, lane, p.m)] = word;
    free_stage = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float all = sum_over_quad(norm[half]), kept = sum_over_quad(norm_kept[half]);
    if (q == 0) norms[unit][row_tile * kTileRows + g + 8 * half] = {all, kept};
  }
  if constexpr (kRankCapacity > 0) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the stages are free
    float* partial = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {  // d[4j + 2·half ..]: row g + 8·half, columns 8j + 2q and + 1
      const int r = row_tile * kTileRows + g + 8 * (i % 2), n = i / 2 * 8 + 2 * q;
      *reinterpret_cast<float2*>(partial + (unit * kRows + r) * kRankCapacity + n) = {d[2 * i], d[2 * i + 1]};
    }
  }
  ptx::cluster_sync();

  // This block's share of the 64 rows, summed over the cluster's blocks and the units.
  const int share = (kRows + clusters - 1) / clusters, first = rank * share, last = min(first + share, kRows);
  if (p.row_scale && writes_selection) {
    for (int r = first + threadIdx.x; r < last; r += kThreads) {
      float2 sum = {};
      for (int c = 0; c < clusters; ++c) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const float2 part = ptx::load_shared_of(ptx::shared_address(&norms[u][r]), c);
          sum.x += part.x, sum.y += part.y;
        }
      }
      if (block_row + r < p.m) p.row_scale[block_row + r] = sqrtf(sum.x / (sum.y + p.eps));
    }
  }
  if constexpr (kRankCapacity > 0) {
    for (int i = first * kRankCapacity / 2 + threadIdx.x; i < last * kRankCapacity / 2; i += kThreads) {
      const int r = i / (kRankCapacity / 2), n = i % (kRankCapacity / 2) * 2;
      if (block_row + r >= p.m || n0 + n >= p.rank) continue;
      float2 sum = {};
      for (int c = 0; c < clusters; ++c) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const float2 part = ptx::load_shared_of(stages + ((u * kRows + r) * kRankCapacity + n) * 4, c);
          sum.x += part.x, sum.y += part.y;
        }
      }
      auto* target = static_cast<uint16_t*>(p.branch) + static_cast<int64_t>(block_row + r) * p.rank + n0 + n;
      *reinterpret_cast<uint32_t*>(target) = T::pack(sum.x, sum.y);
    }
  }
  ptx::cluster_sync();  // no block leaves while another reads its shared memory
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_SPARSIFY(name, T, rank_capacity)                                         \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, rank_capacity ? 2 : 3) \
      name(const __grid_constant__ rtlynx::SparsifyParams p) {                          \
    rtlynx::sparsify_sm90<rtlynx::T, rank_capacity>(p);                                 \
  }
#define RTLYNX_SPARSIFY_RANKS(prefix, T) \
  RTLYNX_SPARSIFY(prefix##_r0, T, 0)     \
  RTLYNX_SPARSIFY(prefix##_r16, T, 16)   \
  RTLYNX_SPARSIFY(prefix##_r32, T, 32)   \
  RTLYNX_SPARSIFY(prefix##_r64, T, 64)

RTLYNX_SPARSIFY_RANKS(sparsify_sm90_bf16, Bf16)
RTLYNX_SPARSIFY_RANKS(sparsify_sm90_f16, F16)
