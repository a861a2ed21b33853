// What selection may apply to what it reads, and of it what a feed-forward layer applies between its two products, on registers of two elements: in
// float32, rounded once to T, as reference.py has it.
#pragma once

#include <cstdint>

namespace rtlynx {

enum class Activation {
  kNone,
  kGeluTanh,  // GELU with tanh in place of the error function
  kSiluGate,  // SiLU(x) times a gate
  kNorm,      // a norm of the row, with weight and bias (norm.cuh)
};

// x / (1 + e^-z): with one exponential and one reciprocal, as accurate near 0 as far from it. A large -z gives 0 of x's sign.
__device__ __forceinline__ float times_sigmoid(float x, float z) { return __fdividef(x, 1.f + __expf(-z)); }

// 0.5 x (1 + tanh u) is x times the sigmoid of 2u.
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kTwoRoot2OverPi = 1.5957691216f;
  return times_sigmoid(x, kTwoRoot2OverPi * fmaf(0.044715f * x * x, x, x));
}

template <class T, int kPairs>
__device__ __forceinline__ void gelu_tanh(uint32_t (&pairs)[kPairs]) {
#pragma unroll
  for (uint32_t& pair : pairs) {
    const float2 x = T::unpack(pair);
    pair = T::pack(gelu_tanh(x.x), gelu_tanh(x.y));
  }
}

template <class T, int kPairs>
__device__ __forceinline__ void silu_gate(uint32_t (&pairs)[kPairs], const uint32_t (&gates)[kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float2 x = T::unpack(pairs[i]), gate = T::unpack(gates[i]);
    pairs[i] = T::pack(times_sigmoid(x.x, x.x) * gate.x, times_sigmoid(x.y, x.y) * gate.y);
  }
}

}  // namespace rtlynx
