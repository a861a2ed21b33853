// Selection where mma.sp wants its operand: dense X in shared memory -> compressed A fragments and metadata words in registers.
//
// A stage is 64 columns of X: rows of 8 chunks of 16 bytes, two groups of 4 each. mma.sp m16n8k32 takes 8 groups u = 0..7, of which lane q of
// a quad holds u = q and u = q + 4 (in rows g and g + 8), and an ldmatrix of W brings matrices i = 0..3 of two neighbouring groups, u = 2i and
// 2i + 1. The order of groups along K is free as long as both operands agree; in this one X is read in pieces of 8 bytes and W as it lies:
//
//   chunk of the stage       0      1      2      3      4      5      6      7
//   lanes q that own it     0 1    0 1    0 1    0 1    2 3    2 3    2 3    2 3     the even lane its first group, the odd lane its second
//   as their group x         0      1      2      3      0      1      2      3      k32 step x / 2
//   matrix i of W            0      2      0      2      1      3      1      3
//
// Half a warp reads chunks x and x + 4 of 4 rows at a time, which the swizzle puts into all 32 banks.
//
// mma.sp reads the metadata of u = 0..3 from one lane of the quad and that of u = 4..7 from the next, for the second k32 step from the other
// two. So lane L must hold the nibbles of all four lanes' groups x = L: they are transposed in the quad.
//
// What was weighed against this order, for 16 rows x 64 columns, selection itself aside (wavefronts: of shared memory, shuffles included):
//
//                                                                             instructions   wavefronts
//   this order             8 LDS.64; 2 SHFL and 6 others for the word                   16           18
//   lane_tile.cuh's order  4 LDS.128; no exchange for the word, but of the              28           24
//                          8 registers of values: 8 SHFL, 16 SEL
//   the same, W permuted   4 LDS.128; 2 SHFL and 6 others for the word                  12           18
//                          but since ldmatrix takes 16 bytes as they lie, W would come in copies of 8 bytes: twice as many cp.async for all of W
#pragma once

#include "rtlynx/lane_tile.cuh"
#include "rtlynx/params.cuh"
#include "rtlynx/tile_sm80.cuh"

namespace rtlynx {

constexpr int kStageGroups = 4;  // groups x that a lane owns of a row in a stage

// A row's group of 4 elements, two to a register.
struct RowGroup {
  uint32_t x01, x23;
};

// First column of this lane's group x in a stage.
__device__ __forceinline__ int group_column(int x) {
  const int q = threadIdx.x % 4;
  return (x + q / 2 * 4) * kChunk + q % 2 * kGroup;
}

// This lane's group x of a row of X in shared memory.
__device__ __forceinline__ RowGroup load_group(const uint8_t* tile, int row, int x) {
  const int q = threadIdx.x % 4;
  const uint2 pairs = *reinterpret_cast<const uint2*>(tile + swizzled_128(row, x + q / 2 * 4) + q % 2 * 8);
  return {pairs.x, pairs.y};
}

// This lane's groups x of all its rows: rows g and g + 8 of each of the warp's m16 tiles.
template <class Config, class Of>
using PerRow = Of[Config::kTilesM][2];

template <class Config, class Function>
__device__ __forceinline__ void for_each_row(Function function) {
#pragma unroll
  for (int i = 0; i < Config::kTilesM; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) function(i, half);
  }
}

// X' = X - shift, rounded, in the lane's groups x of the stage that starts at column k0. kPlain: known when compiled that there is no shift.
template <class Config, bool kPlain>
__device__ __forceinline__ void load_groups(const FusedParams& p, const uint8_t* tile, int k0, int x, PerRow<Config, RowGroup>& groups) {
  using T = typename Config::T;
  const int row = warp_origin<Config>().m + threadIdx.x % 32 / 4;
  for_each_row<Config>([&](int i, int half) { groups[i][half] = load_group(tile, row + 16 * i + 8 * half, x); });
  if (kPlain || !p.shift) return;
  const float4 shift = __ldg(reinterpret_cast<const float4*>(p.shift + k0 + group_column(x)));
  for_each_row<Config>([&](int i, int half) {
    RowGroup& group = groups[i][half];
    const float2 low = T::unpack(group.x01), high = T::unpack(group.x23);
    group = {T::pack(low.x - shift.x, low.y - shift.y), T::pack(high.x - shift.z, high.y - shift.w)};
  });
}

// The groups of rows g and g + 8 of an m16 tile, which are selected together.
__device__ __forceinline__ Group both_rows(const RowGroup (&rows)[2]) { return {{rows[0].x01, rows[0].x23}, {rows[1].x01, rows[1].x23}}; }

// Selects in the lane's groups x of an m16 tile in the stage that starts at column k0. kPlain: known when compiled that there is no score.
template <class T, bool kPlain>
__device__ __forceinline__ Selection select_groups(const FusedParams& p, int k0, int x, const RowGroup (&rows)[2], const Group& group) {
  if (kPlain || !p.score) return select24(group);
  const float4 score = __ldg(reinterpret_cast<const float4*>(p.score + k0 + group_column(x)));
  uint32_t g[4], h[4];
  scored_keys<T>(rows[0].x01, rows[0].x23, score, g);
  scored_keys<T>(rows[1].x01, rows[1].x23, score, h);
  return select24(g, h);
}

// Nibble x of each half of a lane's word belongs to its group x, of row g (low half) and row g + 8. Gives lane L of a quad the word whose nibbles q
// are lane q's nibbles L.
__device__ __forceinline__ uint32_t transpose_in_quad(uint32_t nibbles) {
  const int q = threadIdx.x % 4;
  uint32_t other = __shfl_xor_sync(0xffffffffu, nibbles, 2);
  const uint32_t bytes =
      __byte_perm(nibbles, other, q < 2 ? 0x6240 : 0x3715);  // of each half, for this lane's two x: lanes q % 2 and q % 2 + 2
  other = __shfl_xor_sync(0xffffffffu, bytes, 1);
  constexpr uint32_t kLow = 0x0f0f0f0f;
  return q % 2 ? (other >> 4 & kLow) | (bytes & ~kLow) : (bytes & kLow) | (other & kLow) << 4;
}

// The sparse operand of a warp for one stage.
template <class Config>
struct Fragments {
  PerRow<Config, uint32_t> kept[kStageGroups];  // by group x
  uint32_t metadata[Config::kTilesM];           // for both k32 steps
};

// ‖X'‖² and ‖S(X')‖² of this lane's share of its rows.
template <class Config>
struct Norms {
  PerRow<Config, float> all = {}, kept = {};
};

// Selects in the stage of X that starts at column k0.
template <class Config, bool kPlain>
__device__ __forceinline__ Fragments<Config> select_stage(const FusedParams& p, const uint8_t* tile, int k0, Norms<Config>& norms) {
  using T = typename Config::T;
  Fragments<Config> fragments;
  uint32_t selectors[Config::kTilesM][kStageGroups];
#pragma unroll
  for (int x = 0; x < kStageGroups; ++x) {
    PerRow<Config, RowGroup> groups;
    load_groups<Config, kPlain>(p, tile, k0, x, groups);
#pragma unroll
    for (int i = 0; i < Config::kTilesM; ++i) {
      const Group group = both_rows(groups[i]);
      selectors[i][x] = selectors24(select_groups<T, kPlain>(p, k0, x, groups[i], group));
      keep24(group, selectors[i][x], fragments.kept[x][i][0], fragments.kept[x][i][1]);
    }
    for_each_row<Config>([&](int i, int half) {
      add_squares<T>(groups[i][half].x01, norms.all[i][half]);
      add_squares<T>(groups[i][half].x23, norms.all[i][half]);
      add_squares<T>(fragments.kept[x][i][half], norms.kept[i][half]);
    });
  }
#pragma unroll
  for (int i = 0; i < Config::kTilesM; ++i) fragments.metadata[i] = transpose_in_quad(nibbles24(selectors[i]));
  return fragments;
}

}  // namespace rtlynx
