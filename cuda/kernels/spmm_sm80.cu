// spmm_sm80: Y = row_scale · (S(X) · W^T) + branch · comp_up^T + bias with mma.sp, for every GPU from Ampere on.
//
// A block computes a kBM x kBN tile of Y with 4 warps (2 x 2). Compressed A and dense W stream through a ring of kStages shared-memory stages
// of 64 dense columns, filled by cp.async; the metadata (1/16 of the bytes) goes straight to registers one stage ahead.
//
//   for each 64 dense columns                      then, in the same accumulators
//     A  kBM x 32 values   64-byte rows              acc *= row_scale
//     W  kBN x 64          128-byte rows             acc += branch · comp_up^T      rank dense columns, m16n8k16
//     acc += A · W^T       2 x m16n8k32 deep         acc += bias                    store through shared memory, 16 bytes a thread
//
// Shared-memory rows are swizzled in 16-byte chunks so that the 8 rows an ldmatrix reads fall into different banks.

#include "rtlynx/element.cuh"
#include "rtlynx/format.cuh"
#include "rtlynx/params.cuh"
#include "rtlynx/ptx/cp_async.cuh"
#include "rtlynx/ptx/ldmatrix.cuh"
#include "rtlynx/ptx/mma.cuh"
#include "rtlynx/ptx/mma_sp.cuh"

namespace rtlynx {
namespace {

constexpr int kThreads = 128;
constexpr int kBK = kWordCols;  // dense columns of a stage: one metadata word
constexpr int kChunk = 8;       // elements of a 16-byte chunk
constexpr int kGroupM = 8;      // tile rows that share their columns of W in L2 before the next columns come

template <class T_, int kBM_, int kBN_, int kStages_>
struct Tile {
  using T = T_;
  static constexpr int kBM = kBM_, kBN = kBN_, kStages = kStages_;
  static constexpr int kWarpM = kBM / 2, kWarpN = kBN / 2;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kABytes = kBM * kBK;  // kBK / 2 values of 2 bytes a row
  static constexpr int kBBytes = kBN * kBK * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
};

// Byte offset of 16-byte chunk `chunk` of row `row`: 64-byte rows of A (4 chunks), 128-byte rows of W (8 chunks).
__device__ __forceinline__ uint32_t swizzled_a(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }
__device__ __forceinline__ uint32_t swizzled_b(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

// Which tile of Y this block computes: down kGroupM tile rows first, then to the next tile column, so that blocks running together share
// both operands in L2.
struct TileOrigin {
  int m, n;
};
template <class Config>
__device__ __forceinline__ TileOrigin tile_origin(const SpmmParams& p) {
  const int tiles_m = (p.m + Config::kBM - 1) / Config::kBM, tiles_n = (p.n + Config::kBN - 1) / Config::kBN;
  const int index = blockIdx.x, group = index / (kGroupM * tiles_n), first = group * kGroupM;
  const int rows = min(kGroupM, tiles_m - first), within = index - group * kGroupM * tiles_n;
  return {(first + within % rows) * Config::kBM, within / rows * Config::kBN};
}

template <class Config>
__device__ __forceinline__ void load_stage(const SpmmParams& p, TileOrigin origin, int k0, uint32_t stage) {
  const auto* values = static_cast<const uint16_t*>(p.values);
  const auto* weight = static_cast<const uint16_t*>(p.weight);
#pragma unroll
  for (int i = 0; i < Config::kABytes / 16 / kThreads; ++i) {
    const int chunk_index = i * kThreads + threadIdx.x, row = chunk_index / 4, chunk = chunk_index % 4;
    const bool valid = origin.m + row < p.m;
    const int64_t offset = valid ? static_cast<int64_t>(origin.m + row) * (p.k / 2) + k0 / 2 + chunk * kChunk : 0;
    ptx::cp_async_16(stage + swizzled_a(row, chunk), values + offset, valid);
  }
#pragma unroll
  for (int i = 0; i < Config::kBBytes / 16 / kThreads; ++i) {
    const int chunk_index = i * kThreads + threadIdx.x, row = chunk_index / 8, chunk = chunk_index % 8;
    const bool valid = origin.n + row < p.n;
    const int64_t offset = valid ? static_cast<int64_t>(origin.n + row) * p.k + k0 + chunk * kChunk : 0;
    ptx::cp_async_16(stage + Config::kABytes + swizzled_b(row, chunk), weight + offset, valid);
  }
}

// The metadata words of the warp's m16 tiles for 64 dense columns; tiles past the padded rows take the padding word.
template <class Config>
__device__ __forceinline__ void load_metadata(const SpmmParams& p, int row, int k0, uint32_t (&words)[Config::kTilesM]) {
  const int padded_m = padded_rows(p.m);
#pragma unroll
  for (int i = 0; i < Config::kTilesM; ++i) {
    const int tile_row = row + 16 * i;
    words[i] = tile_row < padded_m ? __ldg(p.metadata + metadata_index(tile_row, k0, threadIdx.x % 32, p.m)) : kPaddingWord;
  }
}

template <class Config>
using Accumulators = float[Config::kTilesM][Config::kTilesN][4];

// acc += A · W^T for 32 dense columns of a stage: half 0 reads the metadata of lanes 0 and 1 of a quad, half 1 that of lanes 2 and 3.
template <class Config, int kHalf>
__device__ __forceinline__ void multiply_half(uint32_t stage, const uint32_t (&metadata)[Config::kTilesM], Accumulators<Config>& acc) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / 2 * Config::kWarpM, warp_n = warp % 2 * Config::kWarpN;
  uint32_t a[Config::kTilesM][4];
#pragma unroll
  for (int i = 0; i < Config::kTilesM; ++i) {
    ptx::ldmatrix_x4(a[i], stage + swizzled_a(warp_m + 16 * i + lane % 16, 2 * kHalf + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < Config::kTilesN; ++j) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, stage + Config::kABytes + swizzled_b(warp_n + 8 * j + lane % 8, 4 * kHalf + lane / 8));
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) ptx::mma_sp_m16n8k32<kHalf>(typename Config::T{}, acc[i][j], a[i], b, metadata[i]);
  }
}

// acc += branch · comp_up^T. Both tiles are staged in shared memory, their rows padded by one chunk against bank conflicts.
template <class Config>
__device__ __forceinline__ void add_branch(const SpmmParams& p, TileOrigin origin, uint32_t shared, Accumulators<Config>& acc) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / 2 * Config::kWarpM, warp_n = warp % 2 * Config::kWarpN;
  const int chunks = p.rank / kChunk, row_bytes = p.rank * 2 + 16;
  const uint32_t shared_up = shared + Config::kBM * row_bytes;
  const auto* branch = static_cast<const uint16_t*>(p.branch);
  const auto* comp_up = static_cast<const uint16_t*>(p.comp_up);

  for (int i = threadIdx.x; i < (Config::kBM + Config::kBN) * chunks; i += kThreads) {
    const int row = i / chunks, chunk = i % chunks;
    const bool of_branch = row < Config::kBM;
    const int source_row = of_branch ? origin.m + row : origin.n + row - Config::kBM;
    const bool valid = source_row < (of_branch ? p.m : p.n);
    const int64_t offset = valid ? static_cast<int64_t>(source_row) * p.rank + chunk * kChunk : 0;
    ptx::cp_async_16(shared + row * row_bytes + chunk * 16, (of_branch ? branch : comp_up) + offset, valid);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  for (int k0 = 0; k0 < p.rank; k0 += 16) {
    uint32_t a[Config::kTilesM][4];
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
      ptx::ldmatrix_x4(a[i], shared + (warp_m + 16 * i + lane % 16) * row_bytes + k0 * 2 + lane / 16 * 16);
    }
#pragma unroll
    for (int j = 0; j < Config::kTilesN; j += 2) {
      uint32_t b[4];  // two n8 tiles: matrices (rows 0-7, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 0-7), (rows 8-15, k 8-15)
      ptx::ldmatrix_x4(b, shared_up + (warp_n + 8 * j + lane / 16 * 8 + lane % 8) * row_bytes + k0 * 2 + lane / 8 % 2 * 16);
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) {
        ptx::mma_m16n8k16(typename Config::T{}, acc[i][j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16(typename Config::T{}, acc[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// Rounds once and stores the tile through shared memory, so that every global store is 16 bytes of a full row segment.
template <class Config>
__device__ __forceinline__ void store_tile(const SpmmParams& p, TileOrigin origin, uint8_t* shared, const Accumulators<Config>& acc) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const int warp_m = warp / 2 * Config::kWarpM, warp_n = warp % 2 * Config::kWarpN;
  constexpr int kRowBytes = Config::kBN * 2 + 16;
  const auto* bias = static_cast<const uint16_t*>(p.bias);
#pragma unroll
  for (int j = 0; j < Config::kTilesN; ++j) {
    const int column = warp_n + 8 * j + 2 * q;
    float2 b = {};
    if (bias && origin.n + column < p.n) b = Config::T::unpack(__ldg(reinterpret_cast<const uint32_t*>(bias + origin.n + column)));
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_m + 16 * i + g + 8 * half;
        *reinterpret_cast<uint32_t*>(shared + row * kRowBytes + column * 2) =
            Config::T::pack(acc[i][j][2 * half] + b.x, acc[i][j][2 * half + 1] + b.y);
      }
    }
  }
  __syncthreads();
  constexpr int kRowChunks = Config::kBN / kChunk;
  for (int i = threadIdx.x; i < Config::kBM * kRowChunks; i += kThreads) {
    const int row = i / kRowChunks, chunk = i % kRowChunks;
    if (origin.m + row < p.m && origin.n + chunk * kChunk < p.n) {
      auto* target = static_cast<uint16_t*>(p.out) + static_cast<int64_t>(origin.m + row) * p.n + origin.n + chunk * kChunk;
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(shared + row * kRowBytes + chunk * 16);
    }
  }
}

template <class Config>
__device__ __forceinline__ void spmm(const SpmmParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  static_assert(Config::kBM * (Config::kBN * 2 + 16) <= Config::kStages * Config::kStageBytes, "the output tile reuses the stages");
  static_assert((Config::kBM + Config::kBN) * (128 * 2 + 16) <= Config::kStages * Config::kStageBytes, "so does a branch of rank 128");
  const uint32_t ring = ptx::shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const TileOrigin origin = tile_origin<Config>(p);
  const int warp_row = origin.m + warp / 2 * Config::kWarpM;
  const int steps = p.k / kBK;

  Accumulators<Config> acc = {};
  uint32_t metadata[Config::kTilesM], next_metadata[Config::kTilesM];

  // Invariant at the top of step s: stages s .. s + kStages - 2 have been requested, one commit group each (empty past the end).
#pragma unroll
  for (int s = 0; s < Config::kStages - 1; ++s) {
    if (s < steps) load_stage<Config>(p, origin, s * kBK, ring + s * Config::kStageBytes);
    ptx::cp_async_commit();
  }
  load_metadata<Config>(p, warp_row, 0, next_metadata);

  int stage = 0, free_stage = Config::kStages - 1;
  for (int s = 0; s < steps; ++s) {
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) metadata[i] = next_metadata[i];
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();  // stage s is filled for all; all are done reading the stage that is refilled now
    if (s + Config::kStages - 1 < steps) {
      load_stage<Config>(p, origin, (s + Config::kStages - 1) * kBK, ring + free_stage * Config::kStageBytes);
    }
    ptx::cp_async_commit();
    if (s + 1 < steps) load_metadata<Config>(p, warp_row, (s + 1) * kBK, next_metadata);
    multiply_half<Config, 0>(ring + stage * Config::kStageBytes, metadata, acc);
    multiply_half<Config, 1>(ring + stage * Config::kStageBytes, metadata, acc);
    free_stage = stage;
    stage = stage + 1 == Config::kStages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring is free for the epilogue

  if (p.row_scale) {
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
      const int row = warp_row + 16 * i + lane / 4;
      const float low = row < p.m ? __ldg(p.row_scale + row) : 0.0f;
      const float high = row + 8 < p.m ? __ldg(p.row_scale + row + 8) : 0.0f;
#pragma unroll
      for (int j = 0; j < Config::kTilesN; ++j) {
        acc[i][j][0] *= low, acc[i][j][1] *= low;
        acc[i][j][2] *= high, acc[i][j][3] *= high;
      }
    }
  }
  if (p.rank > 0) {
    add_branch<Config>(p, origin, ring, acc);
    __syncthreads();  // the branch tiles are read; the output tile takes their place
  }
  store_tile<Config>(p, origin, shared, acc);
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_SPMM(type, T, bm, bn, stages)                                                        \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, 2)                                 \
      spmm_sm80_##type##_##bm##x##bn##x64_s##stages(const __grid_constant__ rtlynx::SpmmParams p) { \
    rtlynx::spmm<rtlynx::Tile<rtlynx::T, bm, bn, stages>>(p);                                       \
  }
#define RTLYNX_SPMM_TYPES(bm, bn, stages) \
  RTLYNX_SPMM(bf16, Bf16, bm, bn, stages) \
  RTLYNX_SPMM(f16, F16, bm, bn, stages)

RTLYNX_SPMM_TYPES(128, 128, 4)
RTLYNX_SPMM_TYPES(128, 64, 4)
RTLYNX_SPMM_TYPES(64, 64, 4)
