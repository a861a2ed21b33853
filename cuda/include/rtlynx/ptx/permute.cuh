// prmt, lop3: PTX ISA, "Data Movement and Conversion Instructions: prmt" and "Logic and Shift Instructions: lop3", for what __byte_perm and operators
// do not offer.
#pragma once

#include <cstdint>

namespace rtlynx::ptx {

// Of the bytes 0-3 of `low` and 4-7 of `high` those that the 4 nibbles of `selector` name; its upper half is not read.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// The same with nibbles whose bit 3 is set: each byte is filled with the top bit of the one that is named.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t spread_signs(uint32_t low, uint32_t high) {
  static_assert((kSelector & 0x8888) == 0x8888);
  return permute(low, high, kSelector);
}

// Any function of three bits, for each bit of a, b and c: kTable is the same function of 0xf0, 0xcc and 0xaa. Of operators and constants the
// compiler makes two instructions.
template <uint32_t kTable>
__device__ __forceinline__ uint32_t logic(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(bits) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return bits;
}

}  // namespace rtlynx::ptx
