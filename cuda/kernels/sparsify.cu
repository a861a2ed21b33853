// sparsify: one read of X gives the compressed values, the metadata, the row scale and the input of the rank-r branch.
//
// A block owns 16 rows (one m16 tile of the metadata); its 8 warps take units of 16 x 64 in turn (lane_tile.cuh).
//
// The branch is a dense m16n8k16 product. Neither the order of k in it nor that of n matters as long as both operands and the sum agree, so
// both are what suits the loads, and no lane talks to another:
//   k: the lane's own group c (4 columns of X) serves as its part of k-step c; the lane reads the rows of comp_down for these columns
//   n: of each such row, lane g reads one eighth, `piece` neighbouring values, and tile i takes the i-th value of every piece
//
//     a row of comp_down, capacity 64    | 0 .. 7 | 8 .. 15 | 16 .. 23 |  ...  | 56 .. 63 |     one 16-byte load a lane
//                                          g = 0    g = 1      g = 2              g = 7
//     n-tile i                             i        8 + i      16 + i             56 + i
//
// Sums across warps go through shared memory in a fixed order: the result does not depend on scheduling.
//
// With a norm (norm.cuh) what is read is not X, but what X is the norm of.
//
// Of gathered channels (format.cuh) a quad has all 64 of a unit when each of its lanes has loaded one piece. They exchange them through 2 KB of
// shared memory that are the warp's own, a row of 128 bytes for each of the 16 rows:
//
//              piece 0        1        2        3
//            +----+----+----+----+----+----+----+----+
//   row 0    |  0 |  1 |  2 |  3 |  4 |  5 |  6 |  7 |     16 bytes each; in row r chunk c stands at c xor r % 8, so that neither the
//   row 1    |  1 |  0 |  3 |  2 |  5 |  4 |  7 |  6 |     stores of a quad nor a column of eight rows share their banks
//    ...

#include "rtlynx/lane_tile.cuh"
#include "rtlynx/norm.cuh"
#include "rtlynx/ptx/mma.cuh"

namespace rtlynx {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

// `kPiece` neighbouring values, two to a register, in one load.
template <int kPiece>
__device__ __forceinline__ void load_piece(const uint16_t* source, uint32_t (&pairs)[kPiece / 2]) {
  if constexpr (kPiece == 8) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(source));
    pairs[0] = v.x, pairs[1] = v.y, pairs[2] = v.z, pairs[3] = v.w;
  } else if constexpr (kPiece == 4) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(source));
    pairs[0] = v.x, pairs[1] = v.y;
  } else {
    static_assert(kPiece == 2);
    pairs[0] = __ldg(reinterpret_cast<const uint32_t*>(source));
  }
}

// d += a · comp_down over the lane's unit; n is where the lane's piece of each row begins.
template <class T, int kPiece>
__device__ __forceinline__ void project(const SparsifyParams& p, int col, int n, const LaneTile& a, float (&d)[kPiece][4]) {
  const auto* source = static_cast<const uint16_t*>(p.comp_down) + static_cast<int64_t>(col) * p.rank + n;
#pragma unroll
  for (int c = 0; c < kLaneGroups; ++c) {
    if (c % 2 == 0) __syncwarp();  // bounds how many groups' loads the compiler hoists, and so the registers they take
    uint32_t b[kGroup][kPiece / 2] = {};
    if (n < p.rank) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) load_piece<kPiece>(source + (c * kGroup + i) * p.rank, b[i]);
    }
    const uint32_t fragment[4] = {a.pairs[0][2 * c], a.pairs[1][2 * c], a.pairs[0][2 * c + 1], a.pairs[1][2 * c + 1]};
#pragma unroll
    for (int tile = 0; tile < kPiece; ++tile) {
      const uint32_t half = tile % 2 ? 0x7632 : 0x5410;  // the high or the low half of two registers
      const int pair = tile / 2;
      ptx::mma_m16n8k16(T{}, d[tile], fragment, __byte_perm(b[0][pair], b[1][pair], half), __byte_perm(b[2][pair], b[3][pair], half));
    }
  }
}

constexpr int kExchangeRowBytes = kWordCols * 2;
constexpr int kExchangeBytes = kTileRows * kExchangeRowBytes;

// The lane's 16 gathered columns of rows g and g + 8, out of the pieces that the quad has loaded. The whole warp must call it.
__device__ __forceinline__ LaneTile exchange(uint8_t* memory, const uint8_t* places, int g, int q, const LaneTile& pieces) {
  uint8_t* rows[2] = {memory + g * kExchangeRowBytes, memory + (g + 8) * kExchangeRowBytes};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t (&r)[kLanePairs] = pieces.pairs[half];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      auto* chunk = reinterpret_cast<uint4*>(rows[half] + (2 * q + i ^ g) * 16);
      *chunk = make_uint4(r[4 * i], r[4 * i + 1], r[4 * i + 2], r[4 * i + 3]);
    }
  }
  __syncwarp();
  const uint4 own = __ldg(reinterpret_cast<const uint4*>(places));
  const uint32_t words[4] = {own.x, own.y, own.z, own.w};
  LaneTile tile = {};
#pragma unroll
  for (int j = 0; j < kLaneCols; ++j) {
    const int place = words[j / 4] >> 8 * (j % 4) & (kWordCols - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t x = *reinterpret_cast<const uint16_t*>(rows[half] + (2 * place ^ 16 * g));
      tile.pairs[half][j / 2] |= x << 16 * (j % 2);
    }
  }
  __syncwarp();  // before the next unit's are stored
  return tile;
}

// Where column n of a row stands in a warp's partial sums. Without the exclusive or, the 8 rows a warp stores at once would share their banks.
template <int kRankCapacity>
__device__ __forceinline__ int partial_place(int row, int n) {
  return row * kRankCapacity + (n ^ row % 8 * 2);
}

// kRankCapacity: the branch columns there are accumulators for (0: no branch). A larger rank is split over blockIdx.y, each block selecting
// anew: the second read of X comes from L2. Only blocks with blockIdx.y == 0 write what does not belong to the branch.
template <class T, int kRankCapacity, bool kNormed, bool kGathered>
__device__ __forceinline__ void sparsify(const SparsifyParams& p) {
  constexpr int kPiece = kRankCapacity ? kRankCapacity / 8 : 1;  // branch columns a lane reads, and the number of n-tiles
  __shared__ float2 norms[kWarps][kTileRows];                    // ‖X‖² and ‖S(X)‖² by warp and row
  __shared__ RowNorm row_norms[kNormed ? kTileRows : 1];
  // [kWarps][kTileRows][kRankCapacity] branch sums by warp; before, what the warps exchange
  extern __shared__ __align__(16) float partial[];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int row0 = blockIdx.x * kTileRows, row = row0 + g;
  const int n0 = blockIdx.y * kRankCapacity;  // first branch column of this block
  const bool writes_selection = blockIdx.y == 0;
  const int units = (p.k + kBlockCols - 1) / kBlockCols * (kBlockCols / kWordCols);  // the metadata is padded to whole blocks

  const LaneValues<T> values(p, row, q * kLaneCols);
  float norm[2] = {}, norm_kept[2] = {};
  float d[kPiece][4] = {};

  if constexpr (kNormed) {
    if (threadIdx.x < kTileRows) row_norms[threadIdx.x] = RowNorm(p, min(row0 + static_cast<int>(threadIdx.x), p.m - 1));
    __syncthreads();
  }
  LaneTile next = load_tile<kGathered>(p, row, warp * kWordCols + q * kLaneCols);
  for (int unit = warp; unit < units; unit += kWarps) {
    const int col0 = unit * kWordCols, col = col0 + q * kLaneCols;
    LaneTile x = next;
    next = load_tile<kGathered>(p, row, col + kWarps * kWordCols);  // in flight while this unit is worked on

    uint32_t word = kPaddingWord;
    if (col0 < p.k) {
      if constexpr (kGathered) x = exchange(reinterpret_cast<uint8_t*>(partial) + warp * kExchangeBytes, p.places + col, g, q, x);
      if constexpr (kNormed) normalize<T>(p, row_norms + g, row, col, x);
      if (p.shift) subtract_shift<T>(p, row, col, x);
      const SelectedTile<T> selected(p, col, x);
      word = selected.word;
      if (writes_selection) values.store(T{}, static_cast<uint32_t>(col0), selected.compressed);
#pragma unroll
      for (int half = 0; half < 2; ++half) norm[half] += selected.norm[half], norm_kept[half] += selected.norm_kept[half];
      if constexpr (kRankCapacity > 0) project<T, kPiece>(p, col, n0 + g * kPiece, selected.branch_input, d);
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
    if constexpr (kGathered) __syncthreads();  // the last unit has been exchanged
    // Columns 2q and 2q + 1 of the tiles make up pieces 2q and 2q + 1 of the branch's columns.
    float* mine = partial + warp * kTileRows * kRankCapacity;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = g + i / 2 * 8, piece = 2 * q + i % 2;
#pragma unroll
      for (int tile = 0; tile < kPiece; tile += 2) {
        const float2 sum = {d[tile][i], d[tile + 1][i]};
        *reinterpret_cast<float2*>(mine + partial_place<kRankCapacity>(r, piece * kPiece + tile)) = sum;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTileRows * kRankCapacity / 2; i += kThreads) {
      const int r = i / (kRankCapacity / 2), n = i % (kRankCapacity / 2) * 2;
      float2 sum = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* theirs = partial + w * kTileRows * kRankCapacity;
        const float2 part = *reinterpret_cast<const float2*>(theirs + partial_place<kRankCapacity>(r, n));
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

#define RTLYNX_SPARSIFY(name, T, rank_capacity, normed, gathered)                                 \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, rank_capacity > 32          ? 1  \
                                                                 : rank_capacity || gathered ? 2  \
                                                                                             : 3) \
      name(const __grid_constant__ rtlynx::SparsifyParams p) {                                    \
    rtlynx::sparsify<rtlynx::T, rank_capacity, normed, gathered>(p);                              \
  }
#define RTLYNX_SPARSIFY_RANKS(prefix, T, suffix, normed, gathered) \
  RTLYNX_SPARSIFY(prefix##_r0##suffix, T, 0, normed, gathered)     \
  RTLYNX_SPARSIFY(prefix##_r16##suffix, T, 16, normed, gathered)   \
  RTLYNX_SPARSIFY(prefix##_r32##suffix, T, 32, normed, gathered)   \
  RTLYNX_SPARSIFY(prefix##_r64##suffix, T, 64, normed, gathered)
#define RTLYNX_SPARSIFY_TYPES(suffix, normed, gathered)                \
  RTLYNX_SPARSIFY_RANKS(sparsify_bf16, Bf16, suffix, normed, gathered) \
  RTLYNX_SPARSIFY_RANKS(sparsify_f16, F16, suffix, normed, gathered)

RTLYNX_SPARSIFY_TYPES(, false, false)
RTLYNX_SPARSIFY_TYPES(_norm, true, false)
RTLYNX_SPARSIFY_TYPES(_gathered, false, true)
