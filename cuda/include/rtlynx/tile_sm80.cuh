// What the GEMMs on mma.sync share: how a block divides its tile of Y, the branch and the store.
//
// A tile is described by a struct `Config`: T, kBM x kBN outputs, of which each warp computes kWarpM x kWarpN (kTilesM x kTilesN products
// of 16 x 8), the warps standing kWarpsN side by side; kThreads in all.
#pragma once

#include "rtlynx/element.cuh"
#include "rtlynx/epilogue.cuh"
#include "rtlynx/format.cuh"
#include "rtlynx/ptx/cp_async.cuh"
#include "rtlynx/ptx/ldmatrix.cuh"
#include "rtlynx/ptx/mma.cuh"

namespace rtlynx {

constexpr int kTileThreads = 128;  // of a fused block, and of most others
constexpr int kBK = kWordCols;     // dense columns of a stage: one metadata word
constexpr int kChunk = 8;          // elements of a 16-byte chunk
constexpr int kGroupM = 8;         // tile rows that share their columns of W in L2 before the next columns come

template <class Config>
using Accumulators = float[Config::kTilesM][Config::kTilesN][4];

// Byte offset of a 16-byte chunk in rows of 128 bytes, swizzled so that the 8 rows an ldmatrix reads fall into different banks.
__device__ __forceinline__ uint32_t swizzled_128(int row, int chunk) { return row * 128 + (chunk ^ (row & 7)) * 16; }

// Where this warp's part begins in the tile.
struct WarpOrigin {
  int m, n;
};
template <class Config>
__device__ __forceinline__ WarpOrigin warp_origin() {
  const int warp = threadIdx.x / 32;
  return {warp / Config::kWarpsN * Config::kWarpM, warp % Config::kWarpsN * Config::kWarpN};
}

// Where tile `index` begins in Y: down kGroupM tile rows first, then to the next tile column, so that blocks running together share both
// operands in L2.
struct TileOrigin {
  int m, n;
};
template <class Config>
__device__ __forceinline__ TileOrigin tile_origin(int m, int n, int index) {
  const int tiles_m = (m + Config::kBM - 1) / Config::kBM, tiles_n = (n + Config::kBN - 1) / Config::kBN;
  const int group = index / (kGroupM * tiles_n), first = group * kGroupM;
  const int rows = min(kGroupM, tiles_m - first), within = index - group * kGroupM * tiles_n;
  return {(first + within % rows) * Config::kBM, within / rows * Config::kBN};
}

// Requests kRows rows of kBK columns of a row-major matrix, from (row0, col0): a stage of X or W, in rows of 128 bytes. Rows past the end
// repeat the last one: what becomes of them is never stored, and a smaller row number is cheaper than a predicate.
template <int kRows>
__device__ __forceinline__ void load_rows(const void* matrix, int rows, int stride, int row0, int col0, uint32_t target) {
  constexpr int kRowChunks = kBK / kChunk, kStep = kTileThreads / kRowChunks;  // rows that the block's threads take at a time
  const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks, last = rows - 1 - row0;
  const auto* source = static_cast<const uint16_t*>(matrix) + static_cast<int64_t>(row0) * stride + col0 + chunk * kChunk;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const uint32_t twice_row = min(2 * (row + i * kStep), 2 * last);  // 2 bytes an element: the product is then one instruction
    const uint64_t bytes = static_cast<uint64_t>(twice_row) * static_cast<uint32_t>(stride);
    ptx::cp_async_16(target + swizzled_128(row, chunk) + i * kStep * 128, reinterpret_cast<const uint8_t*>(source) + bytes, true);
  }
}

// The factors of the branch.
struct Branch {
  const void* input;  // [m, rank]
  const void* up;     // [n, rank]
  int m, n, rank;     // rank: a multiple of 16, at most 128
};

// Bytes of a row of both tiles in shared memory: padded by one chunk against bank conflicts.
__device__ __forceinline__ int branch_row_bytes(int rank) { return rank * 2 + 16; }

// Requests the tile's rows of both factors.
template <class Config>
__device__ __forceinline__ void load_branch(const Branch& branch, TileOrigin origin, uint32_t shared) {
  const int chunks = branch.rank / kChunk, row_bytes = branch_row_bytes(branch.rank);
  for (int i = threadIdx.x; i < (Config::kBM + Config::kBN) * chunks; i += Config::kThreads) {
    const int row = i / chunks, chunk = i % chunks;
    const bool of_input = row < Config::kBM;
    const int source_row = of_input ? origin.m + row : origin.n + row - Config::kBM;
    const bool valid = source_row < (of_input ? branch.m : branch.n);
    const int64_t offset = valid ? static_cast<int64_t>(source_row) * branch.rank + chunk * kChunk : 0;
    ptx::cp_async_16(shared + row * row_bytes + chunk * 16, static_cast<const uint16_t*>(of_input ? branch.input : branch.up) + offset,
                     valid);
  }
  ptx::cp_async_commit();
}

// Waits for them; acc += input · up^T.
template <class Config>
__device__ __forceinline__ void add_branch(int rank, uint32_t shared, Accumulators<Config>& acc) {
  const int lane = threadIdx.x % 32, row_bytes = branch_row_bytes(rank);
  const WarpOrigin warp = warp_origin<Config>();
  const uint32_t shared_up = shared + Config::kBM * row_bytes;
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int k0 = 0; k0 < rank; k0 += 16) {
    uint32_t a[Config::kTilesM][4];
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
      ptx::ldmatrix_x4(a[i], shared + (warp.m + 16 * i + lane % 16) * row_bytes + k0 * 2 + lane / 16 * 16);
    }
#pragma unroll
    for (int j = 0; j < Config::kTilesN; j += 2) {
      uint32_t b[4];  // two n8 tiles: matrices (rows 0-7, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 0-7), (rows 8-15, k 8-15)
      ptx::ldmatrix_x4(b, shared_up + (warp.n + 8 * j + lane / 16 * 8 + lane % 8) * row_bytes + k0 * 2 + lane / 8 % 2 * 16);
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) {
        ptx::mma_m16n8k16(typename Config::T{}, acc[i][j], a[i], b[0], b[1]);
        ptx::mma_m16n8k16(typename Config::T{}, acc[i][j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// acc *= scale by row, for rows g and g + 8 of each of the warp's m16 tiles.
template <class Config>
__device__ __forceinline__ void scale_rows(const float (&scale)[Config::kTilesM][2], Accumulators<Config>& acc) {
#pragma unroll
  for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
    for (int j = 0; j < Config::kTilesN; ++j) {
      acc[i][j][0] *= scale[i][0], acc[i][j][1] *= scale[i][0];
      acc[i][j][2] *= scale[i][1], acc[i][j][3] *= scale[i][1];
    }
  }
}

// The matrix a tile belongs to.
struct Output {
  void* data;        // [m, n]
  const void* bias;  // [n], or null
  int m, n;          // n: a multiple of 8
};

// Rounds once and stores the tile through shared memory, so that every global store is 16 bytes of a full row segment. `finish` makes of some
// pieces of Y what is stored.
template <class Config, class Finish>
__device__ __forceinline__ void store_tile(const Output& out, TileOrigin origin, uint8_t* shared, const Accumulators<Config>& acc,
                                           const Finish& finish) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const WarpOrigin warp = warp_origin<Config>();
  constexpr int kRowBytes = Config::kBN * 2 + 16;
  const auto* bias = static_cast<const uint16_t*>(out.bias);
#pragma unroll
  for (int j = 0; j < Config::kTilesN; ++j) {
    const int column = warp.n + 8 * j + 2 * q;
    float2 b = {};
    if (bias && origin.n + column < out.n) b = Config::T::unpack(__ldg(reinterpret_cast<const uint32_t*>(bias + origin.n + column)));
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp.m + 16 * i + g + 8 * half;
        *reinterpret_cast<uint32_t*>(shared + row * kRowBytes + column * 2) =
            Config::T::pack(acc[i][j][2 * half] + b.x, acc[i][j][2 * half + 1] + b.y);
      }
    }
  }
  __syncthreads();
  constexpr int kRowChunks = Config::kBN / kChunk, kChunks = Config::kBM * kRowChunks, kBatch = 4;
  static_assert(kChunks % (kBatch * Config::kThreads) == 0, "every thread stores whole batches");
  for (int first = threadIdx.x; first < kChunks; first += kBatch * Config::kThreads) {
    Piece pieces[kBatch];
    uint32_t words[kBatch][4];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * Config::kThreads, row = index / kRowChunks, chunk = index % kRowChunks;
      const int m = origin.m + row, n = origin.n + chunk * kChunk;
      const uint4 eight = *reinterpret_cast<const uint4*>(shared + row * kRowBytes + chunk * 16);
      pieces[i] = {m, n, m < out.m && n < out.n};
      words[i][0] = eight.x, words[i][1] = eight.y, words[i][2] = eight.z, words[i][3] = eight.w;
    }
    finish(pieces, words);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      auto* target = static_cast<uint16_t*>(out.data) + static_cast<int64_t>(pieces[i].row) * out.n + pieces[i].column;
      if (pieces[i].inside) *reinterpret_cast<uint4*>(target) = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
    }
  }
}

// Nothing follows Y.
template <class Config>
__device__ __forceinline__ void store_tile(const Output& out, TileOrigin origin, uint8_t* shared, const Accumulators<Config>& acc) {
  store_tile<Config>(out, origin, shared, acc, [](const auto&, const auto&) {});
}

}  // namespace rtlynx
