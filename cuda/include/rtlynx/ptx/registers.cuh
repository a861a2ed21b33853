// setmaxnreg: PTX ISA, "Miscellaneous Instructions: setmaxnreg" (sm_90a). Every warp of the warpgroup must execute it.
#pragma once

namespace rtlynx::ptx {

template <int Registers>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace rtlynx::ptx
