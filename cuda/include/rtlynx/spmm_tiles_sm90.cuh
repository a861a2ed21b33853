// The output tiles of spmm_sm90, and what feeds them: the shared memory of a stage, the order of the tiles, the warp that copies.
//
//   rows x columns of Y    256 x 192       192 x 192, 192 x 160       128 x 192, 128 x 128
//   consumer warpgroups    2               3                          2
//   m64 tiles of each      2               1                          1
//   stages                 5               6                          7, 8
//
// The largest multiplies most in a microsecond, since W is read least often for it. The others leave less of the last wave empty.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "rtlynx/element.cuh"
#include "rtlynx/format.cuh"
#include "rtlynx/params.cuh"
#include "rtlynx/ptx/mbarrier.cuh"
#include "rtlynx/ptx/tma.cuh"

namespace rtlynx {

constexpr int kRowBytes = 128;     // of W in a stage
constexpr int kRankStep = 32;      // columns of the branch in a stage
constexpr int kGroupTiles = 16;    // most tile rows that share their columns of W in L2 before the next columns come
constexpr int kRegisters = 65536;  // of a multiprocessor
constexpr int kProducerRegisters = 24;

// What depends on the element types and the shape of a tile.
template <class T_, class Operand_, int kBM_, int kBN_, int kConsumers_, int kStages_, bool kEpilogue_>
struct Tile {
  using T = T_;
  using Operand = Operand_;  // of the sparse product
  static constexpr int kBM = kBM_, kBN = kBN_, kConsumers = kConsumers_, kStages = kStages_;
  static constexpr bool kEpilogue = kEpilogue_;  // whether there is one (epilogue.cuh)
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kConsumerRegisters = (kRegisters / 128 - kProducerRegisters) / kConsumers / 8 * 8;  // of a thread
  static constexpr int kTilesM = kBM / kConsumers / 64;                                                    // m64 tiles of a warpgroup
  static constexpr int kBK = kRowBytes / kBytesOf<Operand>;                                                // dense columns of a stage
  static constexpr int kWords = kBK / kWordCols;                                                           // metadata words of a stage
  static constexpr int kBlocksN = kBN / 8;                                                                 // n8 blocks of a fragment
  static constexpr uint32_t kABytes = kBM * kRowBytes / 2;
  static constexpr uint32_t kStageBytes = kABytes + kBN * kRowBytes;
  static constexpr uint32_t kBranchBytes = (kBM + kBN) * kRankStep * 2;
  using Accumulators = float[kTilesM][kBN / 2];
};

// The position in the ring and the parity of its current phase.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The ring of stages, then its barriers.
template <class Config>
struct Shared {
  uint32_t base;
  __device__ __forceinline__ uint32_t a(int stage) const { return base + stage * Config::kStageBytes; }
  __device__ __forceinline__ uint32_t w(int stage) const { return a(stage) + Config::kABytes; }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + Config::kStages * Config::kStageBytes + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + Config::kStages * 8; }
};

struct TileOrigin {
  int m, n;
};

template <class Config>
__device__ __forceinline__ int tile_count(const SpmmSm90Params& p) {
  return (p.m + Config::kBM - 1) / Config::kBM * ((p.n + Config::kBN - 1) / Config::kBN);
}

__device__ __forceinline__ int branch_stages(const SpmmSm90Params& p) { return (p.rank + kRankStep - 1) / kRankStep; }

// Down the rows of a group first, then to the next tile column: blocks running together share both operands in L2. Neighbours in this order start in
// the same GPC, as long as nothing else is on the GPU; scattered over all of it they take up to a tenth longer. Groups are equally high but for the last.
template <class Config>
__device__ __forceinline__ TileOrigin tile_origin(const SpmmSm90Params& p, int index) {
  const int tiles_m = (p.m + Config::kBM - 1) / Config::kBM, tiles_n = (p.n + Config::kBN - 1) / Config::kBN;
  const int groups = (tiles_m + kGroupTiles - 1) / kGroupTiles, height = (tiles_m + groups - 1) / groups;
  const int group = index / (height * tiles_n), first = group * height;
  const int rows = min(height, tiles_m - first), within = index - first * tiles_n;
  return {(first + within % rows) * Config::kBM, within / rows * Config::kBN};
}

// The last may reach past K: what is read there is zeros, and padding in the metadata.
template <class Config>
__device__ __forceinline__ int stages_of_k(const SpmmSm90Params& p) {
  return (p.k + Config::kBK - 1) / Config::kBK;
}

template <class Config>
__device__ __forceinline__ void produce(const SpmmSm90Params& p, Shared<Config> shared) {
  const int steps = stages_of_k<Config>(p);
  Ring<Config::kStages> ring;
  for (int tile = blockIdx.x; tile < tile_count<Config>(p); tile += gridDim.x) {
    const TileOrigin origin = tile_origin<Config>(p, tile);
    for (int s = 0; s < steps + branch_stages(p); ++s) {
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      const uint32_t full = shared.full(ring.stage);
      if (s < steps) {
        ptx::mbarrier_arrive_expect(full, Config::kStageBytes);
        ptx::tma_load_2d(shared.a(ring.stage), p.values, s * Config::kBK / 2, origin.m, full);
        ptx::tma_load_2d(shared.w(ring.stage), p.weight, s * Config::kBK, origin.n, full);
      } else {
        ptx::mbarrier_arrive_expect(full, Config::kBranchBytes);
        ptx::tma_load_2d(shared.a(ring.stage), p.branch, (s - steps) * kRankStep, origin.m, full);
        ptx::tma_load_2d(shared.w(ring.stage), p.comp_up, (s - steps) * kRankStep, origin.n, full);
      }
      ring.advance();
    }
  }
}

}  // namespace rtlynx
