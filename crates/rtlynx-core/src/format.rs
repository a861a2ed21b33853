//! Constants and sizes of the compressed 2:4 activation format (docs/format.md draws the bits).
//!
//! The first block is the twin of `cuda/include/rtlynx/format.cuh`; a test below holds the two together.

/// Channels of one 2:4 group; two of them are kept.
pub const GROUP: i64 = 4;
/// Dense columns served by one metadata word of each of the 4 lanes of a quad.
pub const WORD_COLS: i64 = 64;
/// Dense columns of a metadata block: 4 words a lane.
pub const BLOCK_COLS: i64 = 256;
/// Neighbouring channels of a gathered unit of `WORD_COLS`: one piece from each quarter of K.
pub const PIECE_COLS: i64 = 16;
/// Rows of one tensor-core tile, the unit of the metadata along M.
pub const TILE_ROWS: i64 = 16;
/// The metadata describes rows up to a multiple of this.
pub const PADDED_ROWS: i64 = 64;
/// The metadata word of padding: eight groups that kept positions (0, 1), what zeros select.
pub const PADDING_WORD: u32 = 0x4444_4444;

/// K must be a multiple of this: whole metadata words.
pub const K_MULTIPLE: i64 = WORD_COLS;
/// N must be a multiple of this: whole 16-byte vectors of the output.
pub const N_MULTIPLE: i64 = 8;
/// The branch rank must be a multiple of this: whole tensor-core steps.
pub const RANK_MULTIPLE: i64 = 16;
/// Largest branch rank.
pub const MAX_RANK: i64 = 128;

/// Rows that the metadata of `m` tokens describes.
pub const fn padded_rows(m: i64) -> i64 {
    ceil_div(m, PADDED_ROWS) * PADDED_ROWS
}

/// `⌈a / b⌉` for `a ≥ 0`, `b > 0`.
pub const fn ceil_div(a: i64, b: i64) -> i64 {
    (a + b - 1) / b
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::constants;

    #[test]
    fn constants_are_those_of_the_cuda_header() {
        let ours = [
            ("kGroup", GROUP),
            ("kWordCols", WORD_COLS),
            ("kBlockCols", BLOCK_COLS),
            ("kPieceCols", PIECE_COLS),
            ("kTileRows", TILE_ROWS),
            ("kPaddedRows", PADDED_ROWS),
            ("kPaddingWord", PADDING_WORD.into()),
        ];
        assert_eq!(constants(include_str!("../../../cuda/include/rtlynx/format.cuh"), &[]), ours);
    }

    #[test]
    fn rows_are_padded_to_whole_blocks() {
        assert_eq!([0, 1, 64, 65].map(padded_rows), [0, 64, 64, 128]);
    }
}
