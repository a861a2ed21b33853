// Top-2-of-4 selection in registers, shared by every kernel. Exactly reference.py's rule: the two largest keys, ties to the lower channel.
//
// Two rows go together: bits 0-15 of a register belong to row g of a tile, bits 16-31 to row g + 8. Comparisons give masks (0xffff or 0 in each
// half), and everything after them is logic on whole registers: no branches, no predicates.
#pragma once

#include <cstdint>

#include "rtlynx/ptx/permute.cuh"

namespace rtlynx {

constexpr uint32_t kSigns = 0x80008000u;

// ones ? if_one : if_zero, bit by bit.
__device__ __forceinline__ uint32_t choose(uint32_t ones, uint32_t if_one, uint32_t if_zero) { return (ones & if_one) | (~ones & if_zero); }

// A group of 4 channels in two rows: x[i] holds channel i of both.
struct Group {
  uint32_t x[4];

  // From registers that hold neighbouring channels of one row: (0 | 1 << 16) and (2 | 3 << 16) of row g, then of row g + 8.
  __device__ __forceinline__ Group(uint32_t g01, uint32_t g23, uint32_t h01, uint32_t h23)
      : x{__byte_perm(g01, h01, 0x5410), __byte_perm(g01, h01, 0x7632), __byte_perm(g23, h23, 0x5410), __byte_perm(g23, h23, 0x7632)} {}
};

// How the keys k0..k3 of a group compare, as masks.
struct Ranking {
  uint32_t first_of_01;  // k0 >= k1
  uint32_t first_of_23;  // k2 >= k3
  uint32_t keep_01;      // min(k0, k1) >= max(k2, k3)
  uint32_t keep_23;      // min(k2, k3) >  max(k0, k1)
};

// Compares magnitudes as 15-bit integers, which order like them and put NaN above infinity. With its top bit set a minuend is larger than any
// magnitude, so the difference borrows nothing from the other half, and keeps that bit exactly if it is not smaller without.
__device__ __forceinline__ uint32_t at_least(uint32_t a, uint32_t b) { return ptx::spread_signs((a | kSigns) - (b & ~kSigns)); }

// By plain magnitude.
__device__ __forceinline__ Ranking rank24(const Group& group) {
  const uint32_t (&x)[4] = group.x;
  Ranking by;
  by.first_of_01 = at_least(x[0], x[1]);
  by.first_of_23 = at_least(x[2], x[3]);
  const uint32_t larger_of_01 = choose(by.first_of_01, x[0], x[1]), smaller_of_01 = choose(by.first_of_01, x[1], x[0]);
  const uint32_t larger_of_23 = choose(by.first_of_23, x[2], x[3]), smaller_of_23 = choose(by.first_of_23, x[3], x[2]);
  by.keep_01 = at_least(smaller_of_01, larger_of_23);
  by.keep_23 = ~at_least(larger_of_01, smaller_of_23);
  return by;
}

// By keys of 32 bits, compared as unsigned integers: those of row g and of row g + 8.
__device__ __forceinline__ Ranking rank24(const uint32_t (&g)[4], const uint32_t (&h)[4]) {
  const auto mask = [](bool of_g, bool of_h) { return (of_g ? 0x0000ffffu : 0u) | (of_h ? 0xffff0000u : 0u); };
  return {mask(g[0] >= g[1], h[0] >= h[1]), mask(g[2] >= g[3], h[2] >= h[3]),
          mask(min(g[0], g[1]) >= max(g[2], g[3]), min(h[0], h[1]) >= max(h[2], h[3])),
          mask(min(g[2], g[3]) > max(g[0], g[1]), min(h[2], h[3]) > max(h[0], h[1]))};
}

// The two kept values of both rows, in channel order: (first | second << 16) of row g and of row g + 8.
__device__ __forceinline__ void keep24(const Group& group, const Ranking& by, uint32_t& kept_g, uint32_t& kept_h) {
  const uint32_t (&x)[4] = group.x;
  const uint32_t first = choose(by.keep_01, x[0], choose(by.keep_23, x[2], choose(by.first_of_01, x[0], x[1])));
  const uint32_t second = choose(by.keep_01, x[1], choose(by.keep_23, x[3], choose(by.first_of_23, x[2], x[3])));
  kept_g = __byte_perm(first, second, 0x5410);
  kept_h = __byte_perm(first, second, 0x7632);
}

// The nibbles of both rows, each at bits 4c .. of its half: position of the first kept value in 2 bits, of the second in the next 2.
//
//   keep_01     keep 0, 1    nibble 0100
//   keep_23     keep 2, 3    nibble 1110
//   otherwise   the larger of each pair: nibble 1ab0 + a, where b = first_of_23 does not hold and a = first_of_01 does not hold
__device__ __forceinline__ uint32_t nibbles24(const Ranking& by, int c) {
  const uint32_t ones = 0x00010001u << 4 * c;
  return (~(by.first_of_01 | by.keep_01 | by.keep_23) & ones) | (by.keep_23 & ones * 2) |
         ((by.keep_01 | by.keep_23 | ~by.first_of_23) & ones * 4) | (~by.keep_01 & ones * 8);
}

// What was not kept, zeros in place of what was; in the registers' order that Group was made from. Bits of `dropped` that are 0 keep everything.
__device__ __forceinline__ void drop24(const Group& group, const Ranking& by, uint32_t dropped, uint32_t (&g)[2], uint32_t (&h)[2]) {
  const uint32_t neither = ~(by.keep_01 | by.keep_23);
  const uint32_t kept[4] = {by.keep_01 | (by.first_of_01 & neither), by.keep_01 | (~by.first_of_01 & neither),
                            by.keep_23 | (by.first_of_23 & neither), by.keep_23 | (~by.first_of_23 & neither)};
  uint32_t left[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = group.x[i] & ~(kept[i] & dropped);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    g[i] = __byte_perm(left[2 * i], left[2 * i + 1], 0x5410);
    h[i] = __byte_perm(left[2 * i], left[2 * i + 1], 0x7632);
  }
}

}  // namespace rtlynx
