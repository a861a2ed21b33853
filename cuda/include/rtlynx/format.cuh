// The compressed activation format: constants and address arithmetic. Twin of crates/rtlynx-core/src/format.rs (a Rust test compares the
// constants) and of python/rtlynx/reference.py (the GPU tests compare every bit). docs/format.md draws it.
#pragma once

#include <cstdint>

namespace rtlynx {

constexpr int kGroup = 4;        // neighbouring channels of a token, of which 2 are kept
constexpr int kWordCols = 64;    // dense columns served by one metadata word of each of the 4 lanes of a quad
constexpr int kBlockCols = 256;  // dense columns of a metadata block: 4 words a lane, one 16-byte load
constexpr int kPieceCols = 16;   // neighbouring channels of a gathered unit of 64: one piece from each quarter of K
constexpr int kTileRows = 16;    // rows of one tensor-core tile, the unit of the metadata along M
constexpr int kPaddedRows = 64;  // the metadata describes rows up to a multiple of this: 4 tiles, what a warpgroup takes

constexpr uint32_t kPaddingWord = 0x44444444;  // eight groups that kept positions (0, 1): what zeros select

// Rows that the metadata of m tokens describes.
__device__ __forceinline__ int padded_rows(int m) { return (m + kPaddedRows - 1) / kPaddedRows * kPaddedRows; }

// The first of the channels that the piece `piece` of the gathered unit at column `col`, a multiple of 64, is read from:
//
//   channels   0          K/4        K/2        3K/4        K
//              |----u-----|----u-----|----u-----|----u-----|      u = col / 64: 16 channels, 16u from the start of their quarter
//   piece           0          1          2          3
__device__ __forceinline__ int piece_column(int col, int piece, int k) { return piece * (k / 4) + col / 4; }

// Index of the metadata word of lane `lane` for the tile of rows that starts at `row` and the 64 dense columns that start at `col`.
//
//   metadata[col / 256][row / 16][lane][(col / 64) % 4]
//
// With g = lane / 4 and q = lane % 4 the word holds, for dense columns col + 16q .. col + 16q + 15 (groups c = 0..3):
//
//   bits 4c    .. 4c + 3    row + g        position of the first kept value (2 bits), of the second (2 bits)
//   bits 4c+16 .. 4c + 19   row + g + 8
__device__ __forceinline__ int64_t metadata_index(int row, int col, int lane, int m) {
  const int64_t tile = static_cast<int64_t>(col / kBlockCols) * (padded_rows(m) / kTileRows) + row / kTileRows;
  return (tile * 32 + lane) * 4 + col / kWordCols % 4;
}

}  // namespace rtlynx
