// Top-2-of-4 selection in registers, shared by every kernel. Exactly reference.py's rule: the two largest keys, ties to the lower channel.
#pragma once

#include <cstdint>

namespace rtlynx {

// The outcome for one group x0..x3, given as two registers (x0 | x1 << 16) and (x2 | x3 << 16).
struct Selection {
  uint32_t kept;             // the two kept values, in channel order
  uint32_t nibble;           // first position | second position << 2
  uint32_t dropped_mask[2];  // ones where the input registers hold what was dropped
};

// How the two pairs of a group compare.
struct Comparison {
  bool second_of_01;  // k1 > k0
  bool second_of_23;  // k3 > k2
  bool keep_01;       // min(k0, k1) >= max(k2, k3)
  bool keep_23;       // min(k2, k3) >  max(k0, k1)
};

//   keep_01     keep 0, 1    nibble 0100
//   keep_23     keep 2, 3    nibble 1110
//   otherwise   the larger of each pair: nibble 1000 + second_of_01 + 4 second_of_23
__device__ __forceinline__ Selection select24(uint32_t x01, uint32_t x23, const Comparison& by) {
  Selection s;
  s.nibble = (by.second_of_01 ? 9u : 8u) + (by.second_of_23 ? 4u : 0u);
  s.nibble = by.keep_01 ? 4u : by.keep_23 ? 14u : s.nibble;
  // Value i is bytes 2i and 2i + 1 of the eight: selectors 0x10 + 0x22 i, one for each kept value.
  s.kept = __byte_perm(x01, x23, 0x1010u + (s.nibble & 3u) * 0x22u + (s.nibble >> 2) * 0x2200u);
  s.dropped_mask[0] = by.keep_01 ? 0u : by.keep_23 ? ~0u : by.second_of_01 ? 0x0000ffffu : 0xffff0000u;
  s.dropped_mask[1] = by.keep_23 ? 0u : by.keep_01 ? ~0u : by.second_of_23 ? 0x0000ffffu : 0xffff0000u;
  return s;
}

// Keys are compared as unsigned integers: the bits of a magnitude, which order like the magnitude and put NaN above infinity.
__device__ __forceinline__ Comparison compare24(uint32_t k0, uint32_t k1, uint32_t k2, uint32_t k3) {
  return {k1 > k0, k3 > k2, min(k0, k1) >= max(k2, k3), min(k2, k3) > max(k0, k1)};
}

// Selection by plain magnitude.
__device__ __forceinline__ Selection select24(uint32_t x01, uint32_t x23) {
#if __CUDA_ARCH__ >= 900
  // Hopper compares two 16-bit integers at a time. Without its sign bit a value is a non-negative one.
  constexpr uint32_t kMagnitudes = 0x7fff7fffu;
  const uint32_t even = __byte_perm(x01, x23, 0x5410) & kMagnitudes;  // k0 | k2 << 16
  const uint32_t odd = __byte_perm(x01, x23, 0x7632) & kMagnitudes;   // k1 | k3 << 16
  bool even_of_01, even_of_23, at_least_01, unused, at_most_23;
  const uint32_t larger = __vibmax_s16x2(even, odd, &even_of_23, &even_of_01);
  const uint32_t smaller = __vmins2(even, odd);
  const uint32_t rival = __byte_perm(larger, larger, 0x1032);  // the larger of the other pair
  __vibmax_s16x2(smaller, rival, &unused, &at_least_01);
  __vibmax_s16x2(rival, smaller, &at_most_23, &unused);
  return select24(x01, x23, Comparison{!even_of_01, !even_of_23, at_least_01, !at_most_23});
#else
  constexpr uint32_t kMagnitude = 0x7fff0000u;  // in the top half of a register
  return select24(x01, x23, compare24(x01 << 16 & kMagnitude, x01 & kMagnitude, x23 << 16 & kMagnitude, x23 & kMagnitude));
#endif
}

}  // namespace rtlynx
