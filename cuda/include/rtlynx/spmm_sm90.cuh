// spmm_sm90: Y = row_scale · (S(X) · W^T) · weight_scale + branch · comp_up^T + bias with wgmma.sp, for Hopper. Two files of kernels are made of it.
//
// A persistent block computes tiles of Y (spmm_tiles_sm90.cuh). Warpgroup 0 produces: one thread copies stages of 128 bytes of W's rows by TMA, as far
// ahead as the ring is deep, across tile boundaries. The others consume: each owns one or two m64 tiles. Of the widest tile:
//
//                     stage (40 KB)                     per warpgroup and stage
//   A   256 rows x 64 bytes of values,  SW64            2 m64 tiles x 2 k-steps of wgmma.sp m64nNk32 (m64nNk64 with 8-bit operands)
//   W   192 rows x 128 bytes,           SW128           64 dense columns (128)
//
// Operands are of T, or e4m3: half the bytes and twice the columns an instruction; all else stays of T.
//
// After K come ⌈rank / 32⌉ stages of the branch: 256 x 32 of `branch`, N x 32 of `comp_up`, both SW64, dense m64nNk16 steps into the same
// accumulators, which have become row_scale · (S(X) · W^T) + bias by then. The metadata goes straight to registers, a stage ahead: 1/16 of the
// bytes.
//
// An epilogue (epilogue.cuh) works on the 16 bytes that a lane is about to store; its residual is asked into L2 while the last products run.
//
// Why both operands in shared memory: wgmma.sp reads W at the full shared-memory bandwidth, so what else is written and read there decides, and
// large tiles move the fewest bytes per product (docs/kernels.md).
#pragma once

#include "rtlynx/epilogue.cuh"
#include "rtlynx/ptx/cp_async.cuh"
#include "rtlynx/ptx/grid.cuh"
#include "rtlynx/ptx/load.cuh"
#include "rtlynx/ptx/registers.cuh"
#include "rtlynx/ptx/wgmma.cuh"
#include "rtlynx/quad.cuh"
#include "rtlynx/spmm_tiles_sm90.cuh"

namespace rtlynx {

// What a consumer warpgroup keeps from stage to stage.
template <class Config>
struct Consumer {
  using T = typename Config::T;
  using Accumulators = typename Config::Accumulators;
  using Words = uint32_t[Config::kTilesM][Config::kWords];  // metadata of a stage

  const SpmmSm90Params& p;
  Shared<Config> shared;
  int lane, warp, group;  // warp and warpgroup among the consumers'
  Ring<Config::kStages> ring;

  // Where the lane finds the first metadata word of its warp's m16 tile in each m64 tile. Tiles past the padded rows read the last tile's:
  // what they compute is not stored.
  __device__ __forceinline__ void find_metadata(int row, uint32_t (&offsets)[Config::kTilesM]) const {
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) offsets[i] = metadata_index(min(row + 64 * i, padded_rows(p.m) - kTileRows), 0, lane, p.m);
  }

  __device__ __forceinline__ void load_metadata(const uint32_t (&offsets)[Config::kTilesM], int step, Words& words) const {
    const uint32_t* block = p.metadata + metadata_index(0, step * Config::kBK, 0, p.m);
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) ptx::load_words(block + offsets[i], words[i]);
  }

  __device__ __forceinline__ void release(int stage) const {
    if (lane == 0) ptx::mbarrier_arrive(shared.empty(stage));
  }

  // One k-step of a stage.
  template <int kStep>
  __device__ __forceinline__ void multiply_step(float (&d)[Config::kBN / 2], uint64_t a, uint64_t w,
                                                const uint32_t (&words)[Config::kWords], bool add) const {
    if constexpr (Config::kWords == 1) {
      ptx::wgmma_sp_k32<kStep>(typename Config::Operand{}, d, a, w, words[0], add);
    } else {
      ptx::wgmma_sp_k64(typename Config::Operand{}, d, a, w, words[kStep], add);
    }
  }

  // Issues one stage of sparse products, then waits for those of the stage before, which frees that stage and its metadata registers.
  __device__ __forceinline__ void sparse_stage(Accumulators& acc, const Words& metadata, bool first) {
    ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
    const uint64_t a = ptx::matrix_descriptor<ptx::Swizzle::k64Bytes>(shared.a(ring.stage) + group * Config::kTilesM * 64 * 64);
    const uint64_t w = ptx::matrix_descriptor<ptx::Swizzle::k128Bytes>(shared.w(ring.stage));
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) multiply_step<0>(acc[i], ptx::advanced(a, i * 64 * 64), w, metadata[i], !first);
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
      multiply_step<1>(acc[i], ptx::advanced(a, i * 64 * 64 + 32), ptx::advanced(w, 64), metadata[i], true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (!first) release(ring.stage == 0 ? Config::kStages - 1 : ring.stage - 1);
    ring.advance();
  }

  // The sparse products of a tile, the last of them still in flight.
  __device__ __forceinline__ void multiply(Accumulators& acc, int row) {
    const int steps = stages_of_k<Config>(p);
    uint32_t words[Config::kTilesM];
    Words even, odd;
    find_metadata(row, words);
    load_metadata(words, 0, even);
    // Two stages a round, so that the words being loaded are never those that products in flight still read.
    if constexpr (Config::kEpilogue) {
      sparse_stage(acc, even, true);  // apart from the others: so ptxas sees that what accumulators held before is not read
      for (int s = 1; s < steps; s += 2) {
        load_metadata(words, s, odd);
        sparse_stage(acc, odd, false);
        if (s + 1 == steps) break;
        load_metadata(words, s + 1, even);
        sparse_stage(acc, even, false);
      }
    } else {
      for (int s = 0; s < steps; s += 2) {
        sparse_stage(acc, even, s == 0);
        if (s + 1 == steps) break;
        load_metadata(words, s + 1, odd);
        sparse_stage(acc, odd, false);
        if (s + 2 < steps) load_metadata(words, s + 2, even);
      }
    }
  }

  // Waits for all products in flight and frees their `stages` stages.
  __device__ __forceinline__ void finish(Accumulators& acc, int stages) const {
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) ptx::pin_registers(acc[i]);
    for (int s = 1; s <= stages; ++s) release(ring.stage >= s ? ring.stage - s : ring.stage - s + Config::kStages);
  }

  // What turns products into Y: the row scales of the lane's rows, g and g + 8 of the warp's m16 tile in each m64 tile, and the tile's biases and
  // scales of 8-bit weights, shared out over the warp. Fetched while the last products are in flight.
  struct Affine {
    static constexpr bool kScaledColumns = kBytesOf<typename Config::Operand> == 1;
    static constexpr int kPairs = (Config::kBN + 63) / 64;
    float scale[Config::kTilesM][2];
    uint32_t bias[kPairs];                             // of columns 64i + 2 lane and + 1
    float2 column_scale[kScaledColumns ? kPairs : 1];  // of the same
  };

  __device__ __forceinline__ void load_affine(int row, int column, Affine& affine) const {
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 64 * i + 8 * half + lane / 4;
        affine.scale[i][half] = p.row_scale && r < p.m ? __ldg(p.row_scale + r) : 1.0f;
      }
    }
    column += 2 * lane;
#pragma unroll
    for (int i = 0; i < Affine::kPairs; ++i) {
      const bool inside = column + 64 * i < p.n;
      affine.bias[i] = ptx::load_or_zero(static_cast<const uint16_t*>(p.bias) + column + 64 * i, p.bias && inside);
      if constexpr (Affine::kScaledColumns) {
        const float* scale = p.weight_scale + column + 64 * i;
        affine.column_scale[i] = {__uint_as_float(ptx::load_or_zero(scale, inside)), __uint_as_float(ptx::load_or_zero(scale + 1, inside))};
      }
    }
  }

  __device__ __forceinline__ void apply_affine(Accumulators& acc, const Affine& affine) const {
#pragma unroll
    for (int j = 0; j < Config::kBlocksN; ++j) {
      const int holder = 4 * (j % 8) + lane % 4;
      const float2 bias = T::unpack(__shfl_sync(0xffffffffu, affine.bias[j / 8], holder));
      float2 column_scale = {1.0f, 1.0f};
      if constexpr (Affine::kScaledColumns) {
        column_scale.x = __shfl_sync(0xffffffffu, affine.column_scale[j / 8].x, holder);
        column_scale.y = __shfl_sync(0xffffffffu, affine.column_scale[j / 8].y, holder);
      }
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* d = acc[i] + 4 * j + 2 * half;
          d[0] = fmaf(d[0], affine.scale[i][half] * column_scale.x, bias.x);
          d[1] = fmaf(d[1], affine.scale[i][half] * column_scale.y, bias.y);
        }
      }
    }
  }

  // Brings what the epilogue will read of the residual into L2. Of each of the lane's rows, a lane of the quad asks for a line of 128 bytes.
  __device__ __forceinline__ void prefetch_residual(int row, int column) const {
    const int line = min(column + min(64 * (lane % 4), Config::kBN - 8), p.n - 8);
#pragma unroll
    for (int i = 0; i < 2 * Config::kTilesM; ++i) {
      const int r = min(row + 64 * (i / 2) + 8 * (i % 2) + lane / 4, p.m - 1);
      ptx::prefetch_l2(static_cast<const uint16_t*>(p.residual) + static_cast<int64_t>(r) * p.n + line);
    }
  }

  __device__ __forceinline__ void add_branch(Accumulators& acc) {
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) ptx::pin_registers(acc[i]);
    ptx::wgmma_fence();
    for (int k0 = 0; k0 < p.rank; k0 += kRankStep) {
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      const uint64_t a = ptx::matrix_descriptor<ptx::Swizzle::k64Bytes>(shared.a(ring.stage) + group * Config::kTilesM * 64 * 64);
      const uint64_t w = ptx::matrix_descriptor<ptx::Swizzle::k64Bytes>(shared.w(ring.stage));
#pragma unroll
      for (int step = 0; step < kRankStep / 16; ++step) {
#pragma unroll
        for (int i = 0; i < Config::kTilesM; ++i) {
          ptx::wgmma_k16(T{}, acc[i], ptx::advanced(a, i * 64 * 64 + step * 32), ptx::advanced(w, step * 32));
        }
      }
      ptx::wgmma_commit();
      ring.advance();
    }
    finish(acc, branch_stages(p));
  }

  // Rounds once and stores. A quad's 8 x 32 piece is transposed first, so that every lane stores 16 bytes and the quad 64 of a row.
  __device__ __forceinline__ void store(const Accumulators& acc, int row, int column) const {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 64 * i + 8 * half + g;
        auto* target = static_cast<uint16_t*>(p.out) + static_cast<int64_t>(r) * p.n + column + 8 * q;
#pragma unroll
        for (int j = 0; j < Config::kBlocksN; j += 4) {
          uint32_t pairs[4] = {};  // columns 8 (j + 0..3) + 2q and + 1
#pragma unroll
          for (int k = 0; k < 4 && j + k < Config::kBlocksN; ++k) {
            pairs[k] = T::pack(acc[i][4 * (j + k) + 2 * half], acc[i][4 * (j + k) + 2 * half + 1]);
          }
          transpose_quad(pairs, lane);  // columns 8 (j + q) .. + 7
          if (r < p.m && j + q < Config::kBlocksN && column + 8 * (j + q) < p.n) {
            *reinterpret_cast<uint4*>(target + 8 * j) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
          }
        }
      }
    }
  }

  // The same with an epilogue, which works on those 16 bytes, a few pieces at a time and when all is rounded: before, accumulators leave no
  // registers for what it reads.
  __device__ __forceinline__ void finish_and_store(const Accumulators& acc, int row, int column) const {
    constexpr int kBatch = 3, kBatches = (Config::kBlocksN + 4 * kBatch - 1) / (4 * kBatch);
    const int lane = ptx::opaque(this->lane), g = lane / 4, q = lane % 4;
    uint32_t pairs[Config::kTilesM][2][kBatches][kBatch][4] = {};  // of n8 block 4 piece + 0..3: columns 2q and + 1
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
      for (int block = 0; block < Config::kBlocksN; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t& pair = pairs[i][half][block / 4 / kBatch][block / 4 % kBatch][block % 4];
          pair = T::pack(acc[i][4 * block + 2 * half], acc[i][4 * block + 2 * half + 1]);
          pair = ptx::opaque(pair);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = row + 64 * i + 8 * half + g;
        auto* target = static_cast<uint16_t*>(p.out) + static_cast<int64_t>(r) * p.n;
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
          uint32_t (&y)[kBatch][4] = pairs[i][half][batch];
          Piece pieces[kBatch];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int block = 4 * (batch * kBatch + j) + q, n = column + 8 * block;
            pieces[j] = {r, n, r < p.m && block < Config::kBlocksN && n < p.n};
            transpose_quad(y[j], lane);  // all 8 columns of the lane's n8 block
          }
          finish_pieces<T>(p, pieces, y);
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            if (pieces[j].inside) *reinterpret_cast<uint4*>(target + pieces[j].column) = make_uint4(y[j][0], y[j][1], y[j][2], y[j][3]);
          }
        }
      }
    }
  }

  // Waits for a tile's stages and frees them unread.
  __device__ __forceinline__ void pass_over() {
    for (int s = 0; s < stages_of_k<Config>(p) + branch_stages(p); ++s) {
      ptx::mbarrier_wait(shared.full(ring.stage), ring.parity);
      release(ring.stage);
      ring.advance();
    }
  }

  // The first of the warpgroup's rows.
  __device__ __forceinline__ int first_row(TileOrigin origin) const { return origin.m + group * Config::kTilesM * 64; }

  __device__ __forceinline__ void run() {
    for (int tile = blockIdx.x; tile < tile_count<Config>(p); tile += gridDim.x) {
      TileOrigin origin = tile_origin<Config>(p, tile);
      if (first_row(origin) >= p.m) {  // nothing to store: the other warpgroup has the tensor cores for itself
        pass_over();
        continue;
      }
      Accumulators acc;
      multiply(acc, first_row(origin) + 16 * warp);
      origin = tile_origin<Config>(p, ptx::opaque(tile));
      const int row = first_row(origin) + 16 * warp;
      if constexpr (Config::kEpilogue) {
        if (p.residual) prefetch_residual(row, origin.n);
      }
      Affine affine;
      load_affine(row, origin.n, affine);
      finish(acc, 1);
      apply_affine(acc, affine);
      if (p.rank > 0) add_branch(acc);
      if constexpr (Config::kEpilogue) {
        finish_and_store(acc, row, origin.n);
      } else {
        store(acc, row, origin.n);
      }
    }
  }
};

template <class Config>
__device__ __forceinline__ void spmm_sm90(const SpmmSm90Params& p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<Config> shared{ptx::shared_address(memory)};
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Config::kStages; ++s) {
      ptx::mbarrier_init(shared.full(s), 1);
      ptx::mbarrier_init(shared.empty(s), Config::kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_grid();  // everything above may run while sparsify still does
  if (warpgroup == 0) {
    ptx::give_up_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, shared);
  } else {
    ptx::claim_registers<Config::kConsumerRegisters>();
    Consumer<Config> consumer{p, shared, static_cast<int>(threadIdx.x % 32), static_cast<int>(threadIdx.x / 32 % 4), warpgroup - 1, {}};
    consumer.run();
  }
}

}  // namespace rtlynx

#define RTLYNX_SPMM(name, T, Operand, bm, bn, consumers, stages, epilogue)                                                        \
  extern "C" __global__ void __launch_bounds__(128 * (1 + consumers), 1) name(const __grid_constant__ rtlynx::SpmmSm90Params p) { \
    rtlynx::spmm_sm90<rtlynx::Tile<rtlynx::T, rtlynx::Operand, bm, bn, consumers, stages, epilogue>>(p);                          \
  }
#define RTLYNX_SPMM_ALL(bm, bn, consumers, stages, suffix, epilogue)                                                   \
  RTLYNX_SPMM(spmm_sm90_bf16_##bm##x##bn##x64_s##stages##suffix, Bf16, Bf16, bm, bn, consumers, stages, epilogue)      \
  RTLYNX_SPMM(spmm_sm90_f16_##bm##x##bn##x64_s##stages##suffix, F16, F16, bm, bn, consumers, stages, epilogue)         \
  RTLYNX_SPMM(spmm_sm90_bf16e4m3_##bm##x##bn##x128_s##stages##suffix, Bf16, E4m3, bm, bn, consumers, stages, epilogue) \
  RTLYNX_SPMM(spmm_sm90_f16e4m3_##bm##x##bn##x128_s##stages##suffix, F16, E4m3, bm, bn, consumers, stages, epilogue)
// A tile for every pair of types. The tiles are those of the tile table, crates/rtlynx-core/src/config/spmm.rs.
#define RTLYNX_SPMM_TYPES(bm, bn, consumers, stages) RTLYNX_SPMM_ALL(bm, bn, consumers, stages, , false)
#define RTLYNX_SPMM_EPILOGUE_TYPES(bm, bn, consumers, stages) RTLYNX_SPMM_ALL(bm, bn, consumers, stages, _epilogue, true)
