// Top-2-of-4 selection in registers, shared by every kernel. Exactly reference.py's rule: the two largest keys, ties to the lower channel.
#pragma once

#include <cstdint>

namespace rtlynx {

// The outcome for one group x0..x3, given as two registers (x0 | x1 << 16) and (x2 | x3 << 16).
struct Selection {
  uint32_t kept;        // the two kept values, in channel order
  uint32_t nibble;      // first position | second position << 2
  uint32_t dropped[2];  // the group with the kept values zeroed, in the layout of the input
};

// Keys are compared as unsigned integers: the bits of a magnitude, which order like the magnitude and put NaN above infinity.
//
//   min(k0, k1) >= max(k2, k3)  keep 0, 1    nibble 0100
//   min(k2, k3) >  max(k0, k1)  keep 2, 3    nibble 1110
//   otherwise                   the larger of each pair: nibble 1000 + (k1 > k0) + 4 (k3 > k2)
__device__ __forceinline__ Selection select24(uint32_t x01, uint32_t x23, uint32_t k0, uint32_t k1, uint32_t k2, uint32_t k3) {
  const bool second_of_01 = k1 > k0;
  const bool second_of_23 = k3 > k2;
  const bool keep_01 = min(k0, k1) >= max(k2, k3);
  const bool keep_23 = min(k2, k3) > max(k0, k1);

  Selection s;
  uint32_t bytes = (second_of_01 ? 0x0032u : 0x0010u) | (second_of_23 ? 0x7600u : 0x5400u);
  bytes = keep_01 ? 0x3210u : keep_23 ? 0x7654u : bytes;
  s.kept = __byte_perm(x01, x23, bytes);

  s.nibble = 8u + (second_of_01 ? 1u : 0u) + (second_of_23 ? 4u : 0u);
  s.nibble = keep_01 ? 4u : keep_23 ? 14u : s.nibble;

  const uint32_t other_of_01 = second_of_01 ? x01 & 0x0000ffffu : x01 & 0xffff0000u;
  const uint32_t other_of_23 = second_of_23 ? x23 & 0x0000ffffu : x23 & 0xffff0000u;
  s.dropped[0] = keep_01 ? 0u : keep_23 ? x01 : other_of_01;
  s.dropped[1] = keep_01 ? x23 : keep_23 ? 0u : other_of_23;
  return s;
}

// Selection by plain magnitude: the key is the value without its sign, moved to the top half of a register.
__device__ __forceinline__ Selection select24(uint32_t x01, uint32_t x23) {
  constexpr uint32_t kMagnitude = 0x7fff0000u;
  return select24(x01, x23, x01 << 16 & kMagnitude, x01 & kMagnitude, x23 << 16 & kMagnitude, x23 & kMagnitude);
}

}  // namespace rtlynx
