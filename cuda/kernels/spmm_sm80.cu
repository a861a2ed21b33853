// spmm_sm80: Y = row_scale · (S(X) · W^T) + branch · comp_up^T + bias with mma.sp, for every GPU from Ampere on.
//
// A block computes a kBM x kBN tile of Y with 4 warps (2 x 2). Compressed A and dense W stream through a ring of kStages shared-memory stages
// of 64 dense columns, filled by cp.async; the metadata (1/16 of the bytes) goes straight to registers one stage ahead.
//
//   for each 64 dense columns                      then, in the same accumulators
//     A  kBM x 32 values   64-byte rows              acc *= row_scale
//     W  kBN x 64          128-byte rows             acc += branch · comp_up^T      rank dense columns, m16n8k16
//     acc += A · W^T       2 x m16n8k32 deep         acc += bias                    store through shared memory, 16 bytes a thread

#include "rtlynx/params.cuh"
#include "rtlynx/ptx/mma_sp.cuh"
#include "rtlynx/tile_sm80.cuh"

namespace rtlynx {
namespace {

template <class T_, int kBM_, int kBN_, int kStages_>
struct Tile {
  using T = T_;
  static constexpr int kBM = kBM_, kBN = kBN_, kStages = kStages_;
  static constexpr int kWarpsN = 2;
  static constexpr int kWarpM = kBM / 2, kWarpN = kBN / 2;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kABytes = kBM * kBK;  // kBK / 2 values of 2 bytes a row
  static constexpr int kBBytes = kBN * kBK * 2;
  static constexpr int kStageBytes = kABytes + kBBytes;
};

// Byte offset of 16-byte chunk `chunk` of row `row` of A, in rows of 64 bytes; swizzled like the 128-byte rows of W.
__device__ __forceinline__ uint32_t swizzled_a(int row, int chunk) { return row * 64 + (chunk ^ (row >> 1 & 3)) * 16; }

template <class Config>
__device__ __forceinline__ void load_stage(const SpmmParams& p, TileOrigin origin, int k0, uint32_t stage) {
  const auto* values = static_cast<const uint16_t*>(p.values);
#pragma unroll
  for (int i = 0; i < Config::kABytes / 16 / kTileThreads; ++i) {
    const int chunk_index = i * kTileThreads + threadIdx.x, row = chunk_index / 4, chunk = chunk_index % 4;
    const bool valid = origin.m + row < p.m;
    const int64_t offset = valid ? static_cast<int64_t>(origin.m + row) * (p.k / 2) + k0 / 2 + chunk * kChunk : 0;
    ptx::cp_async_16(stage + swizzled_a(row, chunk), values + offset, valid);
  }
  load_rows<Config::kBN>(p.weight, p.n, p.k, origin.n, k0, stage + Config::kABytes);
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

// acc += A · W^T for 32 dense columns of a stage: half 0 reads the metadata of lanes 0 and 1 of a quad, half 1 that of lanes 2 and 3.
template <class Config, int kHalf>
__device__ __forceinline__ void multiply_half(uint32_t stage, const uint32_t (&metadata)[Config::kTilesM], Accumulators<Config>& acc) {
  const int lane = threadIdx.x % 32;
  const WarpOrigin warp = warp_origin<Config>();
  uint32_t a[Config::kTilesM][4];
#pragma unroll
  for (int i = 0; i < Config::kTilesM; ++i) {
    ptx::ldmatrix_x4(a[i], stage + swizzled_a(warp.m + 16 * i + lane % 16, 2 * kHalf + lane / 16));
  }
#pragma unroll
  for (int j = 0; j < Config::kTilesN; ++j) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, stage + Config::kABytes + swizzled_128(warp.n + 8 * j + lane % 8, 4 * kHalf + lane / 8));
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) ptx::mma_sp_m16n8k32<kHalf>(typename Config::T{}, acc[i][j], a[i], b, metadata[i]);
  }
}

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
    add_branch<Config>({p.branch, p.comp_up, p.m, p.n, p.rank}, origin, ring, acc);
    __syncthreads();  // the branch tiles are read; the output tile takes their place
  }
  store_tile<Config>({p.out, p.bias, p.m, p.n}, origin, shared, acc);
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_SPMM(type, T, bm, bn, stages)                                                        \
  extern "C" __global__ void __launch_bounds__(rtlynx::kTileThreads, 2)                             \
      spmm_sm80_##type##_##bm##x##bn##x64_s##stages(const __grid_constant__ rtlynx::SpmmParams p) { \
    rtlynx::spmm<rtlynx::Tile<rtlynx::T, bm, bn, stages>>(p);                                       \
  }
#define RTLYNX_SPMM_TYPES(bm, bn, stages) \
  RTLYNX_SPMM(bf16, Bf16, bm, bn, stages) \
  RTLYNX_SPMM(f16, F16, bm, bn, stages)

RTLYNX_SPMM_TYPES(128, 128, 4)
RTLYNX_SPMM_TYPES(128, 64, 4)
RTLYNX_SPMM_TYPES(64, 64, 4)
