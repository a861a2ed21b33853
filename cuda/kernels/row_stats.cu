// row_stats: mean and rstd of every row of x in one read. A warp takes a row, a lane every 32nd vector of 8 elements of it:
//
//   row    | lane 0 | lane 1 |  ...  | lane 31 | lane 0 |  ...        16 bytes each
//
// The variance is that of deviations, as accurate as in two passes: of each vector its own mean and the squares of what deviates from that, then two
// such summaries make one (Chan, Golub, LeVeque 1979). Where rows are not centered all means are 0, and the same sums are those of squares.

#include "rtlynx/element.cuh"
#include "rtlynx/params.cuh"

namespace rtlynx {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kVector = 8;    // elements of a 16-byte load
constexpr int kInFlight = 4;  // loads of a lane

// Of `count` elements: their mean, and the sum of the squared deviations from it.
struct Summary {
  float count, mean, squares;

  __device__ __forceinline__ void add(const Summary& other) {
    const float both = count + other.count;
    const float share = both > 0.0f ? __fdividef(other.count, both) : 0.0f;
    const float apart = other.mean - mean;
    squares += other.squares + apart * apart * count * share;
    mean += apart * share;
    count = both;
  }
};

template <class T>
__device__ __forceinline__ Summary summary_of(const uint4& vector, bool centered) {
  const float2 x[4] = {T::unpack(vector.x), T::unpack(vector.y), T::unpack(vector.z), T::unpack(vector.w)};
  const float sum = ((x[0].x + x[0].y) + (x[1].x + x[1].y)) + ((x[2].x + x[2].y) + (x[3].x + x[3].y));
  const float mean = centered ? sum / kVector : 0.0f;
  float squares = 0.0f;
#pragma unroll
  for (const float2& pair : x) {
    const float a = pair.x - mean, b = pair.y - mean;
    squares = fmaf(a, a, fmaf(b, b, squares));
  }
  return {kVector, mean, squares};
}

template <class T>
__device__ __forceinline__ void row_stats(const RowStatsParams& p) {
  const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.m) return;  // the whole warp
  const auto* x = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.x) + row * p.ldx);
  const int vectors = p.k / kVector;
  Summary all = {};
  int i = lane;
  for (; i + (kInFlight - 1) * 32 < vectors; i += kInFlight * 32) {
    uint4 loaded[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) loaded[j] = __ldg(x + i + j * 32);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) all.add(summary_of<T>(loaded[j], p.centered));
  }
  for (; i < vectors; i += 32) all.add(summary_of<T>(__ldg(x + i), p.centered));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    all.add({__shfl_xor_sync(0xffffffffu, all.count, distance), __shfl_xor_sync(0xffffffffu, all.mean, distance),
             __shfl_xor_sync(0xffffffffu, all.squares, distance)});
  }
  if (lane == 0) reinterpret_cast<float2*>(p.stats)[row] = {all.mean, 1.0f / sqrtf(all.squares / p.k + p.eps)};
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_ROW_STATS(name, T)                                                                                         \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads) name(const __grid_constant__ rtlynx::RowStatsParams p) { \
    rtlynx::row_stats<rtlynx::T>(p);                                                                                      \
  }

RTLYNX_ROW_STATS(row_stats_bf16, Bf16)
RTLYNX_ROW_STATS(row_stats_f16, F16)
