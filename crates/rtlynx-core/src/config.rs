//! The kernels there are, as data: names, tiles, resources. Adding a kernel means adding a row here and a file in `cuda/kernels`.

use std::{fmt, iter};

use crate::dtype::Dtype;
use crate::format::TILE_ROWS;
use crate::prologue::Activation;

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
    /// Whether it may start before the kernel before it in the stream has finished: then it waits for that itself.
    pub overlaps: bool,
}

/// Any kernel; its `Display` is the symbol in the device code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Selection, compression, row norms and the branch's projection.
    Sparsify(SparsifyKernel),
    /// The sparse GEMM.
    Spmm(SpmmKernel),
    /// Mean and deviation of rows.
    RowStats(RowStatsKernel),
    /// The whole layer in one.
    Fused(FusedKernel),
    /// A measurement of the tensor cores.
    Probe(ProbeKernel),
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sparsify(kernel) => kernel.fmt(f),
            Self::Spmm(kernel) => kernel.fmt(f),
            Self::RowStats(kernel) => kernel.fmt(f),
            Self::Fused(kernel) => kernel.fmt(f),
            Self::Probe(kernel) => kernel.fmt(f),
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

impl Family {
    /// What the kernels of the family compute with.
    pub const fn dtypes(self) -> &'static [Dtype] {
        match self {
            Self::Sm80 => &Dtype::PLAIN,
            Self::Sm90 => &Dtype::ALL,
        }
    }

    /// What its sparsify kernels apply to x, if they are asked to.
    pub fn activations(self) -> impl Iterator<Item = Activation> {
        let some = match self {
            Self::Sm80 => &[Activation::Norm][..],
            Self::Sm90 => &Activation::SOME,
        };
        iter::once(Activation::None).chain(some.iter().copied())
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sm80 => "sm80",
            Self::Sm90 => "sm90",
        })
    }
}

/// `sparsify_{dtype}_r{capacity}{activation}`, and for Hopper `sparsify_sm90_{dtype}_r{capacity}{activation}`; with `_gathered` behind it where
/// channels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SparsifyKernel {
    /// Which GPUs it is written for.
    pub family: Family,
    /// Element type.
    pub dtype: Dtype,
    /// Branch columns one block computes; 0: no branch. A larger rank is split over blocks along y.
    pub capacity: i64,
    /// What it makes X of; in the sm80 family nothing or a norm.
    pub activation: Activation,
    /// Whether it gathers the channels of X.
    pub gathered: bool,
}

impl SparsifyKernel {
    /// Rank capacities that are compiled.
    pub const CAPACITIES: [i64; 4] = [0, 16, 32, 64];
    /// Columns of one box of x, and channels of one box of `comp_down`, in the sm90 family.
    pub const UNIT_COLS: i64 = 64;
    /// Largest cluster that every GPU with clusters accepts.
    pub const MAX_CLUSTER: i64 = 8;
    /// Warps of a block that select.
    const WARPS: u32 = 8;
    /// Units in one pipeline stage of the sm90 family.
    const STAGE_UNITS: i64 = 2;

    /// Every kernel of both families.
    pub fn all() -> impl Iterator<Item = Self> {
        let families = [Family::Sm80, Family::Sm90].into_iter();
        let variants = families.flat_map(|family| Self::CAPACITIES.map(|capacity| (family, capacity)));
        variants.flat_map(|(family, capacity)| {
            let plain = Self { family, dtype: Dtype::Bf16, capacity, activation: Activation::None, gathered: false };
            let kernels = family.dtypes().iter().map(move |&dtype| Self { dtype, ..plain });
            let kernels = kernels.flat_map(move |kernel| family.activations().map(move |activation| Self { activation, ..kernel }));
            let kernels = kernels.flat_map(|kernel| [false, true].map(|gathered| Self { gathered, ..kernel }));
            kernels.filter(|kernel| !(kernel.gathered && kernel.activation == Activation::Norm))
        })
    }

    /// Rows of x that one block serves, or one cluster of blocks.
    pub const fn rows(&self) -> i64 {
        match self.family {
            Family::Sm80 => TILE_ROWS,
            Family::Sm90 => 4 * TILE_ROWS,
        }
    }

    /// Threads of a block; in the sm90 family one more warp fills the pipeline.
    pub const fn threads(&self) -> u32 {
        match self.family {
            Family::Sm80 => 32 * Self::WARPS,
            Family::Sm90 => 32 * (Self::WARPS + 1),
        }
    }

    /// Pipeline stages of the sm90 family: what lets two blocks share a multiprocessor, three without a branch.
    const fn stages(&self) -> i64 {
        if self.activation.has_gate() {
            2
        } else if self.capacity == 64 {
            3
        } else {
            4
        }
    }

    /// Rows of a unit of one stage in the sm90 family: of x, of the gate if there is one, and of `comp_down`.
    const fn unit_rows(&self) -> i64 {
        self.capacity + if self.activation.has_gate() { 2 * self.rows() } else { self.rows() }
    }

    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(&self) -> u32 {
        match self.family {
            // The warps divide the columns: of each an f32 tile of rows × capacity, which takes the place of a unit to exchange.
            Family::Sm80 => {
                let unit_bytes = if self.gathered { self.rows() * Self::UNIT_COLS * 2 } else { 0 };
                let sums_bytes = self.rows() * self.capacity * size_of::<f32>() as i64;
                Self::WARPS * (if unit_bytes > sums_bytes { unit_bytes } else { sums_bytes }) as u32
            }
            // The stages. The partial branches take their place at the end.
            Family::Sm90 => (self.stages() * Self::STAGE_UNITS * Self::UNIT_COLS * self.unit_rows()) as u32 * 2,
        }
    }
}

impl fmt::Display for SparsifyKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, dtype, capacity, activation, gathered } = self;
        match family {
            Family::Sm80 => write!(f, "sparsify_{dtype}_r{capacity}{activation}"),
            Family::Sm90 => write!(f, "sparsify_{family}_{dtype}_r{capacity}{activation}"),
        }?;
        f.write_str(if *gathered { "_gathered" } else { "" })
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
    /// Whether a block goes on to further tiles, so that no more blocks are launched than there are multiprocessors.
    pub persistent: bool,
    /// Nanoseconds of one pipeline stage of one tile with 16-bit operands, see [`TILES`].
    pub step_ns: i64,
    /// The same with operands of e4m3; 0 in a family that does not multiply them.
    pub e4m3_step_ns: i64,
    /// Nanoseconds a tile takes besides: filling the pipeline, the branch, the store.
    pub tile_ns: i64,
}

impl Tile {
    /// Bytes of a row of weights in one pipeline stage.
    const ROW_BYTES: i64 = 128;

    /// Dense columns of one pipeline stage.
    pub const fn bk(dtype: Dtype) -> i64 {
        Self::ROW_BYTES / dtype.operand_bytes()
    }

    /// Nanoseconds of one pipeline stage of one tile.
    pub const fn step_ns(&self, dtype: Dtype) -> i64 {
        if dtype.has_e4m3_operands() { self.e4m3_step_ns } else { self.step_ns }
    }

    /// Bytes one stage brings to shared memory: compressed activations (half of the columns) and weights.
    pub const fn stage_bytes(&self) -> i64 {
        (self.bm / 2 + self.bn) * Self::ROW_BYTES
    }

    /// Dynamic shared memory of a block.
    pub const fn shared_bytes(&self) -> i64 {
        let barriers = match self.family {
            Family::Sm80 => 0,
            Family::Sm90 => 2 * 8, // a full and an empty one
        };
        self.stages as i64 * (self.stage_bytes() + barriers)
    }
}

/// The tile table: on equal cost dispatch takes the first.
///
/// The times only rank tiles against each other. They are a tile's share of a busy multiprocessor of an H200: where several blocks are
/// resident, the time of all divided by their number. Measured with a branch of rank 64:
/// - sm90: a tile by its output elements, from the 8200 clocks that 256x192 takes at 1.6 GHz (read inside the kernel); a step from the time of whole
///   GEMMs, 4096 to 8192 tokens.
/// - sm80 but for 64x64: on an H100, from 4608 x 12288 x 3072 (0.643, 0.660, 0.824 ms for 128x128, 256x128, 128x64) and 4608 x 3072 x 12288 (0.619,
///   0.667, 0.775 ms). 256x128 is for GPUs on which two blocks of 128x128 do not fit, where it is alone on a multiprocessor but has as many warps;
///   none has been measured. 64x64 is scaled from 128x64: a step by the sum of the clocks of tensor cores (`bm · bn / 32`) and shared memory
///   (`3 · stage bytes / 128`), a tile by its output elements.
///
/// A stage of e4m3 has the bytes and the instructions of one of 16-bit elements, and twice the columns. Its times are from 4608 x 3072 x 12288 on an
/// H100, where narrower tiles fill the last wave and still gain nothing.
pub const TILES: [Tile; 7] = [
    Tile { bn: 192, stages: 5, step_ns: 640, e4m3_step_ns: 658, tile_ns: 5200, ..SM90 },
    Tile { bn: 168, stages: 6, step_ns: 610, e4m3_step_ns: 712, tile_ns: 4550, ..SM90 },
    Tile { bn: 144, stages: 6, step_ns: 560, e4m3_step_ns: 672, tile_ns: 3900, ..SM90 },
    Tile { bm: 256, bn: 128, threads: 256, step_ns: 830, tile_ns: 7200, ..SM80 },
    Tile { bm: 128, bn: 128, step_ns: 449, tile_ns: 2250, ..SM80 },
    Tile { bm: 128, bn: 64, step_ns: 276, tile_ns: 2250, ..SM80 },
    Tile { bm: 64, bn: 64, step_ns: 180, tile_ns: 1100, ..SM80 },
];

/// What the tiles of a family have in common.
const SM80: Tile =
    Tile { family: Family::Sm80, bm: 0, bn: 0, threads: 128, stages: 4, persistent: false, step_ns: 0, e4m3_step_ns: 0, tile_ns: 0 };
const SM90: Tile =
    Tile { family: Family::Sm90, bm: 256, bn: 0, threads: 384, stages: 0, persistent: true, step_ns: 0, e4m3_step_ns: 0, tile_ns: 0 };

/// `spmm_{family}_{dtype}_{bm}x{bn}x{bk}_s{stages}`, with `_epilogue` behind it in the sm90 family where there is one
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpmmKernel {
    /// Element type.
    pub dtype: Dtype,
    /// Its row of the tile table.
    pub tile: Tile,
    /// Whether it is for products with an epilogue; kernels of the sm80 family do both.
    pub epilogue: bool,
}

impl SpmmKernel {
    /// Every kernel of the tile table.
    pub fn all() -> impl Iterator<Item = Self> {
        let plain = TILES.into_iter().flat_map(|tile| tile.family.dtypes().iter().map(move |&dtype| Self { dtype, tile, epilogue: false }));
        plain.flat_map(|kernel| [Some(kernel), (kernel.tile.family == Family::Sm90).then_some(kernel.with_epilogue())]).flatten()
    }

    /// The kernel that does the same product with an epilogue.
    #[must_use]
    pub const fn with_epilogue(self) -> Self {
        Self { epilogue: matches!(self.tile.family, Family::Sm90), ..self }
    }
}

impl fmt::Display for SpmmKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tile { family, bm, bn, stages, .. } = self.tile;
        write!(f, "spmm_{family}_{}_{bm}x{bn}x{}_s{stages}", self.dtype, Tile::bk(self.dtype))?;
        f.write_str(if self.epilogue { "_epilogue" } else { "" })
    }
}

/// `row_stats_{dtype}`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowStatsKernel {
    /// Element type.
    pub dtype: Dtype,
}

impl RowStatsKernel {
    /// Warps of a block, each of which takes a row.
    pub const WARPS: i64 = 4;

    /// Every kernel.
    pub fn all() -> impl Iterator<Item = Self> {
        Dtype::PLAIN.into_iter().map(|dtype| Self { dtype })
    }
}

impl fmt::Display for RowStatsKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row_stats_{}", self.dtype)
    }
}

/// One row of the tile table of the fused kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FusedTile {
    /// Output rows of a block.
    pub bm: i64,
    /// Output columns of a block.
    pub bn: i64,
    /// Depth of the shared-memory pipeline.
    pub stages: u32,
    /// As in [`Tile`].
    pub step_ns: i64,
    /// As in [`Tile`].
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

/// `probe_sm90_{dense|sparse}_{ss|rs}`: which instruction, and whether it reads A from shared memory (ss) or from registers (rs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProbeKernel {
    /// `wgmma.sp` rather than `wgmma`.
    pub sparse: bool,
    /// A in registers.
    pub from_registers: bool,
}

impl ProbeKernel {
    /// Threads of a block.
    pub const THREADS: u32 = 256;

    /// Every probe.
    pub fn all() -> impl Iterator<Item = Self> {
        [false, true].into_iter().flat_map(|sparse| [false, true].map(|from_registers| Self { sparse, from_registers }))
    }

    /// Dynamic shared memory of a block: 256 rows of A, of which a sparse one stores half, and 192 of W, for 64 columns of 2 bytes.
    pub const fn shared_bytes(&self) -> u32 {
        let a = 256 * 64 * 2;
        (if self.sparse { a / 2 } else { a }) + 192 * 64 * 2
    }
}

impl fmt::Display for ProbeKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let instruction = if self.sparse { "sparse" } else { "dense" };
        let operands = if self.from_registers { "rs" } else { "ss" };
        write!(f, "probe_sm90_{instruction}_{operands}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_symbols_of_the_device_code() {
        let sparsify =
            |family, activation, gathered| SparsifyKernel { family, dtype: Dtype::Bf16, capacity: 64, activation, gathered }.to_string();
        assert_eq!(sparsify(Family::Sm80, Activation::None, false), "sparsify_bf16_r64");
        assert_eq!(sparsify(Family::Sm80, Activation::None, true), "sparsify_bf16_r64_gathered");
        assert_eq!(sparsify(Family::Sm80, Activation::Norm, false), "sparsify_bf16_r64_norm");
        assert_eq!(sparsify(Family::Sm90, Activation::None, false), "sparsify_sm90_bf16_r64");
        assert_eq!(sparsify(Family::Sm90, Activation::SiluGate, false), "sparsify_sm90_bf16_r64_silu_gate");
        assert_eq!(sparsify(Family::Sm90, Activation::SiluGate, true), "sparsify_sm90_bf16_r64_silu_gate_gathered");
        assert_eq!(RowStatsKernel { dtype: Dtype::F16 }.to_string(), "row_stats_f16");
        assert_eq!(SpmmKernel { dtype: Dtype::Bf16, tile: TILES[0], epilogue: false }.to_string(), "spmm_sm90_bf16_256x192x64_s5");
        assert_eq!(SpmmKernel { dtype: Dtype::Bf16E4m3, tile: TILES[0], epilogue: false }.to_string(), "spmm_sm90_bf16e4m3_256x192x128_s5");
        assert_eq!(SpmmKernel { dtype: Dtype::F16, tile: TILES[5], epilogue: false }.to_string(), "spmm_sm80_f16_128x64x64_s4");
        assert_eq!(SparsifyKernel::all().count(), 136);
        let epilogue = SpmmKernel { dtype: Dtype::F16, tile: TILES[1], epilogue: false }.with_epilogue();
        assert_eq!(epilogue.to_string(), "spmm_sm90_f16_256x168x64_s6_epilogue");
        assert_eq!(SpmmKernel::all().count(), 32);
    }

    #[test]
    fn shared_memory_is_what_the_kernels_lay_out() {
        assert_eq!(TILES.map(|tile| tile.shared_bytes()), [204880, 227424, 208992, 131072, 98304, 65536, 49152]);
        let sparsify = |family, activation, gathered| {
            let kernel = |capacity| SparsifyKernel { family, dtype: Dtype::F16, capacity, activation, gathered };
            SparsifyKernel::CAPACITIES.map(|capacity| kernel(capacity).shared_bytes())
        };
        assert_eq!(sparsify(Family::Sm80, Activation::None, false), [0, 8192, 16384, 32768]);
        assert_eq!(sparsify(Family::Sm80, Activation::None, true), [16384, 16384, 16384, 32768]);
        for gathered in [false, true] {
            assert_eq!(sparsify(Family::Sm90, Activation::None, gathered), [65536, 81920, 98304, 98304]);
            assert_eq!(sparsify(Family::Sm90, Activation::GeluTanh, gathered), [65536, 81920, 98304, 98304]);
            assert_eq!(sparsify(Family::Sm90, Activation::SiluGate, gathered), [65536, 73728, 81920, 98304]);
        }
        for family in [Family::Sm80, Family::Sm90] {
            assert_eq!(sparsify(family, Activation::Norm, false), sparsify(family, Activation::None, false));
        }
    }
}
