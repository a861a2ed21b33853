// spmm_sm80: Y = row_scale · (S(X) · W^T) + branch · comp_up^T + bias with mma.sp, for every GPU from Ampere on.
//
// A block computes a kBM x kBN tile of Y. Compressed A and dense W stream through a ring of kStages shared-memory stages of 64 dense
// columns, filled by cp.async; the metadata (1/16 of the bytes) goes straight to registers, 256 columns at a time.
//
//   for each 64 dense columns                      then, in the same accumulators
//     A  kBM x 32 values   64-byte rows              acc *= row_scale
//     W  kBN x 64          128-byte rows             acc += branch · comp_up^T      rank dense columns, m16n8k16
//     acc += A · W^T       2 x m16n8k32 deep         acc += bias                    store through shared memory, 16 bytes a thread
//
// An epilogue (epilogue.cuh) works on those 16 bytes.
//
//   256 x 128: 8 warps, 4 x 2, one block a multiprocessor     the others: 4 warps, 2 x 2, two blocks
//
//            n0    n64             Clocks of a multiprocessor for 128 x 128 outputs and 32 columns, where it has 128 bytes of shared
//          +-----+-----+           memory, 4096 dense-equivalent FLOP for mma.sp and about 40 bytes from L2 a clock (H200):
//     m0   |  0  |  1  |
//     m64  |  2  |  3  |                                        256 x 128    128 x 128
//     m128 |  4  |  5  |             tensor cores                     256          256
//     m192 |  6  |  7  |             shared memory, read + written    192 + 64     192 + 96
//          +-----+-----+             L2                               210          310
//
// No single one of them is far ahead of the others, so everything must go on at once: see `Fragments`.

#include "rtlynx/params.cuh"
#include "rtlynx/ptx/mma_sp.cuh"
#include "rtlynx/tile_sm80.cuh"

namespace rtlynx {
namespace {

template <class T_, int kBM_, int kBN_, int kWarpsM, int kWarpsN_, int kStages_>
struct Tile {
  using T = T_;
  static constexpr int kBM = kBM_, kBN = kBN_, kStages = kStages_;
  static constexpr int kWarpsN = kWarpsN_, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = kBM / kWarpsM, kWarpN = kBN / kWarpsN;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kABytes = kBM * kBK;  // kBK / 2 values of 2 bytes a row
  static constexpr int kBBytes = kBN * kBK * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
};

// Byte offset of 16-byte chunk `chunk` of row `row` of A, in rows of 64 bytes; swizzled like the 128-byte rows of W.
__device__ __forceinline__ uint32_t swizzled_a(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }

// A row-major matrix that goes to shared memory in stages of kRowChunks chunks a row; a request of all threads brings kRowStep rows. Rows
// past the end repeat the last one: what becomes of them is never stored, and a smaller row number is cheaper than a predicate.
template <int kRowChunks, int kThreads>
struct RowSource {
  static constexpr int kRowStep = kThreads / kRowChunks;
  const uint8_t* source;      // this thread's chunk of the first row
  int twice_row, twice_last;  // 2 bytes an element: the product with the stride is then one instruction
  uint32_t stride;

  __device__ __forceinline__ RowSource(const void* matrix, int rows, int stride, int row0)
      : source(static_cast<const uint8_t*>(matrix) + (static_cast<int64_t>(row0) * stride + threadIdx.x % kRowChunks * kChunk) * 2),
        twice_row(threadIdx.x / kRowChunks * 2),
        twice_last(2 * (rows - 1 - row0)),
        stride(stride) {}

  // Rows from i * kRowStep on, if wanted; `target` is this thread's place in the first of a stage's rows.
  __device__ __forceinline__ void request(int i, uint32_t target, bool wanted) const {
    const uint32_t row = min(twice_row + 2 * i * kRowStep, twice_last);
    ptx::cp_async_16_if(target + i * kRowStep * kRowChunks * 16, source + static_cast<uint64_t>(row) * stride, wanted);
  }
};

// What this thread brings to a stage, in kRequests requests of 16 bytes.
template <class Config>
struct StageSource {
  static constexpr int kAChunks = kBK / 2 / kChunk, kBChunks = kBK / kChunk;
  static constexpr int kARequests = Config::kBM * kAChunks / Config::kThreads;
  static constexpr int kRequests = kARequests + Config::kBN * kBChunks / Config::kThreads;
  RowSource<kAChunks, Config::kThreads> a;
  RowSource<kBChunks, Config::kThreads> b;
  uint32_t place_a, place_b;  // of the first chunk of A and W in a stage

  __device__ __forceinline__ StageSource(const SpmmParams& p, TileOrigin origin)
      : a(p.values, p.m, p.k / 2, origin.m),
        b(p.weight, p.n, p.k, origin.n),
        place_a(swizzled_a(threadIdx.x / kAChunks, threadIdx.x % kAChunks)),
        place_b(Config::kABytes + swizzled_128(threadIdx.x / kBChunks, threadIdx.x % kBChunks)) {}

  __device__ __forceinline__ void request(int i, uint32_t stage, bool wanted) const {
    if (i < kARequests) {
      a.request(i, stage + place_a, wanted);
    } else {
      b.request(i - kARequests, stage + place_b, wanted);
    }
  }

  // On to the next stage.
  __device__ __forceinline__ void advance() { a.source += kBK, b.source += kBK * 2; }
};

// The metadata words of the warp's m16 tiles, loaded for 256 dense columns at a time, a block ahead.
template <class Config>
struct Metadata {
  static_assert(kPaddedRows % Config::kWarpM == 0, "a warp's rows are all described or none");
  const uint4* source;
  int64_t stride;  // from one block of columns to the next
  uint4 words[Config::kTilesM], next[Config::kTilesM];

  // Warps past the padded rows repeat the last ones: their products are never stored.
  __device__ __forceinline__ Metadata(const SpmmParams& p, int row) {
    const int padded_m = padded_rows(p.m), lane = threadIdx.x % 32;
    source = reinterpret_cast<const uint4*>(p.metadata + metadata_index(min(row, padded_m - Config::kWarpM), 0, lane, p.m));
    stride = padded_m / kTileRows * 32;
    load();
  }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) next[i] = __ldg(source + 32 * i);
    source += stride;
  }

  // Makes `words[i].x` the words of the stage at k0. Selects instead of branching, so that products go on meanwhile.
  __device__ __forceinline__ void advance(int k0, int k) {
    const bool fresh = k0 % kBlockCols == 0;
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
      words[i] = {fresh ? next[i].x : words[i].y, fresh ? next[i].y : words[i].z, fresh ? next[i].z : words[i].w, next[i].w};
    }
    if (fresh && k0 + kBlockCols < k) load();
  }
};

// Fragments on their way from shared memory to the tensor cores, also from one stage to the next: the products after a barrier need nothing
// that is read behind it.
//
//   half of a stage             0                               1
//   n8 column of the warp       0   1   2   3  ..   6   7       0   1  ..
//   multiply                   b0  b1  b2  b3      b6  b7      b0  b1        of this half
//   read W, kAhead ahead       b3  b4  b5  b6      b1  b2      b3  b4        from column kTilesN - kAhead on of the next half
//   read A                     a0  a1  a2  a3                  a0  a1        of the next half
template <class Config>
struct Fragments {
  static constexpr int kAhead = 3, kColumns = 2 * Config::kTilesN;  // columns of both halves
  static_assert(kColumns % (kAhead + 1) == 0 && kAhead < Config::kTilesN && Config::kTilesM <= Config::kTilesN);
  uint32_t a[2][Config::kTilesM][4], b[kAhead + 1][4];
  uint32_t place_a, place_b;  // what this lane points ldmatrix at, of half 0

  __device__ __forceinline__ Fragments() {
    const int lane = threadIdx.x % 32;
    const WarpOrigin warp = warp_origin<Config>();
    place_a = swizzled_a(warp.m + lane % 16, lane / 16);
    place_b = Config::kABytes + swizzled_128(warp.n + lane % 8, lane / 8);
  }
  __device__ __forceinline__ void load_a(int half, int i, uint32_t stage) {
    ptx::ldmatrix_x4(a[half][i], stage + (place_a ^ 32 * half) + i * 16 * 64);
  }
  __device__ __forceinline__ void load_b(int column, uint32_t stage) {
    const int half = column / Config::kTilesN, j = column % Config::kTilesN;
    ptx::ldmatrix_x4(b[column % (kAhead + 1)], stage + (place_b ^ 64 * half) + j * 8 * 128);
  }
  // What must be there before the first column.
  __device__ __forceinline__ void begin(uint32_t stage) {
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) load_a(0, i, stage);
#pragma unroll
    for (int column = 0; column < kAhead; ++column) load_b(column, stage);
  }
};

template <class Config>
__device__ __forceinline__ void spmm(const SpmmParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  static_assert(Config::kBM * (Config::kBN * 2 + 16) <= Config::kStages * Config::kStageBytes, "the output tile reuses the stages");
  static_assert((Config::kBM + Config::kBN) * (128 * 2 + 16) <= Config::kStages * Config::kStageBytes, "so does a branch of rank 128");
  const uint32_t ring = ptx::shared_address(shared);
  const TileOrigin origin = tile_origin<Config>(p.m, p.n, blockIdx.x);
  const int warp_row = origin.m + warp_origin<Config>().m;
  const int steps = p.k / kBK;

  Accumulators<Config> acc = {};
  StageSource<Config> source(p, origin);
  Metadata<Config> metadata(p, warp_row);
  Fragments<Config> fragments;
  constexpr int kColumns = fragments.kColumns, kTilesN = Config::kTilesN;

#pragma unroll
  for (int s = 0; s < Config::kStages - 1; ++s) {
#pragma unroll
    for (int i = 0; i < source.kRequests; ++i) source.request(i, ring + s * Config::kStageBytes, s < steps);
    ptx::cp_async_commit();
    source.advance();
  }
  ptx::cp_async_wait<Config::kStages - 2>();
  __syncthreads();
  fragments.begin(ring);
  metadata.advance(0, p.k);

  // Invariant at the top of step s: stages up to s + kStages - 2 have been requested, one commit group each (empty past the end); stage s
  // is there, and the fragments of its first columns are on their way.
  uint32_t stage = ring, free_stage = ring + (Config::kStages - 1) * Config::kStageBytes;
  for (int s = 0; s < steps; ++s) {
    const uint32_t next = stage == ring + (Config::kStages - 1) * Config::kStageBytes ? ring : stage + Config::kStageBytes;
    const bool more = s + Config::kStages - 1 < steps;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      const int half = column / kTilesN, j = column % kTilesN;
      if (column == kTilesN) {
        ptx::cp_async_wait<Config::kStages - 3>();
        __syncthreads();  // stage s + 1 is filled for all (past the end it is anything, read and not used); all are done reading s - 1
      }
      const int ahead = column + fragments.kAhead;
      fragments.load_b(ahead % kColumns, ahead < kColumns ? stage : next);
      if (j < Config::kTilesM) fragments.load_a(1 - half, j, half == 0 ? stage : next);
      if (half == 1) {
#pragma unroll
        for (int i = j * source.kRequests / kTilesN; i < (j + 1) * source.kRequests / kTilesN; ++i) source.request(i, free_stage, more);
      }
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) {
        const auto& b = fragments.b[column % (fragments.kAhead + 1)];
        if (half == 0) {
          ptx::mma_sp_m16n8k32<0>(typename Config::T{}, acc[i][j], fragments.a[0][i], b, metadata.words[i].x);
        } else {
          ptx::mma_sp_m16n8k32<1>(typename Config::T{}, acc[i][j], fragments.a[1][i], b, metadata.words[i].x);
        }
      }
    }
    ptx::cp_async_commit();
    source.advance();
    metadata.advance((s + 1) * kBK, p.k);
    free_stage = stage;
    stage = next;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring is free for the epilogue

  if (p.rank > 0) load_branch<Config>({p.branch, p.comp_up, p.m, p.n, p.rank}, origin, ring);  // arrives while rows are scaled
  if (p.row_scale) {
    float scale[Config::kTilesM][2];
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * i + threadIdx.x % 32 / 4 + 8 * half;
        scale[i][half] = row < p.m ? __ldg(p.row_scale + row) : 0.0f;
      }
    }
    scale_rows<Config>(scale, acc);
  }
  if (p.rank > 0) {
    add_branch<Config>(p.rank, ring, acc);
    __syncthreads();  // the branch tiles are read; the output tile takes their place
  }
  store_tile<Config>({p.out, p.bias, p.m, p.n}, origin, shared, acc, [&](const auto& pieces, auto& y) {
    if (has_epilogue(p)) finish_pieces<typename Config::T>(p, pieces, y);
  });
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_SPMM(type, T, bm, bn, warps_m, warps_n, stages, blocks)                              \
  extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, blocks)                      \
      spmm_sm80_##type##_##bm##x##bn##x64_s##stages(const __grid_constant__ rtlynx::SpmmParams p) { \
    rtlynx::spmm<rtlynx::Tile<rtlynx::T, bm, bn, warps_m, warps_n, stages>>(p);                     \
  }
#define RTLYNX_SPMM_TYPES(bm, bn, warps_m, warps_n, stages, blocks) \
  RTLYNX_SPMM(bf16, Bf16, bm, bn, warps_m, warps_n, stages, blocks) \
  RTLYNX_SPMM(f16, F16, bm, bn, warps_m, warps_n, stages, blocks)

RTLYNX_SPMM_TYPES(256, 128, 4, 2, 4, 1)
RTLYNX_SPMM_TYPES(128, 128, 2, 2, 4, 2)
RTLYNX_SPMM_TYPES(128, 64, 2, 2, 4, 2)
RTLYNX_SPMM_TYPES(64, 64, 2, 2, 4, 2)
