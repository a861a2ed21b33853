// Top-2-of-4 selection in registers, shared by every kernel. Exactly reference.py's rule: the two largest keys, ties to the lower channel.
//
// Two rows go together: bits 0-15 of a register belong to row g of a tile, bits 16-31 to row g + 8. Comparisons leave their result in the top bit
// of each half, and everything after them is logic and byte permutes on whole registers: no branches, no predicates.
#pragma once

#include <cstdint>

#include "rtlynx/ptx/permute.cuh"

namespace rtlynx {

constexpr uint32_t kSigns = 0x80008000u;

// ones ? if_one : if_zero, bit by bit.
__device__ __forceinline__ uint32_t choose(uint32_t ones, uint32_t if_one, uint32_t if_zero) {
  return ptx::logic<(0xf0 & 0xcc) | (0x0f & 0xaa)>(ones, if_one, if_zero);
}

// Bits that at least two of three have.
__device__ __forceinline__ uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (a & c) | (b & c); }

// A group of 4 channels in two rows: registers that hold neighbouring channels of one row, (0 | 1 << 16) and (2 | 3 << 16).
struct Group {
  uint32_t g[2], h[2];
};

// Which channels of a group are kept: the top bit of each half of kept[i] says it of channel i in one row. The other bits mean nothing.
struct Selection {
  uint32_t kept[4];
};

// Channel i is kept if it precedes two of the other three. at_least(i, j) for i < j: whether i precedes j, key i >= key j, in the top bits.
template <class AtLeast>
__device__ __forceinline__ Selection select24(AtLeast at_least) {
  const uint32_t c01 = at_least(0, 1), c02 = at_least(0, 2), c03 = at_least(0, 3);
  const uint32_t c12 = at_least(1, 2), c13 = at_least(1, 3), c23 = at_least(2, 3);
  return {majority(c01, c02, c03), majority(~c01, c12, c13), majority(~c02, ~c12, c23), majority(~c03, ~c13, ~c23)};
}

// By plain magnitude: 15-bit integers order like magnitudes and put NaN above infinity. With its top bit set a minuend is larger than any magnitude,
// so the difference borrows nothing from the other half, and keeps that bit exactly if it is not smaller without.
__device__ __forceinline__ Selection select24(const Group& group) {
  uint32_t size[4];  // of channel i in both rows
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t g = group.g[i] & ~kSigns, h = group.h[i] & ~kSigns;
    size[2 * i] = __byte_perm(g, h, 0x5410), size[2 * i + 1] = __byte_perm(g, h, 0x7632);
  }
  return select24([&](int i, int j) { return size[i] + kSigns - size[j]; });
}

// By keys of 32 bits, compared as unsigned integers: those of row g and of row g + 8.
__device__ __forceinline__ Selection select24(const uint32_t (&g)[4], const uint32_t (&h)[4]) {
  return select24([&](int i, int j) { return (g[i] >= g[j] ? 0x8000u : 0u) | (h[i] >= h[j] ? 0x80000000u : 0u); });
}

// The kept channels as selectors of a byte permute that compresses a group: of row g in the lower half, of row g + 8 in the upper. Channel p is
// the bytes 2p and 2p + 1, so a byte of a selector is 0x10 + 0x22 p:
//
//   lower byte    channel 0 is kept 0x10, else 1 is 0x32, else 0x54
//   upper byte    channel 3 is kept 0x76, else 2 is 0x54, else 0x32      the same, all bits of 0x66 inverted
__device__ __forceinline__ uint32_t selectors24(const Selection& by) {
  const uint32_t outer = ptx::spread_signs<0xfbd9>(by.kept[0], by.kept[3]), inner = ptx::spread_signs<0xfbd9>(by.kept[1], by.kept[2]);
  const uint32_t steps = ptx::logic<0x0f & ~(0xcc ^ 0xaa)>(outer, inner, 0x22222222u);
  return ptx::logic<(0xf0 & 0xcc) ^ 0xaa>(steps, 0x66666666u, 0x76107610u);
}

// The two kept values of both rows, in channel order: (first | second << 16) of row g and of row g + 8.
__device__ __forceinline__ void keep24(const Group& group, uint32_t selectors, uint32_t& kept_g, uint32_t& kept_h) {
  kept_g = ptx::permute(group.g[0], group.g[1], selectors);
  kept_h = ptx::permute(group.h[0], group.h[1], selectors >> 16);
}

// The nibbles of 4 groups: of group c at bits 4c .. of each row's half, the position of the first kept value in 2 bits, of the second in the next 2.
//
// Each nibble of a selector has a position in its bits 1 and 2. Of two groups, one in the lower and one in the upper nibbles of each byte:
//
//   bits of a half    1-2    5-6    9-10   13-14
//   position          first  first  second second
//   of group          c      c + 1  c      c + 1      first << 7 and second << 1 are the nibbles of both in bits 8-15
__device__ __forceinline__ uint32_t nibbles24(const uint32_t (&selectors)[4]) {
  uint32_t bytes[2];  // 1 and 3 of each
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t positions = choose(0x0f0f0f0fu, selectors[2 * i], selectors[2 * i + 1]);
    bytes[i] = choose(0xcc00cc00u, positions << 1, positions << 7);
  }
  return __byte_perm(bytes[0], bytes[1], 0x7351);
}

// What was not kept, zeros in place of what was. Bits of `dropped` that are 0 keep everything.
__device__ __forceinline__ Group drop24(const Group& group, const Selection& by, uint32_t dropped) {
  constexpr uint32_t kNotBoth = 0xf0 & ~(0xcc & 0xaa);
  Group left;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    left.g[i] = ptx::logic<kNotBoth>(group.g[i], ptx::spread_signs<0xdd99>(by.kept[2 * i], by.kept[2 * i + 1]), dropped);
    left.h[i] = ptx::logic<kNotBoth>(group.h[i], ptx::spread_signs<0xffbb>(by.kept[2 * i], by.kept[2 * i + 1]), dropped);
  }
  return left;
}

}  // namespace rtlynx
