// What the kernels need to know of an element type: bfloat16 or float16, two to a 32-bit register, and e4m3, which only operands of the sparse product
// have.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace rtlynx {

struct Bf16 {
  __device__ __forceinline__ static float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

struct F16 {
  __device__ __forceinline__ static float2 unpack(uint32_t pair) { return __half22float2(*reinterpret_cast<const __half2*>(&pair)); }
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// 1 sign, 4 exponent and 3 mantissa bits; finite up to 448, no infinity.
struct E4m3 {
  // Two to 16 bits, `low` in the lower byte, rounded to nearest even. What is too large becomes 448; NaN stays NaN.
  __device__ __forceinline__ static uint32_t pack(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
  }
};

template <class T>
constexpr int kBytesOf = 2;
template <>
constexpr int kBytesOf<E4m3> = 1;

}  // namespace rtlynx
