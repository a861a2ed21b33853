// griddepcontrol: PTX ISA, "Parallel Synchronization and Communication Instructions: griddepcontrol" (sm_90). Without a launch that allows overlap
// both do nothing.
#pragma once

namespace rtlynx::ptx {

// Waits until the kernel before this one in the stream has finished and what it wrote is visible.
__device__ __forceinline__ void wait_for_previous_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets the next kernel in the stream start as soon as all blocks of this one have said so and there is room.
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace rtlynx::ptx
