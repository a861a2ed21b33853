// setmaxnreg: PTX ISA, "Miscellaneous Instructions: setmaxnreg" (sm_90a). Every warp of the warpgroup must execute it. And registers as the compiler
// sees them.
#pragma once

#include <cstdint>

namespace rtlynx::ptx {

template <int Registers>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// `value`, of which the compiler no longer knows how it was computed: it neither computes it again later nor what follows from it before.
template <class T>
__device__ __forceinline__ T opaque(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
  return value;
}

}  // namespace rtlynx::ptx
