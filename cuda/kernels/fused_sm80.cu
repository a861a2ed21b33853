// fused_sm80: the whole layer in one kernel, Y = s · (S(X') · W^T) + T · comp_up^T + bias, X' = X - shift: the design of the RT-Lynx paper
// (arXiv 2605.26632). X is read dense, selected in registers and multiplied with mma.sp; nothing compressed is written anywhere.
//
//   for each 64 columns, through a ring of kStages stages filled by cp.async
//     X  kBM x 64, W  kBN x 64    128-byte rows, swizzled
//     select (fragment24.cuh), add up ‖X'‖² and ‖S(X')‖², acc += S(X') · W^T    2 x m16n8k32 deep
//   then, in the same accumulators
//     acc *= s                    from the norms: a warp has seen all of its rows
//     acc += T · comp_up^T + bias and the store, as in spmm_sm80
//
//            kBN columns        Warps stand below each other, so that no selection is made twice in a block. Clocks of a multiprocessor for
//          +-------------+      a stage of 128 x 128, where it has 128 bytes of shared memory and 4096 dense-equivalent FLOP a clock for
//   warp 0 | kBM/4 rows  |      mma.sp (A100, H200), 4 x 1 counted in the machine code, 2 x 2 derived from it:
//   warp 1 |             |
//   warp 2 |             |                                    4 x 1    2 x 2
//   warp 3 |             |        shared memory                 910      770     of these W 512 or 256, X 128 or 256, the copies 256
//          +-------------+        integer and logic pipe        700     1310     2 an instruction, 350 a warp, 300 of them to select
//                                 all instructions              790     1330
//                                 tensor cores                  512      512
//
//   So at best 56 % of what the tensor cores could do there, and nearly all where mma.sp is half as fast (8.6, 8.9, 12.0).
//
// T = E · comp_down, E = X' - S(X') or X', is what every tile of Y in these rows needs. Computing it in each of them would take 2 rank / kBN
// of their tensor time (dense k-steps run at half the rate): for rank 64, as much as the product. Instead the first blocks to start compute
// T, in tiles of the same shape: E stays in registers, comp_down takes the place of W. The other blocks find T in L2 when they come to need
// it. A block takes its number when it starts, so that whatever a block may wait for is being computed already, in whichever order blocks
// are launched.

#include "rtlynx/fragment24.cuh"
#include "rtlynx/ptx/mma_sp.cuh"
#include "rtlynx/ptx/sync.cuh"

namespace rtlynx {
namespace {

template <class T_, int kBM_, int kBN_, int kStages_>
struct Tile {
  using T = T_;
  static constexpr int kBM = kBM_, kBN = kBN_, kStages = kStages_;
  static constexpr int kThreads = kTileThreads, kWarpsN = 1;
  static constexpr int kWarpM = kBM / 4, kWarpN = kBN;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kXBytes = kBM * kBK * 2;
  static constexpr int kStageBytes = kXBytes + kBN * kBK * 2;
};

// Byte offset of 16-byte chunk `chunk` of row k of a stage of comp_down, swizzled for the order in which `project_stage` reads its rows.
template <class Config>
__device__ __forceinline__ uint32_t place_of_down(int k, int chunk) {
  return k * Config::kBN * 2 + (chunk ^ (k & 7) ^ (k >> 4 & 2)) * 16;
}

// The 64 rows of comp_down from k0, kBN columns of them; columns past the end repeat the last ones.
template <class Config>
__device__ __forceinline__ void load_down(const FusedParams& p, int n0, int k0, uint32_t target) {
  constexpr int kRowChunks = Config::kBN / kChunk;
  const int chunk = threadIdx.x % kRowChunks, col = min(n0 + chunk * kChunk, p.rank - kChunk);
#pragma unroll 1  // few blocks come here, and addresses computed ahead would take registers from all
  for (int k = threadIdx.x / kRowChunks; k < kBK; k += kTileThreads / kRowChunks) {
    const auto* source = static_cast<const uint16_t*>(p.comp_down) + static_cast<int64_t>(k0 + k) * p.rank + col;
    ptx::cp_async_16(target + place_of_down<Config>(k, chunk), source, true);
  }
}

// Streams X and a second operand through the ring: load(k0, address) requests a stage of the latter, use(k0, stage) consumes one of both.
template <class Config, class Load, class Use>
__device__ __forceinline__ void for_each_stage(const FusedParams& p, int m0, uint32_t ring, Load load, Use use) {
  const int steps = p.k / kBK;
  const auto request = [&](int step, int slot) {
    const uint32_t stage = ring + slot * Config::kStageBytes;
    if (step < steps) {
      load_rows<Config::kBM>(p.x, p.m, p.ldx, m0, step * kBK, stage);
      load(step * kBK, stage + Config::kXBytes);
    }
    ptx::cp_async_commit();  // empty past the end
  };
#pragma unroll
  for (int step = 0; step < Config::kStages - 1; ++step) request(step, step);
  int slot = 0, free_slot = Config::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();  // this stage is filled for all; all are done reading the one that is refilled now
    request(step + Config::kStages - 1, free_slot);
    use(step * kBK, slot * Config::kStageBytes);
    free_slot = slot;
    slot = slot + 1 == Config::kStages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the ring is free
}

// acc += S(X') · W^T for a stage: k32 step 0 reads the metadata of lanes 0 and 1 of a quad, step 1 that of lanes 2 and 3.
template <class Config, int kStep>
__device__ __forceinline__ void multiply_step(uint32_t weight, const Fragments<Config>& a, Accumulators<Config>& acc) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const uint32_t source = weight + swizzled_128(lane % 8, 2 * kStep + matrix / 2 + matrix % 2 * 4);  // fragment24.cuh draws the order
#pragma unroll
  for (int j = 0; j < Config::kTilesN; ++j) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, source + 8 * j * 128);
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
      const auto &low = a.kept[2 * kStep][i], &high = a.kept[2 * kStep + 1][i];
      const uint32_t kept[4] = {low[0], low[1], high[0], high[1]};
      ptx::mma_sp_m16n8k32<kStep>(typename Config::T{}, acc[i][j], kept, b, a.metadata[i]);
    }
  }
}

// acc += E · comp_down for a stage. A lane's group x is its part of k-step x: elements 0 and 1 as k = 2q, 2q + 1, the others as k = 2q + 8, 2q + 9.
template <class Config>
__device__ __forceinline__ void project_stage(const FusedParams& p, const uint8_t* tile, int k0, int n0, uint32_t down,
                                              Accumulators<Config>& acc) {
  using T = typename Config::T;
  const int lane = threadIdx.x % 32;
  // The row of comp_down that this lane points ldmatrix at, for x = 0: element lane % 2 + lane / 8 % 2 * 2 of the group of q = lane % 8 / 2.
  const int source_k = (lane >> 2 & 1) * 4 * kChunk + (lane >> 1 & 1) * kGroup + (lane >> 3 & 1) * 2 + (lane & 1);
#pragma unroll 1  // as in load_down
  for (int x = 0; x < kStageGroups; ++x) {
    PerRow<Config, RowGroup> groups;
    load_groups<Config, false>(p, tile, k0, x, groups);
    if (p.branch_of_dropped) {
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) {
        const Group group = both_rows(groups[i]);
        const Group left = drop24(group, select_groups<T, false>(p, k0, x, groups[i], group), ~0u);
        groups[i][0] = {left.g[0], left.g[1]}, groups[i][1] = {left.h[0], left.h[1]};
      }
    }
#pragma unroll
    for (int j = 0; j < Config::kTilesN; j += 2) {
      if (n0 + 8 * j >= p.rank) break;
      uint32_t b[4];  // two n8 tiles: matrices (k 0-7, n 0-7), (k 8-15, n 0-7), (k 0-7, n 8-15), (k 8-15, n 8-15)
      ptx::ldmatrix_x4_transposed(b, down + place_of_down<Config>(source_k + x * kChunk, j + lane / 16));
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) {
        const RowGroup &low = groups[i][0], &high = groups[i][1];
        const uint32_t a[4] = {low.x01, high.x01, low.x23, high.x23};
        ptx::mma_m16n8k16(T{}, acc[i][j], a, b[0], b[1]);
        ptx::mma_m16n8k16(T{}, acc[i][j + 1], a, b[2], b[3]);
      }
    }
  }
}

// The number of this block in the order in which blocks start.
__device__ __forceinline__ int start_number(uint32_t* counter, uint8_t* shared) {
  auto* number = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) *number = static_cast<int>(atomicAdd(counter, 1));
  __syncthreads();
  const int mine = *number;
  __syncthreads();  // shared memory is free again
  return mine;
}

// acc *= s.
template <class Config>
__device__ __forceinline__ void compensate(float eps, const Norms<Config>& norms, Accumulators<Config>& acc) {
  float scale[Config::kTilesM][2];
#pragma unroll
  for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[i][half] = sqrtf(sum_over_quad(norms.all[i][half]) / (sum_over_quad(norms.kept[i][half]) + eps));
    }
  }
  scale_rows<Config>(scale, acc);
}

template <class Config>
__device__ __forceinline__ void fused(const FusedParams& p) {
  extern __shared__ __align__(128) uint8_t shared[];
  static_assert(Config::kBM * (Config::kBN * 2 + 16) <= Config::kStages * Config::kStageBytes, "the output tile reuses the stages");
  static_assert((Config::kBM + Config::kBN) * (128 * 2 + 16) <= Config::kStages * Config::kStageBytes, "so does a branch of rank 128");
  const uint32_t ring = ptx::shared_address(shared);
  const int row_tiles = (p.m + Config::kBM - 1) / Config::kBM, branch_columns = (p.rank + Config::kBN - 1) / Config::kBN;
  const int index = p.rank ? start_number(p.progress, shared) : blockIdx.x;
  const bool of_branch = index < row_tiles * branch_columns;
  const TileOrigin origin = of_branch ? TileOrigin{index % row_tiles * Config::kBM, index / row_tiles * Config::kBN}
                                      : tile_origin<Config>(p.m, p.n, index - row_tiles * branch_columns);
  uint32_t* const done = p.progress + 1 + origin.m / Config::kBM;  // tiles of T in these rows
  const bool plain = !p.score && !p.shift;

  Accumulators<Config> acc = {};
  Norms<Config> norms;
  const auto load = [&](int k0, uint32_t target) {
    if (of_branch) {
      load_down<Config>(p, origin.n, k0, target);
    } else {
      load_rows<Config::kBN>(p.weight, p.n, p.k, origin.n, k0, target);
    }
  };
  const auto use = [&](int k0, int stage) {
    const uint32_t operand = ring + stage + Config::kXBytes;
    if (of_branch) {
      project_stage<Config>(p, shared + stage, k0, origin.n, operand, acc);
    } else {
      const Fragments<Config> a =
          plain ? select_stage<Config, true>(p, shared + stage, k0, norms) : select_stage<Config, false>(p, shared + stage, k0, norms);
      multiply_step<Config, 0>(operand, a, acc);
      multiply_step<Config, 1>(operand, a, acc);
    }
  };
  for_each_stage<Config>(p, origin.m, ring, load, use);

  if (of_branch) {
    store_tile<Config>({p.branch, nullptr, p.m, p.rank}, origin, shared, acc);
    __syncthreads();
    if (threadIdx.x == 0) ptx::add_release(done, 1);
    return;
  }
  if (p.norm_compensation) compensate<Config>(p.eps, norms, acc);
  if (p.rank > 0) {
    if (threadIdx.x == 0) {
      while (ptx::load_acquire(done) < branch_columns) __nanosleep(100);
    }
    __syncthreads();
    load_branch<Config>({p.branch, p.comp_up, p.m, p.n, p.rank}, origin, ring);
    add_branch<Config>(p.rank, ring, acc);
    __syncthreads();  // the branch tiles are read; the output tile takes their place
  }
  store_tile<Config>({p.out, p.bias, p.m, p.n}, origin, shared, acc);
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_FUSED(type, T, bm, bn, stages)                                                         \
  extern "C" __global__ void __launch_bounds__(rtlynx::kTileThreads, 2)                               \
      fused_sm80_##type##_##bm##x##bn##x64_s##stages(const __grid_constant__ rtlynx::FusedParams p) { \
    rtlynx::fused<rtlynx::Tile<rtlynx::T, bm, bn, stages>>(p);                                        \
  }
#define RTLYNX_FUSED_TYPES(bm, bn, stages) \
  RTLYNX_FUSED(bf16, Bf16, bm, bn, stages) \
  RTLYNX_FUSED(f16, F16, bm, bn, stages)

RTLYNX_FUSED_TYPES(128, 128, 3)
RTLYNX_FUSED_TYPES(128, 64, 3)
RTLYNX_FUSED_TYPES(64, 64, 4)
