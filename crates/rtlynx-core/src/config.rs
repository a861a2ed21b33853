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
    /// `wgmma.sp` fed by tensor maps: compute capability 9.0 and no other.
    Sm90,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sm80 => "sm80",
            Self::Sm90 => "sm90",
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
    /// Shared memory of a block besides its pipeline, in bytes: where it stages the output, and its barriers.
    pub epilogue_bytes: i64,
    /// Whether a block goes on to further tiles, so that no more blocks are launched than there are multiprocessors.
    pub persistent: bool,
    /// Nanoseconds of one pipeline stage of one tile, see [`TILES`].
    pub step_ns: i64,
    /// Nanoseconds a tile takes besides: filling the pipeline, the branch, the store.
    pub tile_ns: i64,
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
        self.stages as i64 * self.stage_bytes() + self.epilogue_bytes
    }
}

/// `128x64x64_s4`
impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}_s{}", self.bm, self.bn, Self::BK, self.stages)
    }
}

/// The tile table, from large to small: on equal cost dispatch takes the first.
///
/// The times only rank tiles against each other. They are a tile's share of a busy multiprocessor of an H200: where several blocks are
/// resident, the time of all divided by their number. Measured with a branch of rank 64:
/// - sm90 256x192: 640 ns a step and 6 us a tile.
/// - sm80 128x128: 384 TFLOP/s (2MNK a second) on large problems, which is 720 ns a step with the tile's share in it. At K = 3072 that is
///   680 and 2000 ns, if the tile takes as long per output element as on sm90.
///
/// The smaller tiles are not measured but scaled from 128x128: a step by the sum of the clocks of tensor cores (`bm · bn / 32`) and shared
/// memory (`3 · stage bytes / 128`), a tile by its output elements.
pub const TILES: [Tile; 4] = [
    Tile {
        family: Family::Sm90,
        bm: 256,
        bn: 192,
        threads: 384,
        stages: 5,
        // Of each of two warpgroups 64 rows of 96 padded columns; a full and an empty barrier a stage.
        epilogue_bytes: 2 * 64 * (96 * 2 + 16) + 5 * 2 * 8,
        persistent: true,
        step_ns: 640,
        tile_ns: 6000,
    },
    Tile { bm: 128, bn: 128, step_ns: 680, tile_ns: 2000, ..SM80 },
    Tile { bm: 128, bn: 64, step_ns: 400, tile_ns: 1000, ..SM80 },
    Tile { bm: 64, bn: 64, step_ns: 260, tile_ns: 500, ..SM80 },
];

/// What the tiles of this family have in common.
const SM80: Tile =
    Tile { family: Family::Sm80, bm: 0, bn: 0, threads: 128, stages: 4, epilogue_bytes: 0, persistent: false, step_ns: 0, tile_ns: 0 };

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
        assert_eq!(SpmmKernel { dtype: Dtype::Bf16, tile: TILES[0] }.to_string(), "spmm_sm90_bf16_256x192x64_s5");
        assert_eq!(SpmmKernel { dtype: Dtype::F16, tile: TILES[2] }.to_string(), "spmm_sm80_f16_128x64x64_s4");
        assert_eq!(SparsifyKernel::all().count(), 14);
        assert_eq!(SpmmKernel::all().count(), 8);
    }

    #[test]
    fn shared_memory_is_what_the_kernels_lay_out() {
        assert_eq!(TILES.map(|tile| tile.shared_bytes()), [231504, 98304, 65536, 49152]);
        let largest = SparsifyKernel { dtype: Dtype::F16, capacity: 64, scaled: true };
        assert_eq!(largest.shared_bytes(), 32768);
    }
}
