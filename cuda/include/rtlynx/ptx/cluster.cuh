// Thread block clusters: PTX ISA, "barrier.cluster", "mapa" and "ld.shared::cluster" (sm_90).
#pragma once

#include <cstdint>

namespace rtlynx::ptx {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// All threads of all blocks of the cluster; shared memory written before is visible after, in every block.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Reads what stands at this block's shared address `shared` in block `rank` of the cluster.
__device__ __forceinline__ float2 load_shared_of(uint32_t shared, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared), "r"(rank));
  float2 value;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(remote) : "memory");
  return value;
}

}  // namespace rtlynx::ptx
