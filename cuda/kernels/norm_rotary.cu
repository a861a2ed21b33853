// norm_rotary: queries or keys from their projections to attention in one pass: each head's RMS norm, the text's tokens before the image's, rotation.
// A group of lanes takes a token and up to kHeads of its heads, a lane 8 channels, which are 4 pairs, of each:
//
//   out row r = (sample, token)            group 0     | lane 0 | lane 1 |  ...  |       16 bytes each, the lanes of a head side by side
//     token <  first_tokens: from first      head 0    |  ...
//     else: from x, first_tokens before      head 1    |  ...                            kInFlight heads are loaded before one is computed
//   out row r + 1                          group 1     |  ...
//
// So a lane loads the cosines and sines of its pairs, and its part of the norm's weight, once for all these heads. Where heads have fewer channels than
// the lanes take, the last lanes load zeros and store nothing.

#include "rtlynx/element.cuh"
#include "rtlynx/params.cuh"

namespace rtlynx {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;    // elements of a 16-byte load
constexpr int kHeads = 8;     // of a group
constexpr int kInFlight = 4;  // loads of a lane

// What a lane knows of its channels.
struct Lane {
  float cos[kVector / 2], sin[kVector / 2];
  uint4 weight;  // ones where there is no norm
  bool normed;
};

template <class T>
__device__ __forceinline__ float squares(const uint4& vector) {
  const float2 x[4] = {T::unpack(vector.x), T::unpack(vector.y), T::unpack(vector.z), T::unpack(vector.w)};
  float sum = 0.0f;
#pragma unroll
  for (const float2& pair : x) sum = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sum));
  return sum;
}

// One pair: normed and rounded as torch's norm does, then rotated and rounded. A weight and an rstd of 1 leave it as it is.
template <class T>
__device__ __forceinline__ uint32_t turned(uint32_t pair, uint32_t weight, float rstd, float cos, float sin) {
  const float2 read = T::unpack(pair), w = T::unpack(weight);
  const float2 x = T::unpack(T::pack(w.x * (rstd * read.x), w.y * (rstd * read.y)));
  return T::pack(x.x * cos - x.y * sin, x.x * sin + x.y * cos);
}

template <class T, int kLanes>
__device__ __forceinline__ void norm_rotary(const NormRotaryParams& p) {
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int column = threadIdx.x % kLanes * kVector;
  const int length = p.first_tokens + p.tokens;
  const bool there = row < p.samples * length && column < p.dim;  // no lane returns: those of a warp exchange their sums
  const int sample = row / length, token = row % length;
  const bool of_first = token < p.first_tokens;

  const uint32_t ones = T::pack(1.0f, 1.0f);
  Lane lane = {{}, {}, {ones, ones, ones, ones}, false};
  const float eps = of_first ? p.first_eps : p.eps, share = __fdividef(1.0f, p.dim);
  const int first_head = blockIdx.y * kHeads;
  const uint16_t* from = nullptr;
  int64_t head_stride = 0;
  if (there) {
    const int64_t at = token, of = sample;
    from = of_first ? static_cast<const uint16_t*>(p.first) + of * p.first_sample_stride + at * p.first_token_stride
                    : static_cast<const uint16_t*>(p.x) + of * p.sample_stride + (at - p.first_tokens) * p.token_stride;
    head_stride = of_first ? p.first_head_stride : p.head_stride;
    from += first_head * head_stride + column;
    const auto* weight = static_cast<const uint16_t*>(of_first ? p.first_weight : p.weight);
    lane.normed = weight != nullptr;
    if (lane.normed) lane.weight = __ldg(reinterpret_cast<const uint4*>(weight + column));
    const int64_t angle = at * p.angle_row_stride + column / 2 * p.angle_stride;
#pragma unroll
    for (int i = 0; i < kVector / 2; ++i) {
      lane.cos[i] = __ldg(p.cos + angle + i * p.angle_stride);
      lane.sin[i] = __ldg(p.sin + angle + i * p.angle_stride);
    }
  }

  uint16_t* to = static_cast<uint16_t*>(p.out) + (static_cast<int64_t>(row) * p.heads + first_head) * p.dim + column;
  for (int left = min(kHeads, p.heads - first_head); left > 0; left -= kInFlight) {  // the same in all lanes of a block
    const int mine = there ? left : 0;
    uint4 x[kInFlight];
    float sums[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      x[j] = {};
      if (j < mine) x[j] = __ldg(reinterpret_cast<const uint4*>(from));
      from += head_stride;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      sums[j] = squares<T>(x[j]);
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], distance);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const float rstd = lane.normed ? rsqrtf(sums[j] * share + eps) : 1.0f;
      const uint4 vector = make_uint4(turned<T>(x[j].x, lane.weight.x, rstd, lane.cos[0], lane.sin[0]),
                                      turned<T>(x[j].y, lane.weight.y, rstd, lane.cos[1], lane.sin[1]),
                                      turned<T>(x[j].z, lane.weight.z, rstd, lane.cos[2], lane.sin[2]),
                                      turned<T>(x[j].w, lane.weight.w, rstd, lane.cos[3], lane.sin[3]));
      if (j < mine) __stwb(reinterpret_cast<uint4*>(to), vector);  // as an assignment it becomes four stores of 4 bytes
      to += p.dim;
    }
  }
}

}  // namespace
}  // namespace rtlynx

#define RTLYNX_NORM_ROTARY(name, T, kLanes)                                                                                    \
  extern "C" __global__ void __launch_bounds__(rtlynx::kThreads, 4) name(const __grid_constant__ rtlynx::NormRotaryParams p) { \
    rtlynx::norm_rotary<rtlynx::T, kLanes>(p);                                                                                 \
  }

// Of up to 64, 128 and 256 channels a head.
RTLYNX_NORM_ROTARY(norm_rotary_bf16_d64, Bf16, 8)
RTLYNX_NORM_ROTARY(norm_rotary_bf16_d128, Bf16, 16)
RTLYNX_NORM_ROTARY(norm_rotary_bf16_d256, Bf16, 32)
RTLYNX_NORM_ROTARY(norm_rotary_f16_d64, F16, 8)
RTLYNX_NORM_ROTARY(norm_rotary_f16_d128, F16, 16)
RTLYNX_NORM_ROTARY(norm_rotary_f16_d256, F16, 32)
