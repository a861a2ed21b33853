// sparsify_sm90: what sparsify.cu does, arranged for a GPU with clusters, wgmma and the copy engine. Three files of kernels are made of it.
//
// In sparsify.cu every 16 rows read all of comp_down from L2, which at rank 64 is four times the bytes of X. Here a block owns 64 rows, and the
// cluster it belongs to shares K, so that there are enough blocks to fill the GPU. One warp copies stages to shared memory, eight work:
//
//             128 columns a stage
//            +---------+---------+
//   16 rows  | warp 0  | warp 4  |      X: two boxes of 64 x 64
//   16 rows  | warp 1  | warp 5  |      comp_down: two boxes of 64 channels x rank
//   16 rows  | warp 2  | warp 6  |      branch: wgmma, A (what the branch reads) from registers, B = comp_down
//   16 rows  | warp 3  | warp 7  |
//            +---------+---------+      block c of a cluster of n takes the 256-column blocks c, c + n, c + 2n, ..., two stages each
//
// A lane holds 16 neighbouring columns of a row, not the columns that wgmma's A fragment names. The order of k in a product is free as long as A
// and B agree, so the copy engine puts the channels of comp_down into shared memory in the lanes' order. In k-step c of 16, A's fragment takes
// from lane q the k = 2q + e and the k = 2q + 8 + e (e = 0, 1); there the lane puts its group c, columns 16q + 4c .. + 3:
//
//   column of X    16 q + 4 c + 2 h + e
//   row of B       16 c + 8 h + 2 q + e        a copy over the dimensions e (2 channels), q (4, 16 apart), c and h together (8, 2 apart)
//
// At the end each block of the cluster sums its share of the rows over all blocks, through distributed shared memory, in a fixed order.
//
// With an activation (activation.cuh) X is made of what is read: its first head_k columns are those of `head`, the others act(x), or act(x) times
// `gate`, which then has a place of its own in every stage. With a norm (norm.cuh) X is that of what is read; it has no head.
//
// With places the columns of a unit are gathered from its four pieces (format.cuh), each a box of its own. They take the room of the unit's box,
// and a lane picks its 16 columns out of them, element by element, at the same places in every row:
//
//             32 bytes: 16 columns
//            +---------+---------+
//   row 0    |    0    |    1    |      piece 0; pieces 1, 2, 3 below, 2 KB apart
//    ...     |         |         |      A swizzle may not be wider than a box's row. This one exchanges the halves of four rows in eight, so
//   row 4    |    1    |    0    |      that a column of eight rows lies in different banks.
//    ...     |         |         |
//            +---------+---------+
//
// 16 divides head_k and the starts of pieces, so a piece is all head's or has none of it.
#pragma once

#include "rtlynx/activation.cuh"
#include "rtlynx/lane_tile.cuh"
#include "rtlynx/norm.cuh"
#include "rtlynx/ptx/cluster.cuh"
#include "rtlynx/ptx/cp_async.cuh"
#include "rtlynx/ptx/grid.cuh"
#include "rtlynx/ptx/load.cuh"
#include "rtlynx/ptx/mbarrier.cuh"
#include "rtlynx/ptx/registers.cuh"
#include "rtlynx/ptx/tma.cuh"
#include "rtlynx/ptx/wgmma.cuh"
#include "rtlynx/ptx/wgmma_rs.cuh"

namespace rtlynx {
namespace {

constexpr int kRowTiles = 4;                  // m16 tiles of a block
constexpr int kRows = kRowTiles * kTileRows;  // rows of a block
constexpr int kUnits = 2;                     // 64-column units of a stage, one for each warpgroup
constexpr int kStagesPerBlock = kBlockCols / (kUnits * kWordCols);
constexpr int kWarps = kRowTiles * kUnits;  // that work
constexpr int kThreads = 32 * (kWarps + 1);
constexpr int kMaxCluster = 8;                       // that every GPU with clusters accepts
constexpr uint32_t kXBytes = kRows * kWordCols * 2;  // of a unit
constexpr int kPieces = kWordCols / kPieceCols;      // of a gathered unit
constexpr uint32_t kPieceRowBytes = kPieceCols * 2;
constexpr uint32_t kPieceBytes = kRows * kPieceRowBytes;

// A row of comp_down in shared memory is as long as its swizzle says.
template <int kRankCapacity>
constexpr ptx::Swizzle kDownSwizzle = kRankCapacity == 64   ? ptx::Swizzle::k128Bytes
                                      : kRankCapacity == 32 ? ptx::Swizzle::k64Bytes
                                                            : ptx::Swizzle::k32Bytes;

// The ring of stages. A stage holds X of both units, then comp_down of both, then the gates of both if there are any. kRankCapacity: the branch
// columns there are accumulators for. kCount is what lets two blocks share a multiprocessor, three without a branch.
template <int kRankCapacity, bool kGated>
struct Stages {
  static constexpr int kCount = kGated ? 2 : kRankCapacity == 64 ? 3 : 4;
  static constexpr uint32_t kDownBytes = kWordCols * kRankCapacity * 2;
  static constexpr uint32_t kStageBytes = kUnits * ((kGated ? 2 : 1) * kXBytes + kDownBytes);
  static constexpr uint32_t kToGate = kUnits * (kXBytes + kDownBytes);  // from a unit's x to its gate
  uint32_t base, barriers;
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t x(int unit) const { return base + stage * kStageBytes + unit * kXBytes; }
  __device__ __forceinline__ uint32_t down(int unit) const { return base + stage * kStageBytes + kUnits * kXBytes + unit * kDownBytes; }
  __device__ __forceinline__ uint32_t gate(int unit) const { return x(unit) + kToGate; }
  __device__ __forceinline__ uint32_t full() const { return barriers + stage * 8; }
  __device__ __forceinline__ uint32_t empty() const { return full() + kCount * 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == kCount) stage = 0, parity ^= 1;
  }
};

// The blocks of 256 columns that this thread block works on. Clusters start at different ones, so that they do not ask L2 for the same part of
// comp_down at the same time.
struct ColumnBlocks {
  int first, stride, count, at;

  __device__ __forceinline__ ColumnBlocks(int k, int cluster_rank, int cluster_size, int cluster)
      : first(cluster_rank), stride(cluster_size) {
    count = ((k + kBlockCols - 1) / kBlockCols - cluster_rank + cluster_size - 1) / cluster_size;
    at = cluster % count;
  }
  // The first column of the next one.
  __device__ __forceinline__ int next() {
    const int column = (first + at * stride) * kBlockCols;
    if (++at == count) at = 0;
    return column;
  }
};

// In a block of 256 columns unit u of stage s is the columns 64 (2u + s) .., so that a lane's two words of it stand side by side.
__device__ __forceinline__ int unit_column(int block_column, int unit, int s) {
  return block_column + (unit * kStagesPerBlock + s) * kWordCols;
}

// How many of the pieces of the gathered unit at column `col` are head's: the first ones.
__device__ __forceinline__ int head_pieces(const SparsifySm90Params& p, int col) {
  int count = 0;
  while (piece_column(col, count, p.k) < p.head_k) ++count;  // a fifth would start behind k, so behind the head too
  return count;
}

// Bytes of the unit at column `col` that have no gate: the head's.
template <bool kGathered>
__device__ __forceinline__ uint32_t ungated_bytes(const SparsifySm90Params& p, int col) {
  if constexpr (kGathered) return head_pieces(p, col) * kPieceBytes;
  return col < p.head_k ? kXBytes : 0;
}

// Copies a box of X at `column`, and of its gate.
template <Activation kActivation, bool kGated>
__device__ __forceinline__ void copy_box(const SparsifySm90Params& p, uint32_t x, uint32_t gate, int column, int row, uint32_t barrier) {
  if constexpr (kActivation == Activation::kNone || kActivation == Activation::kNorm) {
    ptx::tma_load_2d(x, p.x, column, row, barrier);
  } else if (column < p.head_k) {
    ptx::tma_load_2d(x, p.head, column, row, barrier);
  } else {
    ptx::tma_load_2d(x, p.x, column - p.head_k, row, barrier);
    if constexpr (kGated) ptx::tma_load_2d(gate, p.gate, column - p.head_k, row, barrier);
  }
}

template <Activation kActivation, bool kGathered, int kRankCapacity, bool kGated>
__device__ __forceinline__ void copy_stages(const SparsifySm90Params& p, Stages<kRankCapacity, kGated> stages, ColumnBlocks blocks,
                                            int block_row, int n0) {
  using Ring = Stages<kRankCapacity, kGated>;
  for (int i = 0; i < blocks.count; ++i) {
    const int block_column = blocks.next();
#pragma unroll
    for (int s = 0; s < kStagesPerBlock; ++s) {
      ptx::mbarrier_wait(stages.empty(), stages.parity ^ 1);
      uint32_t bytes = Ring::kStageBytes;
      if constexpr (kGated) {  // the head has no gate
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) bytes -= ungated_bytes<kGathered>(p, unit_column(block_column, unit, s));
      }
      ptx::mbarrier_arrive_expect(stages.full(), bytes);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        const int column = unit_column(block_column, unit, s);
        if constexpr (kGathered) {  // of a unit past the end, too: what then arrives is not read
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            const uint32_t offset = piece * kPieceBytes;
            const int from = piece_column(column, piece, p.k);
            copy_box<kActivation, kGated>(p, stages.x(unit) + offset, stages.gate(unit) + offset, from, block_row, stages.full());
          }
        } else {
          copy_box<kActivation, kGated>(p, stages.x(unit), stages.gate(unit), column, block_row, stages.full());
        }
        if constexpr (kRankCapacity > 0) ptx::tma_load_5d(stages.down(unit), p.comp_down, n0, column / kWordCols, stages.full());
      }
      stages.advance();
    }
  }
}

// Where the lane's part of one row begins in a 64 x 64 box: 32 bytes, which the copy engine has swizzled. Their second half is 16 bytes ahead or
// behind.
__device__ __forceinline__ uint32_t place_in_box(int row, int q) { return row * 128 + (2 * q ^ (row & 7)) * 16; }

__device__ __forceinline__ void read_row(uint32_t at, uint32_t (&pairs)[kLanePairs]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t* r = pairs + 4 * i;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at ^ i * 16));
  }
}

// Its part of two rows of X, 8 apart: of the box, or with an activation what that makes of the box and of the gate's. `at` and `gate_at` are the
// first row's.
template <class T, Activation kActivation>
__device__ __forceinline__ LaneTile read_tile(uint32_t at, uint32_t gate_at, bool of_head) {
  constexpr uint32_t kNext = 8 * 128;
  LaneTile tile;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t (&pairs)[kLanePairs] = tile.pairs[half];
    read_row(at + half * kNext, pairs);
    if constexpr (kActivation == Activation::kGeluTanh) {
      if (!of_head) gelu_tanh<T>(pairs);
    } else if constexpr (kActivation == Activation::kSiluGate) {
      if (!of_head) {
        uint32_t gate[kLanePairs];
        read_row(gate_at + half * kNext, gate);
        silu_gate<T>(pairs, gate);
      }
    }
  }
  return tile;
}

// The same of a gathered unit. `places` are the lane's own 16; those below `of_head` are head's.
template <class T, Activation kActivation>
__device__ __forceinline__ LaneTile gather_tile(uint32_t box, uint32_t gate_box, const uint4& places, int of_head, int row) {
  const uint32_t words[4] = {places.x, places.y, places.z, places.w};
  const uint32_t first = row * kPieceRowBytes ^ row % 8 / 4 * 16;  // where column 0 of a piece stands in this row
  constexpr uint32_t kNext = 8 * kPieceRowBytes;
  LaneTile tile;
#pragma unroll
  for (int i = 0; i < kLanePairs; ++i) {
    uint32_t at[2], from_head = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t place = words[i / 2] >> (16 * (i % 2) + 8 * e) & (kWordCols - 1);
      at[e] = place / kPieceCols * kPieceBytes + (first ^ place % kPieceCols * 2);
      if (kActivation != Activation::kNone && static_cast<int>(place) < of_head) from_head |= 0xffffu << 16 * e;
    }
    uint32_t x[2];  // the pair in rows `row` and row + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) x[half] = ptx::load_shared_pair(box + at[0] + half * kNext, box + at[1] + half * kNext);
    if constexpr (kActivation != Activation::kNone) {
      uint32_t made[2] = {x[0], x[1]};
      if constexpr (kActivation == Activation::kGeluTanh) {
        gelu_tanh<T>(made);
      } else {
        uint32_t gate[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          gate[half] = ptx::load_shared_pair(gate_box + at[0] + half * kNext, gate_box + at[1] + half * kNext);
        silu_gate<T>(made, gate);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) x[half] = (x[half] & from_head) | (made[half] & ~from_head);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) tile.pairs[half][i] = x[half];
  }
  return tile;
}

// Issues d += a · comp_down over a unit, whose matrix descriptor is `b`.
template <class T, int kCount>
__device__ __forceinline__ void project(uint64_t b, const LaneTile& a, float (&d)[kCount]) {
  ptx::wgmma_fence();
#pragma unroll
  for (int c = 0; c < kLaneGroups; ++c) {
    const uint32_t fragment[4] = {a.pairs[0][2 * c], a.pairs[1][2 * c], a.pairs[0][2 * c + 1], a.pairs[1][2 * c + 1]};
    ptx::wgmma_rs_k16_rows(T{}, d, fragment, ptx::advanced(b, c * 16 * kCount * 4));
  }
  ptx::wgmma_commit();
}

// Sums what stands at this shared address, and `unit_bytes` further for each further unit, in every block of the cluster. All loads are in flight
// at once; the order of the additions is fixed.
__device__ __forceinline__ float2 sum_over_cluster(uint32_t shared, uint32_t unit_bytes, int clusters) {
  float2 parts[kMaxCluster][kUnits];
#pragma unroll
  for (int c = 0; c < kMaxCluster; ++c) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      parts[c][unit] = c < clusters ? ptx::load_shared_of(shared + unit * unit_bytes, c) : float2{};
    }
  }
  float2 sum = {};
#pragma unroll
  for (int c = 0; c < kMaxCluster; ++c) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) sum.x += parts[c][unit].x, sum.y += parts[c][unit].y;
  }
  return sum;
}

// A rank larger than the capacity is split over blockIdx.y; only blocks with blockIdx.y == 0 write what does not belong to the branch.
template <class T, class Operand, int kRankCapacity, Activation kActivation, bool kGathered>
__device__ __forceinline__ void sparsify_sm90(const SparsifySm90Params& p) {
  constexpr bool kGated = kActivation == Activation::kSiluGate, kNormed = kActivation == Activation::kNorm;
  using Ring = Stages<kRankCapacity, kGated>;
  constexpr int kCount = kRankCapacity ? kRankCapacity / 2 : 4;  // accumulators of a lane: 2 rows x a quarter of the columns
  static_assert(kUnits * kRows * kRankCapacity * 4 <= Ring::kCount * Ring::kStageBytes, "the partial branch takes the place of the stages");
  __shared__ __align__(8) float2 norms[kUnits][kRows];  // ‖X‖² and ‖S(X)‖² over this block's columns
  __shared__ __align__(8) uint64_t barriers[2 * Ring::kCount];
  __shared__ RowNorm row_norms[kNormed ? kRows : 1];
  extern __shared__ __align__(1024) uint8_t memory[];  // the stages; at the end the partial branch, [kUnits][kRows][kRankCapacity] floats
  Ring ring{ptx::shared_address(memory), ptx::shared_address(barriers)};

  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // the same in all lanes, which the compiler then knows
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int clusters = ptx::cluster_size(), rank = ptx::cluster_rank(), cluster = blockIdx.x / clusters;
  const int block_row = cluster * kRows, n0 = blockIdx.y * kRankCapacity;
  const bool writes_selection = blockIdx.y == 0;
  ColumnBlocks blocks(p.k, rank, clusters, cluster);

  if (threadIdx.x == 0) {
    for (int s = 0; s < Ring::kCount; ++s) {
      ptx::mbarrier_init(ring.barriers + s * 8, 1);
      ptx::mbarrier_init(ring.barriers + (Ring::kCount + s) * 8, kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (kNormed) {
    if (threadIdx.x < kRows) row_norms[threadIdx.x] = RowNorm(p, min(block_row + static_cast<int>(threadIdx.x), p.m - 1));
  }
  ptx::let_next_grid_start();  // the GEMM waits for the results itself
  __syncthreads();

  float d[kCount] = {};
  if (warp == kWarps) {
    if (lane == 0) copy_stages<kActivation, kGathered>(p, ring, blocks, block_row, n0);
    __syncwarp();
  } else {
    const int row_tile = warp % kRowTiles, unit = warp / kRowTiles;
    const int row0 = block_row + row_tile * kTileRows, row = row0 + g, box_row = row_tile * kTileRows + g;
    const LaneValues<Operand> values(p, row, q * kLaneCols);
    // Of the first stage; kept, where the compiler would compute them again in every stage.
    const uint32_t first_x = ptx::opaque(ring.x(unit) + place_in_box(box_row, q));
    const uint64_t first_down = ptx::matrix_descriptor<kDownSwizzle<kRankCapacity>>(ring.down(unit));
    uint32_t* const metadata = p.metadata + metadata_index(row0, unit_column(0, unit, 0), lane, p.m);
    float norm[2] = {}, norm_kept[2] = {};
    for (int i = 0; i < blocks.count; ++i) {
      const int block_column = blocks.next();
      uint32_t words[kStagesPerBlock];
#pragma unroll
      for (int s = 0; s < kStagesPerBlock; ++s) {
        const int col0 = unit_column(block_column, unit, s), col = col0 + q * kLaneCols;
        words[s] = kPaddingWord;
        uint4 places = {};
        if constexpr (kGathered) {
          if (col0 < p.k) places = __ldg(reinterpret_cast<const uint4*>(p.places + col));  // on their way while the warp waits
        }
        ptx::mbarrier_wait(ring.full(), ring.parity);
        if (col0 < p.k) {
          LaneTile x;
          if constexpr (kGathered) {
            x = gather_tile<T, kActivation>(ring.x(unit), ring.gate(unit), places, head_pieces(p, col0) * kPieceCols, box_row);
          } else {
            const uint32_t at = first_x + ring.stage * Ring::kStageBytes;
            x = read_tile<T, kActivation>(at, at + Ring::kToGate, col0 < p.head_k);
          }
          if constexpr (kNormed) normalize<T>(p, row_norms + box_row, row, col, x);
          if (p.shift) subtract_shift<T>(p, row, col, x);
          const SelectedTile<T> selected(p, col, x);
          if constexpr (kRankCapacity > 0) project<T>(ptx::advanced(first_down, ring.stage * Ring::kStageBytes), selected.branch_input, d);
          words[s] = stored_word<Operand>(selected.word);
          if (writes_selection) values.store(T{}, static_cast<uint32_t>(col0), selected.compressed);
#pragma unroll
          for (int half = 0; half < 2; ++half) norm[half] += selected.norm[half], norm_kept[half] += selected.norm_kept[half];
          if constexpr (kRankCapacity > 0) {
            ptx::wgmma_wait<0>();
            ptx::pin_registers(d);
          }
        }
        if (lane == 0) ptx::mbarrier_arrive(ring.empty());
        ring.advance();
      }
      if (writes_selection) {
        uint32_t* target = metadata + static_cast<uint32_t>(block_column) / kBlockCols * metadata_index(0, kBlockCols, 0, p.m);
        __stcg(reinterpret_cast<uint2*>(target), make_uint2(words[0], words[1]));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float all = sum_over_quad(norm[half]), kept = sum_over_quad(norm_kept[half]);
      if (q == 0) norms[unit][row_tile * kTileRows + g + 8 * half] = {all, kept};
    }
  }

  if constexpr (kRankCapacity > 0) {
    __syncthreads();  // all stages have been read
    float* partial = reinterpret_cast<float*>(memory);
    if (warp < kWarps) {
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {  // d[4j + 2·half ..]: row g + 8·half, columns 8j + 2q and + 1
        const int r = warp % kRowTiles * kTileRows + g + 8 * (i % 2), n = i / 2 * 8 + 2 * q;
        *reinterpret_cast<float2*>(partial + (warp / kRowTiles * kRows + r) * kRankCapacity + n) = {d[2 * i], d[2 * i + 1]};
      }
    }
  }
  ptx::cluster_sync();

  // This block's share of the 64 rows, summed over the cluster's blocks and the units.
  const int share = (kRows + clusters - 1) / clusters, first = rank * share, last = min(first + share, kRows);
  if (p.row_scale && writes_selection) {
    for (int r = first + threadIdx.x; r < last; r += kThreads) {
      const float2 sum = sum_over_cluster(ptx::shared_address(&norms[0][r]), sizeof(norms[0]), clusters);
      if (block_row + r < p.m) p.row_scale[block_row + r] = sqrtf(sum.x / (sum.y + p.eps));
    }
  }
  if constexpr (kRankCapacity > 0) {
    for (int i = first * kRankCapacity / 2 + threadIdx.x; i < last * kRankCapacity / 2; i += kThreads) {
      const int r = i / (kRankCapacity / 2), n = i % (kRankCapacity / 2) * 2;
      if (block_row + r >= p.m || n0 + n >= p.rank) continue;
      const float2 sum = sum_over_cluster(ring.base + (r * kRankCapacity + n) * 4, kRows * kRankCapacity * 4, clusters);
      auto* target = static_cast<uint16_t*>(p.branch) + static_cast<int64_t>(block_row + r) * p.rank + n0 + n;
      *reinterpret_cast<uint32_t*>(target) = T::pack(sum.x, sum.y);
    }
  }
  ptx::cluster_sync();  // no block leaves while another reads its shared memory
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_SPARSIFY(name, T, Operand, rank_capacity, activation, gathered)                                     \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, rank_capacity ? 2 : 3)                            \
      name(const __grid_constant__ rtlynx::SparsifySm90Params p) {                                                 \
    rtlynx::sparsify_sm90<rtlynx::T, rtlynx::Operand, rank_capacity, rtlynx::Activation::activation, gathered>(p); \
  }
#define RTLYNX_SPARSIFY_RANKS(prefix, T, Operand, suffix, activation, gathered) \
  RTLYNX_SPARSIFY(prefix##_r0##suffix, T, Operand, 0, activation, gathered)     \
  RTLYNX_SPARSIFY(prefix##_r16##suffix, T, Operand, 16, activation, gathered)   \
  RTLYNX_SPARSIFY(prefix##_r32##suffix, T, Operand, 32, activation, gathered)   \
  RTLYNX_SPARSIFY(prefix##_r64##suffix, T, Operand, 64, activation, gathered)
#define RTLYNX_SPARSIFY_TYPES(suffix, activation, gathered)                               \
  RTLYNX_SPARSIFY_RANKS(sparsify_sm90_bf16, Bf16, Bf16, suffix, activation, gathered)     \
  RTLYNX_SPARSIFY_RANKS(sparsify_sm90_f16, F16, F16, suffix, activation, gathered)        \
  RTLYNX_SPARSIFY_RANKS(sparsify_sm90_bf16e4m3, Bf16, E4m3, suffix, activation, gathered) \
  RTLYNX_SPARSIFY_RANKS(sparsify_sm90_f16e4m3, F16, E4m3, suffix, activation, gathered)
