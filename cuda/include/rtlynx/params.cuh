// Kernel parameters, passed by value. Twins of the structs in crates/rtlynx-core/src/params.rs (a Rust test compares the fields).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace rtlynx {

struct SparsifyParams {
  const void* x;              // [m, k], rows ldx elements apart, 16-byte aligned
  const float* score;         // [k] factor on the magnitudes that selection compares, or null
  const float* shift;         // [k] subtracted from x first, or null
  const void* comp_down;      // [rank, k], or null when rank == 0
  void* values;               // [m, k / 2] out
  uint32_t* metadata;         // [ceil(k / 256), 4 ceil(m / 64), 32, 4] out
  float* row_scale;           // [m] out, or null: no norm compensation
  void* branch;               // [m, rank] out, or null when rank == 0
  int64_t ldx;                // elements between rows of x
  int32_t m;                  // tokens
  int32_t k;                  // channels, a multiple of 64
  int32_t rank;               // a multiple of 16, at most the kernel's rank capacity
  int32_t branch_of_dropped;  // 1: branch = (x - S(x)) comp_down^T, 0: branch = x comp_down^T
  float eps;                  // of the row scale
};

struct SpmmParams {
  const void* values;        // [m, k / 2]
  const uint32_t* metadata;  // [ceil(k / 256), 4 ceil(m / 64), 32, 4]
  const void* weight;        // [n, k]
  const float* row_scale;    // [m], or null
  const void* branch;        // [m, rank], or null when rank == 0
  const void* comp_up;       // [n, rank], or null when rank == 0
  const void* bias;          // [n], or null
  void* out;                 // [m, n] out
  int32_t m;                 // tokens
  int32_t n;                 // output channels, a multiple of 8
  int32_t k;                 // input channels, a multiple of 64
  int32_t rank;              // a multiple of 16, at most 128
};

struct SpmmSm90Params {
  CUtensorMap values;        // [m, k / 2], boxes of 256 x 32, 64-byte swizzle
  CUtensorMap weight;        // [n, k], boxes of 192 x 64, 128-byte swizzle
  CUtensorMap branch;        // [m, rank], boxes of 256 x 32, 64-byte swizzle; not read when rank == 0
  CUtensorMap comp_up;       // [n, rank], boxes of 192 x 32, 64-byte swizzle; not read when rank == 0
  const uint32_t* metadata;  // [ceil(k / 256), 4 ceil(m / 64), 32, 4]
  const float* row_scale;    // [m], or null
  const void* bias;          // [n], or null
  void* out;                 // [m, n] out
  int32_t m;                 // tokens
  int32_t n;                 // output channels, a multiple of 8
  int32_t k;                 // input channels, a multiple of 64
  int32_t rank;              // a multiple of 16, at most 128
};

}  // namespace rtlynx
