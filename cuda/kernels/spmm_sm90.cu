// spmm_sm90: Y = row_scale · (S(X) · W^T) + branch · comp_up^T + bias with wgmma.sp, for Hopper.
//
// A persistent block computes 256 x 192 tiles of Y. Warpgroup 0 produces: one thread copies stages of 64 dense columns by TMA, as far ahead as
// the ring is deep, across tile boundaries. Warpgroups 1 and 2 consume: each owns 128 rows, two m64 tiles.
//
//                     stage (40 KB)                     per warpgroup and stage
//   A   256 rows x 32 values, 64-byte rows, SW64        2 m64 tiles x 2 k-steps of wgmma.sp m64n192k32
//   W   192 rows x 64,       128-byte rows, SW128
//
// After K come ⌈rank / 32⌉ stages of the branch: 256 x 32 of `branch`, 192 x 32 of `comp_up`, both SW64, dense m64n192k16 steps into the same
// accumulators, which the row scale has multiplied by then. The metadata goes straight to registers, a stage ahead: 1/16 of the bytes.
//
// Why 256 x 192 with both operands in shared memory: wgmma.sp reads W at the full shared-memory bandwidth, so what else is written and read
// there decides, and tall tiles write W least often per product (docs/kernels.md).

#include "rtlynx/element.cuh"
#include "rtlynx/format.cuh"
#include "rtlynx/params.cuh"
#include "rtlynx/ptx/cp_async.cuh"
#include "rtlynx/ptx/load.cuh"
#include "rtlynx/ptx/mbarrier.cuh"
#include "rtlynx/ptx/registers.cuh"
#include "rtlynx/ptx/tma.cuh"
#include "rtlynx/ptx/wgmma.cuh"

namespace rtlynx {
namespace {

constexpr int kBM = 256, kBN = 192, kBK = kWordCols, kStages = 5;
constexpr int kRankStep = 32;  // columns of the branch in a stage
constexpr int kConsumers = 2;  // warpgroups
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kTilesM = kBM / kConsumers / 64;  // m64 tiles of a warpgroup
constexpr int kGroupM = 16;                     // tile rows that share their columns of W in L2 before the next columns come

constexpr uint32_t kABytes = kBM * kBK;  // half of the columns, 2 bytes each
constexpr uint32_t kWBytes = kBN * kBK * 2;
constexpr uint32_t kStageBytes = kABytes + kWBytes;
constexpr uint32_t kBranchBytes = (kBM + kBN) * kRankStep * 2;

constexpr int kStoreCols = 96;                       // columns staged at a time for the store
constexpr uint32_t kStoreRow = kStoreCols * 2 + 16;  // padded, so that rows g = 0..7 of a store fall into different banks
constexpr uint32_t kStoreBytes = 64 * kStoreRow;     // of one warpgroup

constexpr uint32_t kStoreOffset = kStages * kStageBytes;
constexpr uint32_t kBarrierOffset = kStoreOffset + kConsumers * kStoreBytes;
constexpr uint32_t kSharedBytes = kBarrierOffset + 2 * kStages * 8;
static_assert(kSharedBytes <= 232448, "the shared memory of a block on sm_90");

// The position in the ring and the parity of its current phase.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Shared {
  uint32_t base;
  __device__ __forceinline__ uint32_t a(int stage) const { return base + stage * kStageBytes; }
  __device__ __forceinline__ uint32_t w(int stage) const { return a(stage) + kABytes; }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + kBarrierOffset + stage * 8; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + kStages * 8; }
};

struct TileOrigin {
  int m, n;
};

__device__ __forceinline__ int tile_count(const SpmmSm90Params& p) { return (p.m + kBM - 1) / kBM * ((p.n + kBN - 1) / kBN); }

// Down kGroupM tile rows first, then to the next tile column: blocks running together share both operands in L2.
__device__ __forceinline__ TileOrigin tile_origin(const SpmmSm90Params& p, int index) {
  const int tiles_m = (p.m + kBM - 1) / kBM, tiles_n = (p.n + kBN - 1) / kBN;
  const int group = index / (kGroupM * tiles_n), first = group * kGroupM;
  const int rows = min(kGroupM, tiles_m - first), within = index - group * kGroupM * tiles_n;
  return {(first + within % rows) * kBM, within / rows * kBN};
}

__device__ __forceinline__ void produce(const SpmmSm90Params& p, Shared shared) {
  const int steps = p.k / kBK, branch_steps = (p.rank + kRankStep - 1) / kRankStep;
  Ring ring;
  for (int tile = blockIdx.x; tile < tile_count(p); tile += gridDim.x) {
    const TileOrigin origin = tile_origin(p, tile);
    for (int s = 0; s < steps + branch_steps; ++s) {
      ptx::mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
      const uint32_t full = shared.full(ring.stage);
      if (s < steps) {
        ptx::mbarrier_arrive_expect(full, kStageBytes);
        ptx::tma_load_2d(shared.a(ring.stage), p.values, s * kBK / 2, origin.m, full);
        ptx::tma_load_2d(shared.w(ring.stage), p.weight, s * kBK, origin.n, full);
      } else {
        ptx::mbarrier_arrive_expect(full, kBranchBytes);
        ptx::tma_load_2d(shared.a(ring.stage), p.branch, (s - steps) * kRankStep, origin.m, full);
        ptx::tma_load_2d(shared.w(ring.stage), p.comp_up, (s - steps) * kRankStep, origin.n, full);
      }
      ring.advance();
    }
  }
}

using Accumulators = float[kTilesM][96];

// The same value, but the compiler cannot know: what follows from it is computed here, not kept in registers through the main loop.
__device__ __forceinline__ int computed_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// What a consumer warpgroup keeps from stage to stage.
template <class T>
struct Consumer {
  const SpmmSm90Params& p;
  Shared shared;
  int lane, warp, group;  // warp and warpgroup among the consumers' (0..3, 0..1)
  Ring ring;

  // Where the lane finds the first metadata word of its warp's m16 tile in each m64 tile. Tiles past the padded rows read the last tile's:
  // what they compute is not stored.
  __device__ __forceinline__ void find_metadata(int row, uint32_t (&offsets)[kTilesM]) const {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) offsets[i] = metadata_index(min(row + 64 * i, padded_rows(p.m) - kTileRows), 0, lane, p.m);
  }

  __device__ __forceinline__ void load_metadata(const uint32_t (&offsets)[kTilesM], int step, uint32_t (&words)[kTilesM]) const {
    const uint32_t* block = p.metadata + metadata_index(0, step * kBK, 0, p.m);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) words[i] = __ldg(block + offsets[i]);
  }

  __device__ __forceinline__ void release(int stage) const {
    if (lane == 0) ptx::mbarrier_arrive(shared.empty(stage));
  }

  // Issues one stage of sparse products, then waits for those of the stage before, which frees that stage and its metadata registers.
  __device__ __forceinline__ void sparse_stage(Accumulators& acc, const uint32_t (&metadata)[kTilesM], bool first) {
    ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
    const uint64_t a = ptx::matrix_descriptor<ptx::Swizzle::k64Bytes>(shared.a(ring.stage) + group * kTilesM * 64 * 64);
    const uint64_t w = ptx::matrix_descriptor<ptx::Swizzle::k128Bytes>(shared.w(ring.stage));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      ptx::wgmma_sp_m64n192k32<0>(T{}, acc[i], ptx::advanced(a, i * 64 * 64), w, metadata[i], !first);
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
      ptx::wgmma_sp_m64n192k32<1>(T{}, acc[i], ptx::advanced(a, i * 64 * 64 + 32), ptx::advanced(w, 64), metadata[i], true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (!first) release(ring.stage == 0 ? kStages - 1 : ring.stage - 1);
    ring.advance();
  }

  // Waits for all products in flight and frees their `stages` stages.
  __device__ __forceinline__ void finish(Accumulators& acc, int stages) const {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) ptx::pin_registers(acc[i]);
    for (int s = 1; s <= stages; ++s) release(ring.stage >= s ? ring.stage - s : ring.stage - s + kStages);
  }

  // The row scales of the lane's rows: g and g + 8 of the warp's m16 tile in each m64 tile.
  __device__ __forceinline__ void load_row_scale(int row, float (&scale)[kTilesM][2]) const {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 64 * i + 8 * half + lane / 4;
        scale[i][half] = p.row_scale && r < p.m ? __ldg(p.row_scale + r) : 1.0f;
      }
    }
  }

  __device__ __forceinline__ static void scale_rows(Accumulators& acc, const float (&scale)[kTilesM][2]) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < 96; ++j) acc[i][j] *= scale[i][j % 4 / 2];
    }
  }

  __device__ __forceinline__ void add_branch(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) ptx::pin_registers(acc[i]);
    ptx::wgmma_fence();
    for (int k0 = 0; k0 < p.rank; k0 += kRankStep) {
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      const uint64_t a = ptx::matrix_descriptor<ptx::Swizzle::k64Bytes>(shared.a(ring.stage) + group * kTilesM * 64 * 64);
      const uint64_t w = ptx::matrix_descriptor<ptx::Swizzle::k64Bytes>(shared.w(ring.stage));
#pragma unroll
      for (int step = 0; step < kRankStep / 16; ++step) {
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          ptx::wgmma_m64n192k16(T{}, acc[i], ptx::advanced(a, i * 64 * 64 + step * 32), ptx::advanced(w, step * 32));
        }
      }
      ptx::wgmma_commit();
      ring.advance();
    }
    finish(acc, (p.rank + kRankStep - 1) / kRankStep);
  }

  // Rounds once and stores 64 x 96 pieces through shared memory, so that every global store is 16 bytes of a row segment of 192.
  __device__ __forceinline__ void store(const Accumulators& acc, TileOrigin origin, uint8_t* staging) const {
    const auto* bias = static_cast<const uint16_t*>(p.bias);
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int part = 0; part < kBN / kStoreCols; ++part) {
        const int lane = computed_here(this->lane), g = lane / 4, q = lane % 4;
        const int column0 = origin.n + part * kStoreCols;
#pragma unroll
        for (int j = 0; j < kStoreCols / 8; ++j) {
          const int column = 8 * j + 2 * q;
          const float2 b = T::unpack(ptx::load_or_zero(bias + column0 + column, bias && column0 + column < p.n));
          const float* d = acc[i] + 4 * (part * kStoreCols / 8 + j);
          uint8_t* target = staging + (16 * warp + g) * kStoreRow + column * 2;
          *reinterpret_cast<uint32_t*>(target) = T::pack(d[0] + b.x, d[1] + b.y);
          *reinterpret_cast<uint32_t*>(target + 8 * kStoreRow) = T::pack(d[2] + b.x, d[3] + b.y);
        }
        __syncwarp();  // a warp reads back only its own 16 rows
        constexpr int kRowChunks = kStoreCols / 8;
#pragma unroll 2
        for (int c = 0; c < 16 * kRowChunks / 32; ++c) {
          const int index = c * 32 + lane, r = 16 * warp + index / kRowChunks, chunk = index % kRowChunks;
          const int row = origin.m + (group * kTilesM + i) * 64 + r, column = column0 + chunk * 8;
          if (row < p.m && column < p.n) {
            const uint4 value = *reinterpret_cast<const uint4*>(staging + r * kStoreRow + chunk * 16);
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.out) + static_cast<int64_t>(row) * p.n + column) = value;
          }
        }
        __syncwarp();
      }
    }
  }

  __device__ __forceinline__ void run(uint8_t* staging) {
    const int steps = p.k / kBK;
    for (int tile = blockIdx.x; tile < tile_count(p); tile += gridDim.x) {
      const TileOrigin origin = tile_origin(p, tile);
      const int row = origin.m + group * kTilesM * 64 + 16 * warp;
      Accumulators acc;
      uint32_t words[kTilesM], even[kTilesM], odd[kTilesM];
      find_metadata(row, words);
      load_metadata(words, 0, even);
      // Two stages a round, so that the words being loaded are never those that products in flight still read.
      for (int s = 0; s < steps; s += 2) {
        sparse_stage(acc, even, s == 0);
        if (s + 1 == steps) break;
        load_metadata(words, s + 1, odd);
        sparse_stage(acc, odd, false);
        if (s + 2 < steps) load_metadata(words, s + 2, even);
      }
      float scale[kTilesM][2];
      load_row_scale(row, scale);  // arrives while the last products are in flight
      finish(acc, 1);
      if (p.row_scale) scale_rows(acc, scale);
      if (p.rank > 0) add_branch(acc);
      store(acc, origin, staging);
    }
  }
};

template <class T>
__device__ __forceinline__ void spmm_sm90(const SpmmSm90Params& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared shared{ptx::shared_address(memory)};
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(shared.full(s), 1);
      ptx::mbarrier_init(shared.empty(s), kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_up_registers<24>();
    if (threadIdx.x == 0) produce(p, shared);
  } else {
    ptx::claim_registers<240>();
    Consumer<T> consumer{p, shared, static_cast<int>(threadIdx.x % 32), static_cast<int>(threadIdx.x / 32 % 4), warpgroup - 1, {}};
    consumer.run(memory + kStoreOffset + (warpgroup - 1) * kStoreBytes);
  }
}

}  // namespace
}  // namespace rtlynx

extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, 1)
    spmm_sm90_bf16_256x192x64_s5(const __grid_constant__ rtlynx::SpmmSm90Params p) {
  rtlynx::spmm_sm90<rtlynx::Bf16>(p);
}
extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, 1)
    spmm_sm90_f16_256x192x64_s5(const __grid_constant__ rtlynx::SpmmSm90Params p) {
  rtlynx::spmm_sm90<rtlynx::F16>(p);
}
