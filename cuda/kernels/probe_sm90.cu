// probe_sm90: what the tensor cores of Hopper give when nothing has to be loaded. The limit that spmm_sm90 is measured against.
//
// One block a multiprocessor, two warpgroups of two m64n192 tiles each, as in spmm_sm90's 256 x 192. The operands of a step of 64 dense
// columns are put in place once; then the step is repeated:
//
//             sparse: wgmma.sp m64n192k32, 2 a step       dense: wgmma m64n192k16, 4 a step
//   A         256 rows of 64 bytes, SW64                  256 rows of 128 bytes, SW128
//   W         192 rows of 128 bytes, SW128                the same
//
// SS reads A from shared memory, RS holds it in registers. Swizzled or not, the data is random: a test decodes it.

#include "rtlynx/element.cuh"
#include "rtlynx/format.cuh"
#include "rtlynx/params.cuh"
#include "rtlynx/ptx/cp_async.cuh"
#include "rtlynx/ptx/wgmma.cuh"
#include "rtlynx/ptx/wgmma_rs.cuh"

namespace rtlynx {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 256, kOutputs = 192;
constexpr int kTiles = 2;  // m64 tiles of a warpgroup
constexpr int kWBytes = kOutputs * kWordCols * 2;

template <bool kSparse>
struct Operand {
  static constexpr int kRowBytes = kSparse ? kWordCols : 2 * kWordCols;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr ptx::Swizzle kSwizzle = kSparse ? ptx::Swizzle::k64Bytes : ptx::Swizzle::k128Bytes;
  static constexpr int kInstructions = kRowBytes / 32;          // along K: each takes 32 bytes of a row of A,
  static constexpr int kWStep = 2 * kWordCols / kInstructions;  // and these of a row of W
};

// Fills A (kRows rows) and then W of shared memory from `data`, byte for byte.
template <bool kSparse>
__device__ __forceinline__ void fill(const void* data, uint32_t shared) {
  for (int i = threadIdx.x; i < (Operand<kSparse>::kBytes + kWBytes) / 16; i += kThreads) {
    ptx::cp_async_16(shared + 16 * i, static_cast<const uint4*>(data) + i, true);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  __syncthreads();
}

// The lane's fragments of its warp's m16 rows from row-major A: registers 0..3 are rows g, g + 8, g, g + 8, the last two 16 bytes further.
template <bool kSparse>
__device__ __forceinline__ void load_fragments(const void* data, int row, int lane, uint32_t (&a)[Operand<kSparse>::kInstructions][4]) {
#pragma unroll
  for (int k = 0; k < Operand<kSparse>::kInstructions; ++k) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int offset = (row + lane / 4 + r % 2 * 8) * Operand<kSparse>::kRowBytes + k * 32 + r / 2 * 16 + lane % 4 * 4;
      a[k][r] = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(data) + offset));
    }
  }
}

template <bool kSparse, bool kFromRegisters>
__device__ __forceinline__ void probe(const ProbeParams& p) {
  using A = Operand<kSparse>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  fill<kSparse>(p.data, shared);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, row0 = threadIdx.x / 128 * kTiles * 64;
  const uint64_t a = ptx::matrix_descriptor<A::kSwizzle>(shared + row0 * A::kRowBytes);
  const uint64_t w = ptx::matrix_descriptor<ptx::Swizzle::k128Bytes>(shared + A::kBytes);
  uint32_t fragments[kTiles][A::kInstructions][4];
  uint32_t metadata[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int row = row0 + 64 * i + 16 * warp;
    if constexpr (kFromRegisters) load_fragments<kSparse>(p.data, row, lane, fragments[i]);
    if constexpr (kSparse) metadata[i] = __ldg(p.metadata + metadata_index(row, 0, lane, kRows));
  }

  float acc[kTiles][96] = {};
  const int64_t start = clock64();
  for (int s = 0; s < p.steps; ++s) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < A::kInstructions; ++k) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint64_t a_k = ptx::advanced(a, i * 64 * A::kRowBytes + k * 32), w_k = ptx::advanced(w, k * A::kWStep);
        if constexpr (kSparse && kFromRegisters) {
          if (k == 0) ptx::wgmma_sp_rs_k32<0>(Bf16{}, acc[i], fragments[i][k], w_k, metadata[i]);
          if (k == 1) ptx::wgmma_sp_rs_k32<1>(Bf16{}, acc[i], fragments[i][k], w_k, metadata[i]);
        } else if constexpr (kSparse) {
          if (k == 0) ptx::wgmma_sp_k32<0>(Bf16{}, acc[i], a_k, w_k, metadata[i], true);
          if (k == 1) ptx::wgmma_sp_k32<1>(Bf16{}, acc[i], a_k, w_k, metadata[i], true);
        } else if constexpr (kFromRegisters) {
          ptx::wgmma_rs_k16(Bf16{}, acc[i], fragments[i][k], w_k);
        } else {
          ptx::wgmma_k16(Bf16{}, acc[i], a_k, w_k);
        }
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  const int64_t cycles = clock64() - start;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    ptx::pin_registers(acc[i]);
#pragma unroll
    for (int j = 0; j < 96; ++j) sum += acc[i][j];
  }
  const int place = blockIdx.x * kThreads + threadIdx.x;
  p.cycles[place] = cycles;
  p.sums[place] = sum;
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_PROBE(name, sparse, from_registers)                                                                        \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, 1) name(const __grid_constant__ rtlynx::ProbeParams p) { \
    rtlynx::probe<sparse, from_registers>(p);                                                                             \
  }

RTLYNX_PROBE(probe_sm90_dense_ss, false, false)
RTLYNX_PROBE(probe_sm90_dense_rs, false, true)
RTLYNX_PROBE(probe_sm90_sparse_ss, true, false)
RTLYNX_PROBE(probe_sm90_sparse_rs, true, true)
