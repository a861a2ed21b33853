// How a warp selects in a unit of 16 rows x 64 columns, shared by the sparsify kernels. Lane (g = lane / 4, q = lane % 4) owns 16 columns of two
// rows, which is just what its metadata word describes, so no lane talks to another:
//
//                      64 columns
//            +--------+--------+--------+--------+
//   row g    |  q = 0 |  q = 1 |  q = 2 |  q = 3 |     32 bytes of X in, 16 bytes of values out, half a word of metadata
//   row g+8  |  q = 0 |  q = 1 |  q = 2 |  q = 3 |
//            +--------+--------+--------+--------+
#pragma once

#include "rtlynx/element.cuh"
#include "rtlynx/format.cuh"
#include "rtlynx/params.cuh"
#include "rtlynx/ptx/registers.cuh"
#include "rtlynx/select24.cuh"

namespace rtlynx {

constexpr int kLaneCols = 16;                    // columns a lane owns in a unit, of each of its two rows
constexpr int kLanePairs = kLaneCols / 2;        // registers they fill
constexpr int kLaneGroups = kLaneCols / kGroup;  // groups they form

// The lane's 2 x 16 elements of a unit, two to a register.
struct LaneTile {
  uint32_t pairs[2][kLanePairs];
};

// Of a gathered unit lane q loads piece q (format.cuh), which still has to be exchanged.
template <bool kGathered>
__device__ __forceinline__ LaneTile load_tile(const SparsifyParams& p, int row, int col) {
  LaneTile tile = {};
  const int first = kGathered ? piece_column(col / kWordCols * kWordCols, col % kWordCols / kPieceCols, p.k) : col;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half < p.m && col < p.k) {
      const auto* source = static_cast<const uint16_t*>(p.x) + (row + 8 * half) * p.ldx + first;
      const uint4 low = __ldg(reinterpret_cast<const uint4*>(source));
      const uint4 high = __ldg(reinterpret_cast<const uint4*>(source) + 1);
      uint32_t (&r)[kLanePairs] = tile.pairs[half];
      r[0] = low.x, r[1] = low.y, r[2] = low.z, r[3] = low.w;
      r[4] = high.x, r[5] = high.y, r[6] = high.z, r[7] = high.w;
    }
  }
  return tile;
}

// Rows past the end stay zero: the metadata describes them as padding.
template <class T, class Params>
__device__ __forceinline__ void subtract_shift(const Params& p, int row, int col, LaneTile& tile) {
#pragma unroll
  for (int i = 0; i < kLanePairs; ++i) {
    const float2 shift = __ldg(reinterpret_cast<const float2*>(p.shift + col) + i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + 8 * half >= p.m) continue;
      const float2 x = T::unpack(tile.pairs[half][i]);
      tile.pairs[half][i] = T::pack(x.x - shift.x, x.y - shift.y);
    }
  }
}

// What selection compares in one row's group: magnitudes times scores, in float32.
template <class T>
__device__ __forceinline__ void scored_keys(uint32_t x01, uint32_t x23, float4 score, uint32_t (&keys)[4]) {
  constexpr uint32_t kMagnitude = 0x7fffffffu;
  const float2 low = T::unpack(x01), high = T::unpack(x23);
  keys[0] = __float_as_uint(low.x * score.x) & kMagnitude, keys[1] = __float_as_uint(low.y * score.y) & kMagnitude;
  keys[2] = __float_as_uint(high.x * score.z) & kMagnitude, keys[3] = __float_as_uint(high.y * score.w) & kMagnitude;
}

template <class T>
__device__ __forceinline__ void add_squares(uint32_t pair, float& sum) {
  const float2 x = T::unpack(pair);
  sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
}

__device__ __forceinline__ float sum_over_quad(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// The metadata word that the instruction for these operands wants of a lane, from the lane's own: for 8-bit ones those of two neighbours trade
// halves, so that the even lane describes 32 columns of row g and the odd one those of row g + 8. The whole warp must call it.
template <class Operand>
__device__ __forceinline__ uint32_t stored_word(uint32_t word) {
  if constexpr (kBytesOf<Operand> == 1) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, word, 1);
    return threadIdx.x % 2 ? __byte_perm(other, word, 0x7632) : __byte_perm(word, other, 0x5410);
  } else {
    return word;
  }
}

// What selection makes of a lane's tile.
template <class T>
struct SelectedTile {
  uint32_t word;                          // metadata
  uint32_t compressed[2][kLaneGroups];    // kept values of rows g and g + 8
  LaneTile branch_input;                  // what the branch reads: what was dropped, or all of x
  float norm[2] = {}, norm_kept[2] = {};  // this lane's part of ‖X‖² and ‖S(X)‖² of its rows

  template <class Params>
  __device__ __forceinline__ SelectedTile(const Params& p, int col, const LaneTile& x) {
    // Decided once: a branch in every group would keep the groups from being worked on side by side.
    if (p.score) {
      select(p, x, [&](const Group&, int c) {
        const float4 score = __ldg(reinterpret_cast<const float4*>(p.score + col) + c);
        uint32_t g[4], h[4];
        scored_keys<T>(x.pairs[0][2 * c], x.pairs[0][2 * c + 1], score, g);
        scored_keys<T>(x.pairs[1][2 * c], x.pairs[1][2 * c + 1], score, h);
        return select24(g, h);
      });
    } else {
      select(p, x, [](const Group& group, int) { return select24(group); });
    }
  }

  template <class Params, class Select>
  __device__ __forceinline__ void select(const Params& p, const LaneTile& x, Select select) {
    const uint32_t dropped = 0u - p.branch_of_dropped;
    uint32_t selectors[kLaneGroups];
#pragma unroll
    for (int c = 0; c < kLaneGroups; ++c) {
      const Group group = {{x.pairs[0][2 * c], x.pairs[0][2 * c + 1]}, {x.pairs[1][2 * c], x.pairs[1][2 * c + 1]}};
      const Selection by = select(group, c);
      selectors[c] = selectors24(by);
      keep24(group, selectors[c], compressed[0][c], compressed[1][c]);
      const Group left = drop24(group, by, dropped);
#pragma unroll
      for (int i = 0; i < 2; ++i) branch_input.pairs[0][2 * c + i] = left.g[i], branch_input.pairs[1][2 * c + i] = left.h[i];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        add_squares<T>(x.pairs[half][2 * c], norm[half]);
        add_squares<T>(x.pairs[half][2 * c + 1], norm[half]);
        add_squares<T>(compressed[half][c], norm_kept[half]);
      }
    }
    word = nibbles24(selectors);
  }
};

// Where the lane's kept values go: those of columns `col` .. of the rows `row` and row + 8.
template <class Operand>
struct LaneValues {
  uint8_t* at;   // of the first row
  int64_t next;  // bytes to the second
  int rows;      // that there are from the first on
  float scale;   // of e4m3 values

  template <class Params>
  __device__ __forceinline__ LaneValues(const Params& p, int row, int col)
      : at(ptx::opaque(static_cast<uint8_t*>(p.values) + (static_cast<int64_t>(row) * (p.k / 2) + col / 2) * kBytesOf<Operand>)),
        next(static_cast<int64_t>(p.k) * 4 * kBytesOf<Operand>),
        rows(p.m - row) {
    if constexpr (kBytesOf<Operand> == 1) scale = p.values_scale;
  }

  // Stores those of the columns that begin `col` behind the first.
  template <class T>
  __device__ __forceinline__ void store(T, uint32_t col, const uint32_t (&compressed)[2][kLaneGroups]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (rows <= 8 * half) continue;
      void* target = at + col / 2 * kBytesOf<Operand> + half * next;
      const uint32_t (&pairs)[kLaneGroups] = compressed[half];
      if constexpr (kBytesOf<Operand> == 2) {
        *static_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      } else {
        uint32_t halves[kLaneGroups];
#pragma unroll
        for (int c = 0; c < kLaneGroups; ++c) {
          const float2 x = T::unpack(pairs[c]);
          halves[c] = Operand::pack(x.x * scale, x.y * scale);
        }
        *static_cast<uint2*>(target) = make_uint2(halves[0] | halves[1] << 16, halves[2] | halves[3] << 16);
      }
    }
  }
};

}  // namespace rtlynx
