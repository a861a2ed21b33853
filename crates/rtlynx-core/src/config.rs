//! The kernels there are, as data: names, tiles, resources. Adding a kernel means adding a row here and a file in `cuda/kernels`.

use std::fmt;

use crate::format::TILE_ROWS;
use crate::problem::Dtype;

/// Launch geometry of one kernel on one problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Thread blocks along x and y.
    pub blocks: (u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
}

/// Any kernel; its `Display` is the symbol in the device code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Selection, compression, row norms and the branch's projection.
    Sparsify(SparsifyKernel),
    /// The sparse GEMM.
    Spmm(SpmmKernel),
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sparsify(kernel) => kernel.fmt(f),
            Self::Spmm(kernel) => kernel.fmt(f),
        }
    }
}

/// `sparsify_{dtype}_r{capacity}[_scaled]`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SparsifyKernel {
    /// Element type.
    pub dtype: Dtype,
    /// Branch columns one block computes; 0: no branch. A larger rank is split over blocks along y.
    pub capacity: i64,
    /// Whether it keeps two accumulators: the branch of the dropped part under norm compensation needs `X·C` and `S(X)·C` apart,
    /// because the row scale that combines them is known only after the whole row has been read.
    pub scaled: bool,
}

impl SparsifyKernel {
    /// Rank capacities that are compiled.
    pub const CAPACITIES: [i64; 4] = [0, 16, 32, 64];
    /// Threads of a block.
    pub const THREADS: u32 = 32 * Self::WARPS;
    /// Rows of x one block serves.
    pub const ROWS: i64 = TILE_ROWS;
    /// Warps of a block: each takes its share of the columns, partial branches meet in shared memory.
    const WARPS: u32 = 8;

    /// Every kernel of this family.
    pub fn all() -> impl Iterator<Item = Self> {
        let variants = Self::CAPACITIES.into_iter().flat_map(|capacity| [(capacity, false), (capacity, true)]);
        let variants = variants.filter(|&(capacity, scaled)| capacity > 0 || !scaled);
        variants.flat_map(|(capacity, scaled)| Dtype::ALL.map(|dtype| Self { dtype, capacity, scaled }))
    }

    /// Dynamic shared memory: one f32 tile of rows × capacity per warp.
    pub fn shared_bytes(&self) -> u32 {
        Self::WARPS * (Self::ROWS * self.capacity) as u32 * size_of::<f32>() as u32
    }
}

impl fmt::Display for SparsifyKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sparsify_{}_r{}{}", self.dtype, self.capacity, if self.scaled { "_scaled" } else { "" })
    }
}

/// Which instruction a GEMM is built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// `mma.sp` fed by `cp.async`: every GPU from compute capability 8.0.
    Sm80,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sm80 => "sm80",
        })
    }
}

/// One row of the tile table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Instruction family.
    pub family: Family,
    /// Output rows of a block.
    pub bm: i64,
    /// Output columns of a block.
    pub bn: i64,
    /// Threads of a block.
    pub threads: u32,
    /// Depth of the shared-memory pipeline.
    pub stages: u32,
    /// Most blocks the registers of one multiprocessor hold at a time.
    pub max_blocks: i64,
}

impl Tile {
    /// Dense columns of one pipeline stage.
    pub const BK: i64 = 64;

    /// Bytes one stage brings to shared memory: compressed activations (half of the columns) and weights, 2 bytes each.
    pub const fn stage_bytes(&self) -> i64 {
        (self.bm * Self::BK / 2 + self.bn * Self::BK) * 2
    }

    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(&self) -> i64 {
        self.stages as i64 * self.stage_bytes()
    }
}

/// `128x64x64_s4`
impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}_s{}", self.bm, self.bn, Self::BK, self.stages)
    }
}

/// The tile table, from large to small: on equal cost dispatch takes the first.
pub const TILES: [Tile; 3] = [
    Tile { family: Family::Sm80, bm: 128, bn: 128, threads: 128, stages: 4, max_blocks: 2 },
    Tile { family: Family::Sm80, bm: 128, bn: 64, threads: 128, stages: 4, max_blocks: 3 },
    Tile { family: Family::Sm80, bm: 64, bn: 64, threads: 128, stages: 4, max_blocks: 4 },
];

/// `spmm_{family}_{dtype}_{tile}`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpmmKernel {
    /// Element type.
    pub dtype: Dtype,
    /// Its row of the tile table.
    pub tile: Tile,
}

impl SpmmKernel {
    /// Every kernel of the tile table.
    pub fn all() -> impl Iterator<Item = Self> {
        TILES.into_iter().flat_map(|tile| Dtype::ALL.map(|dtype| Self { dtype, tile }))
    }
}

impl fmt::Display for SpmmKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spmm_{}_{}_{}", self.tile.family, self.dtype, self.tile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_symbols_of_the_device_code() {
        let name = |capacity, scaled| SparsifyKernel { dtype: Dtype::Bf16, capacity, scaled }.to_string();
        assert_eq!(name(0, false), "sparsify_bf16_r0");
        assert_eq!(name(64, true), "sparsify_bf16_r64_scaled");
        assert_eq!(SpmmKernel { dtype: Dtype::F16, tile: TILES[1] }.to_string(), "spmm_sm80_f16_128x64x64_s4");
        assert_eq!(SparsifyKernel::all().count(), 14);
        assert_eq!(SpmmKernel::all().count(), 6);
    }

    #[test]
    fn shared_memory_is_what_the_kernels_lay_out() {
        assert_eq!(TILES.map(|tile| tile.shared_bytes()), [98304, 65536, 49152]);
        let largest = SparsifyKernel { dtype: Dtype::F16, capacity: 64, scaled: true };
        assert_eq!(largest.shared_bytes(), 32768);
    }
}
