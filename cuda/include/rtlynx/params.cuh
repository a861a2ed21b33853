// Kernel parameters, passed by value. Twins of the structs in crates/rtlynx-core/src/params.rs (a Rust test compares the fields).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace rtlynx {

struct SparsifyParams {
  const void* x;              // [m, k], rows ldx elements apart, 16-byte aligned
  const float* score;         // [k] factor on the magnitudes that selection compares, or null
  const float* shift;         // [k] subtracted from x first, or null
  const uint8_t* places;      // [k] where in its unit's pieces each gathered column stands, 16 · piece + column; or null: not gathered
  const void* comp_down;      // [k, rank], or null when rank == 0
  void* values;               // [m, k / 2] out
  uint32_t* metadata;         // [ceil(k / 256), 4 ceil(m / 64), 32, 4] out
  float* row_scale;           // [m] out, or null: no norm compensation
  void* branch;               // [m, rank] out, or null when rank == 0
  int64_t ldx;                // elements between rows of x
  int32_t m;                  // tokens
  int32_t k;                  // channels, a multiple of 64
  int32_t rank;               // a multiple of 16, at most the kernel's rank capacity
  int32_t branch_of_dropped;  // 1: branch = (x - S(x)) comp_down, 0: branch = x comp_down
  float eps;                  // of the row scale
  // Only kernels with a norm read these.
  const float* norm_stats;  // [m, 2] mean and rstd of each row of x, 8-byte aligned
  const void* norm_weight;  // [m / norm_rows, k], or null: ones
  const void* norm_bias;    // [m / norm_rows, k], or null: zeros
  int32_t norm_rows;        // rows of x that share a row of these
};

struct SparsifySm90Params {
  CUtensorMap x;              // [m, k - head_k], boxes of 64 rows x 64, 128-byte swizzle; with places x 16, 32-byte swizzle
  CUtensorMap comp_down;      // [k, rank], boxes of 64 channels in the lanes' order x the kernel's rank capacity; not read when rank == 0
  const float* score;         // [k] factor on the magnitudes that selection compares, or null
  const float* shift;         // [k] subtracted from x first, or null
  const uint8_t* places;      // [k] as in SparsifyParams, or null
  void* values;               // [m, k / 2] out
  uint32_t* metadata;         // [ceil(k / 256), 4 ceil(m / 64), 32, 4] out
  float* row_scale;           // [m] out, or null: no norm compensation
  void* branch;               // [m, rank] out, or null when rank == 0
  int32_t m;                  // tokens
  int32_t k;                  // channels, a multiple of 64
  int32_t rank;               // a multiple of 16, at most 128
  int32_t branch_of_dropped;  // 1: branch = (x - S(x)) comp_down, 0: branch = x comp_down
  float eps;                  // of the row scale
  float values_scale;         // of the stored values, where they are e4m3
  // Only kernels with an activation read these.
  CUtensorMap head;  // [m, head_k], boxes as of x; not read when head_k == 0
  CUtensorMap gate;  // [m, k - head_k], boxes as of x; not read without a gate
  int32_t head_k;    // columns of X that are head's, a multiple of 64; x has the k - head_k after them
  // Only kernels with a norm read these.
  const float* norm_stats;  // [m, 2] mean and rstd of each row of x, 8-byte aligned
  const void* norm_weight;  // [m / norm_rows, k], or null: ones
  const void* norm_bias;    // [m / norm_rows, k], or null: zeros
  int32_t norm_rows;        // rows of x that share a row of these
};

struct RowStatsParams {
  const void* x;     // [m, k], rows ldx elements apart, 16-byte aligned
  float* stats;      // [m, 2] out: mean and rstd of each row, 8-byte aligned
  int64_t ldx;       // elements between rows of x
  int32_t m;         // tokens
  int32_t k;         // channels, a multiple of 64
  int32_t centered;  // 1: rstd of the deviations from the mean, 0: mean is 0, rstd of the elements
  float eps;         // added to the mean of squares
};

struct NormRotaryParams {
  const void* x;                // [samples, tokens, heads, dim], strided, vectors of 8 channels 16-byte aligned
  const void* first;            // [samples, first_tokens, heads, dim], which come before, strided alike; or null when first_tokens == 0
  const void* weight;           // [dim] of the norm of x, 16-byte aligned, or null: no norm
  const void* first_weight;     // [dim] of the norm of first, 16-byte aligned, or null: no norm
  const float* cos;             // [first_tokens + tokens, dim / 2], strided
  const float* sin;             // the same of the sines, with the strides of cos
  void* out;                    // [samples, first_tokens + tokens, heads, dim] out
  int64_t sample_stride;        // elements between samples of x
  int64_t token_stride;         // between its tokens
  int64_t head_stride;          // between its heads
  int64_t first_sample_stride;  // the same of first
  int64_t first_token_stride;
  int64_t first_head_stride;
  int64_t angle_row_stride;  // elements between tokens of cos and sin
  int64_t angle_stride;      // between their pairs of channels
  int32_t samples;           // samples * (first_tokens + tokens) fits into 32 bits
  int32_t tokens;            // of x
  int32_t first_tokens;      // of first
  int32_t heads;             // of a token
  int32_t dim;               // channels of a head, a multiple of 8, at most the kernel's
  float eps;                 // of the norm of x: added to the mean of squares
  float first_eps;           // of the norm of first
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
  const void* residual;      // [m, n], or null
  const void* gate;          // [m / gate_rows, n], or null; only with a residual
  int32_t m;                 // tokens
  int32_t n;                 // output channels, a multiple of 8
  int32_t k;                 // input channels, a multiple of 64
  int32_t rank;              // a multiple of 16, at most 128
  int32_t gate_rows;         // of Y that share a row of the gate
  int32_t gelu_tanh;         // 1: Y goes through GELU (tanh) before a residual is added, 0: it does not
};

struct SpmmSm90Params {
  CUtensorMap values;         // [m, k / 2], boxes of 256 x 32, 64-byte swizzle
  CUtensorMap weight;         // [n, k], boxes of the tile's columns x 64, 128-byte swizzle
  CUtensorMap branch;         // [m, rank], boxes of 256 x 32, 64-byte swizzle; not read when rank == 0
  CUtensorMap comp_up;        // [n, rank], boxes of the tile's columns x 32, 64-byte swizzle; not read when rank == 0
  const uint32_t* metadata;   // [ceil(k / 256), 4 ceil(m / 64), 32, 4]
  const float* row_scale;     // [m], or null
  const float* weight_scale;  // [n] where operands are e4m3, else null
  const void* bias;           // [n], or null
  void* out;                  // [m, n] out
  const void* residual;       // [m, n], or null
  const void* gate;           // [m / gate_rows, n], or null; only with a residual
  int32_t m;                  // tokens
  int32_t n;                  // output channels, a multiple of 8
  int32_t k;                  // input channels, a multiple of 64
  int32_t rank;               // a multiple of 16, at most 128
  int32_t gate_rows;          // of Y that share a row of the gate
  int32_t gelu_tanh;          // 1: Y goes through GELU (tanh) before a residual is added, 0: it does not
};

struct ProbeParams {
  const void* data;          // A and W as shared memory holds them, then read as they are
  const uint32_t* metadata;  // of 256 rows, as in the compressed format; not read by dense probes
  float* sums;               // [blocks, 256] out: the sum of each thread's accumulators
  int64_t* cycles;           // [blocks, 256] out: clocks each thread took
  int32_t steps;             // of 64 dense columns
};

struct FusedParams {
  const void* x;              // [m, k], rows ldx elements apart, 16-byte aligned
  const float* score;         // [k] factor on the magnitudes that selection compares, or null
  const float* shift;         // [k] subtracted from x first, or null
  const void* comp_down;      // [k, rank], or null when rank == 0
  const void* weight;         // [n, k]
  const void* comp_up;        // [n, rank], or null when rank == 0
  const void* bias;           // [n], or null
  void* branch;               // [m, rank] scratch, or null when rank == 0
  uint32_t* progress;         // [1 + ceil(m / 64)] scratch, zeros; or null when rank == 0
  void* out;                  // [m, n] out
  int32_t ldx;                // elements between rows of x
  int32_t m;                  // tokens
  int32_t n;                  // output channels, a multiple of 8
  int32_t k;                  // input channels, a multiple of 64
  int32_t rank;               // a multiple of 16, at most 128
  int32_t branch_of_dropped;  // 1: branch = (x - S(x)) comp_down, 0: branch = x comp_down
  int32_t norm_compensation;  // 1: rows of the sparse product are scaled, 0: they are not
  float eps;                  // of the row scale
};

}  // namespace rtlynx
