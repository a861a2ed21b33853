// What may follow a product before it is stored: Z = gelu_tanh(Y) or Y, then residual + gate · Z, each in float32 and rounded once to T, as
// reference.py has it.
//
// `Params` are those of any kernel with the fields of an epilogue: gelu_tanh, residual, gate, gate_rows and n.
#pragma once

#include <cstdint>

#include "rtlynx/activation.cuh"
#include "rtlynx/element.cuh"
#include "rtlynx/ptx/load.cuh"

namespace rtlynx {

// Whether anything follows: the same for the whole grid.
template <class Params>
__device__ __forceinline__ bool has_epilogue(const Params& p) {
  return p.gelu_tanh || p.residual;
}

// Where 8 columns of Y lie.
struct Piece {
  int row, column;
  bool inside;  // of Y; what is not is neither read nor stored
};

template <int kPieces>
__device__ __forceinline__ void load_pieces(const void* matrix, int n, const Piece (&pieces)[kPieces], uint32_t (&words)[kPieces][4]) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int64_t offset = static_cast<int64_t>(pieces[i].row) * n + pieces[i].column;
    ptx::load_or_zero(static_cast<const uint16_t*>(matrix) + offset, pieces[i].inside, words[i]);
  }
}

// Pieces of Y become what is stored. Their loads are in flight at once; branches instead of predicates around them keep the compiler from
// requesting those of other pieces as well, for which there would be no registers.
template <class T, int kPieces, class Params>
__device__ __forceinline__ void finish_pieces(const Params& p, const Piece (&pieces)[kPieces], uint32_t (&y)[kPieces][4]) {
  if (p.gelu_tanh) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) gelu_tanh<T>(y[i]);
  }
  if (!p.residual) return;
  uint32_t residual[kPieces][4], gate[kPieces][4];
  load_pieces(p.residual, p.n, pieces, residual);
  if (p.gate) {
    Piece gates[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      gates[i] = {static_cast<int>(static_cast<uint32_t>(pieces[i].row) / static_cast<uint32_t>(p.gate_rows)), pieces[i].column,
                  pieces[i].inside};
    }
    load_pieces(p.gate, p.n, gates, gate);
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 z = T::unpack(y[i][j]), r = T::unpack(residual[i][j]);
      const float2 g = p.gate ? T::unpack(gate[i][j]) : float2{1.0f, 1.0f};
      y[i][j] = T::pack(fmaf(g.x, z.x, r.x), fmaf(g.y, z.y, r.y));  // a product of two T is exact in float32
    }
  }
}

}  // namespace rtlynx
