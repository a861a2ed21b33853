//! The kernels there are, as data: names, tiles, resources. Adding a kernel means adding a row here and a file in `cuda/kernels`.

use std::fmt;

use crate::format::{BLOCK_COLS, TILE_ROWS, ceil_div};
use crate::problem::Dtype;

/// Launch geometry of one kernel on one problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Thread blocks along x and y.
    pub blocks: (u32, u32),
    /// Neighbours along x that form a thread block cluster; 1: no clusters. Divides the blocks along x.
    pub cluster: u32,
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

/// Which GPUs a kernel is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Every GPU from compute capability 8.0. The GEMM is `mma.sp` fed by `cp.async`.
    Sm80,
    /// Compute capability 9.0 and no other. The GEMM is `wgmma.sp` fed by tensor maps; sparsify shares rows among a cluster of blocks.
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

/// `sparsify_{dtype}_r{capacity}`, and for Hopper `sparsify_sm90_{dtype}_r{capacity}`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SparsifyKernel {
    /// Which GPUs it is written for.
    pub family: Family,
    /// Element type.
    pub dtype: Dtype,
    /// Branch columns one block computes; 0: no branch. A larger rank is split over blocks along y.
    pub capacity: i64,
}

impl SparsifyKernel {
    /// Rank capacities that are compiled.
    pub const CAPACITIES: [i64; 4] = [0, 16, 32, 64];
    /// Threads of a block.
    pub const THREADS: u32 = 32 * Self::WARPS;
    /// Largest cluster that every GPU with clusters accepts.
    pub const MAX_CLUSTER: i64 = 8;
    /// Warps of a block.
    const WARPS: u32 = 8;
    /// Columns that a block of the sm90 family works on at a time.
    const STEP_COLS: i64 = 128;
    /// Such steps of `comp_down` in shared memory at once.
    const STAGES: i64 = 3;

    /// Every kernel of both families.
    pub fn all() -> impl Iterator<Item = Self> {
        let families = [Family::Sm80, Family::Sm90].into_iter();
        let variants = families.flat_map(|family| Self::CAPACITIES.map(|capacity| (family, capacity)));
        variants.flat_map(|(family, capacity)| Dtype::ALL.map(|dtype| Self { family, dtype, capacity }))
    }

    /// Rows of x that one block serves, or one cluster of blocks.
    pub const fn rows(&self) -> i64 {
        match self.family {
            Family::Sm80 => TILE_ROWS,
            Family::Sm90 => 4 * TILE_ROWS,
        }
    }

    /// Steps over the columns, of which each block of a cluster takes its share: the metadata is padded to whole blocks.
    pub const fn steps(k: i64) -> i64 {
        ceil_div(k, BLOCK_COLS) * (BLOCK_COLS / Self::STEP_COLS)
    }

    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(&self) -> u32 {
        match self.family {
            // The warps divide the columns: of each an f32 tile of rows × capacity.
            Family::Sm80 => Self::WARPS * (self.rows() * self.capacity) as u32 * size_of::<f32>() as u32,
            // The stages. The partial branches take their place at the end.
            Family::Sm90 => (Self::STAGES * self.capacity * Self::STEP_COLS) as u32 * 2,
        }
    }
}

impl fmt::Display for SparsifyKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, dtype, capacity } = self;
        match family {
            Family::Sm80 => write!(f, "sparsify_{dtype}_r{capacity}"),
            Family::Sm90 => write!(f, "sparsify_{family}_{dtype}_r{capacity}"),
        }
    }
}

/// One row of the tile table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Which GPUs it is written for.
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
/// - sm90 256x192: 650 ns a step and 3.7 us a tile, from K = 3072 and K = 12288 with N = 12288 and 3072 at M = 4608.
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
        step_ns: 650,
        tile_ns: 3700,
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
        let sparsify = |family| SparsifyKernel { family, dtype: Dtype::Bf16, capacity: 64 }.to_string();
        assert_eq!(sparsify(Family::Sm80), "sparsify_bf16_r64");
        assert_eq!(sparsify(Family::Sm90), "sparsify_sm90_bf16_r64");
        assert_eq!(SpmmKernel { dtype: Dtype::Bf16, tile: TILES[0] }.to_string(), "spmm_sm90_bf16_256x192x64_s5");
        assert_eq!(SpmmKernel { dtype: Dtype::F16, tile: TILES[2] }.to_string(), "spmm_sm80_f16_128x64x64_s4");
        assert_eq!(SparsifyKernel::all().count(), 16);
        assert_eq!(SpmmKernel::all().count(), 8);
    }

    #[test]
    fn shared_memory_is_what_the_kernels_lay_out() {
        assert_eq!(TILES.map(|tile| tile.shared_bytes()), [231504, 98304, 65536, 49152]);
        let sparsify =
            |family| SparsifyKernel::CAPACITIES.map(|capacity| SparsifyKernel { family, dtype: Dtype::F16, capacity }.shared_bytes());
        assert_eq!(sparsify(Family::Sm80), [0, 8192, 16384, 32768]);
        assert_eq!(sparsify(Family::Sm90), [0, 12288, 24576, 49152]);
    }
}
