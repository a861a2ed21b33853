// CUTLASS's sparse GEMM for Hopper, for rtlynx.bench.cutlass, which compiles this file where CUTLASS's headers are:
//
//   D (m, n) = A (m, k) · B (n, k)ᵀ     bfloat16 row-major, float32 accumulators; A is 2:4 along k and compressed; no bias, no C
//
// A kernel is a tile, a cluster and a schedule. How many output tiles a block column of the raster has ("swizzle") is chosen with each call.
// All functions but the first three return nullptr, or what went wrong.

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/transform/device/transform_universal_adapter.hpp"
#include "cutlass/transform/kernel/sparse_gemm_compressor.hpp"

namespace {

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using Problem = cute::Shape<int, int, int, int>;  // m, n, k, batches
using cute::_1;

constexpr int kAlignment = 16 / sizeof(Element);  // what TMA asks of a row

struct Pingpong {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

struct Cooperative {
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

const char* message(cutlass::Status status) { return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status); }

cutlass::KernelHardwareInfo hardware() {
  cutlass::KernelHardwareInfo info;
  cudaGetDevice(&info.device_id);
  info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(info.device_id);
  return info;
}

template <class Tile, class Cluster, class Schedule>
struct Kernel {
  // Without C (void), its shared memory is the main loop's.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
      float, void, RowMajor, kAlignment, Element, RowMajor, kAlignment, typename Schedule::Epilogue>::CollectiveOp;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop =
      typename cutlass::gemm::collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, RowMajor,
                                                            kAlignment, Element, cutlass::layout::ColumnMajor, kAlignment, float, Tile,
                                                            Cluster, Stages, typename Schedule::Mainloop>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>>;
  using Config = typename Mainloop::SparseConfig;
  using Compressor = cutlass::transform::device::TransformUniversalAdapter<
      cutlass::transform::kernel::StructuredSparseCompressor<Problem, Element, RowMajor, Config, cutlass::arch::Sm90>>;
  using Metadata = typename Mainloop::ElementE;

  static typename Gemm::Arguments arguments(int m, int n, int k, int swizzle, const void* values, const void* metadata, const void* b,
                                            void* d) {
    const Problem problem{m, n, k, 1};
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       problem,
                                       {static_cast<const Element*>(values),
                                        Config::fill_layoutA(problem),
                                        static_cast<const Element*>(b),
                                        {k, _1{}, 0},
                                        static_cast<const Metadata*>(metadata),
                                        Config::fill_layoutE(problem)},
                                       {{1.0f, 0.0f}, nullptr, {n, _1{}, 0}, static_cast<Element*>(d), {n, _1{}, 0}},
                                       hardware()};
    arguments.scheduler.max_swizzle_size = swizzle;
    return arguments;
  }

  // Bytes of the values of A, of its metadata and of the workspace.
  static const char* sizes(int m, int n, int k, int64_t* bytes) {
    const Problem problem{m, n, k, 1};
    const auto call = arguments(m, n, k, 1, nullptr, nullptr, nullptr, nullptr);
    bytes[0] = cute::cosize(Config::fill_layoutA(problem)) / Config::ElementASparsity::value * sizeof(Element);
    bytes[1] = cute::cosize(Config::fill_layoutE(problem)) / Config::ElementEMmaSparsity::value;
    bytes[2] = static_cast<int64_t>(Gemm::get_workspace_size(call));
    return message(Gemm::can_implement(call));
  }

  static const char* compress(int m, int k, const void* a, void* values, void* metadata, cudaStream_t stream) {
    typename Compressor::Arguments arguments{{m, 0, k, 1}, {a, {k, _1{}, 0}, values, metadata}, hardware()};
    if (const char* refusal = message(Compressor::can_implement(arguments))) return refusal;
    Compressor compressor;
    return message(compressor(arguments, nullptr, stream));  // its workspace is not used
  }

  static const char* run(int m, int n, int k, int swizzle, const void* values, const void* metadata, const void* b, void* d,
                         void* workspace, cudaStream_t stream) {
    Gemm gemm;
    return message(gemm(arguments(m, n, k, swizzle, values, metadata, b, d), workspace, stream));
  }
};

struct Entry {
  const char* name;
  int tile_k;
  const char* (*sizes)(int, int, int, int64_t*);
  const char* (*compress)(int, int, const void*, void*, void*, cudaStream_t);
  const char* (*run)(int, int, int, int, const void*, const void*, const void*, void*, void*, cudaStream_t);
};

template <int kTileM, int kTileN, int kTileK, int kClusterM, int kClusterN, class Schedule>
constexpr Entry entry(const char* name) {
  using cute::Int;
  using This = Kernel<cute::Shape<Int<kTileM>, Int<kTileN>, Int<kTileK>>, cute::Shape<Int<kClusterM>, Int<kClusterN>, _1>, Schedule>;
  return {name, kTileK, This::sizes, This::compress, This::run};
}

// For thousands of rows of A. A larger tile reads less for each product, a deeper one waits less often.
constexpr Entry kEntries[] = {
    entry<128, 128, 128, 1, 1, Pingpong>("128x128x128_1x1_pingpong"),
    entry<128, 128, 128, 2, 1, Pingpong>("128x128x128_2x1_pingpong"),
    entry<128, 192, 128, 2, 1, Cooperative>("128x192x128_2x1_cooperative"),
    entry<128, 256, 128, 2, 1, Cooperative>("128x256x128_2x1_cooperative"),
    entry<128, 256, 64, 2, 1, Cooperative>("128x256x64_2x1_cooperative"),
    entry<256, 128, 128, 1, 1, Cooperative>("256x128x128_1x1_cooperative"),
    entry<256, 128, 128, 2, 1, Cooperative>("256x128x128_2x1_cooperative"),
    entry<256, 128, 64, 1, 2, Cooperative>("256x128x64_1x2_cooperative"),
    entry<256, 192, 64, 1, 1, Cooperative>("256x192x64_1x1_cooperative"),
};
constexpr int kCount = sizeof(kEntries) / sizeof(Entry);

}  // namespace

extern "C" {

int rtlynx_cutlass_count() { return kCount; }

const char* rtlynx_cutlass_name(int kernel) { return kEntries[kernel].name; }

// Kernels with the same one read the same compressed A.
int rtlynx_cutlass_tile_k(int kernel) { return kEntries[kernel].tile_k; }

const char* rtlynx_cutlass_sizes(int kernel, int m, int n, int k, int64_t* bytes) { return kEntries[kernel].sizes(m, n, k, bytes); }

const char* rtlynx_cutlass_compress(int kernel, int m, int k, const void* a, void* values, void* metadata, cudaStream_t stream) {
  return kEntries[kernel].compress(m, k, a, values, metadata, stream);
}

const char* rtlynx_cutlass_run(int kernel, int m, int n, int k, int swizzle, const void* values, const void* metadata, const void* b,
                               void* d, void* workspace, cudaStream_t stream) {
  return kEntries[kernel].run(m, n, k, swizzle, values, metadata, b, d, workspace, stream);
}

}  // extern "C"
