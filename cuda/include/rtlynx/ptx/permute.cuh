// prmt: PTX ISA, "Data Movement and Conversion Instructions: prmt", for what __byte_perm does not offer.
#pragma once

#include <cstdint>

namespace rtlynx::ptx {

// Fills each 16-bit half of a register with its top bit: a selector with bit 3 set copies a byte's sign.
__device__ __forceinline__ uint32_t spread_signs(uint32_t x) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(x));
  return mask;
}

}  // namespace rtlynx::ptx
