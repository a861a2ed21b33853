//! The kernels of the whole layer in one: their tile table.

use std::fmt;

use super::Family;
use crate::dtype::Dtype;

/// One row of the tile table of the fused kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FusedTile {
    /// Output rows of a block.
    pub bm: i64,
    /// Output columns of a block.
    pub bn: i64,
    /// Depth of the shared-memory pipeline.
    pub stages: u32,
    /// As in [`Tile`](super::Tile).
    pub step_ns: i64,
    /// As in [`Tile`](super::Tile).
    pub tile_ns: i64,
}

impl FusedTile {
    /// Dense columns of one pipeline stage.
    pub const BK: i64 = 64;
    /// Threads of a block.
    pub const THREADS: u32 = 128;

    /// Dynamic shared memory of a block: stages of dense activations and weights, 2 bytes an element.
    pub const fn shared_bytes(&self) -> i64 {
        self.stages as i64 * (self.bm + self.bn) * Self::BK * 2
    }
}

/// `128x64x64_s3`
impl fmt::Display for FusedTile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}_s{}", self.bm, self.bn, Self::BK, self.stages)
    }
}

/// From large to small: on equal cost the plan takes the first.
///
/// Not measured. A step is counted in the machine code for Hopper: the clocks of what binds, shared memory or integer and logic instructions
/// (the header of the kernel has the count), at 1.7 GHz. What a tile takes besides is as for the sparse GEMM.
pub const FUSED_TILES: [FusedTile; 3] = [
    FusedTile { bm: 128, bn: 128, stages: 3, step_ns: 535, tile_ns: 2000 },
    FusedTile { bm: 128, bn: 64, stages: 3, step_ns: 480, tile_ns: 1000 },
    FusedTile { bm: 64, bn: 64, stages: 4, step_ns: 270, tile_ns: 500 },
];

/// `fused_sm80_{dtype}_{tile}`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FusedKernel {
    /// Element type.
    pub dtype: Dtype,
    /// Its row of the tile table.
    pub tile: FusedTile,
}

impl FusedKernel {
    /// Every kernel of the tile table.
    pub fn all() -> impl Iterator<Item = Self> {
        FUSED_TILES.into_iter().flat_map(|tile| Dtype::PLAIN.map(|dtype| Self { dtype, tile }))
    }
}

impl fmt::Display for FusedKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fused_{}_{}_{}", Family::Sm80, self.dtype, self.tile)
    }
}
