//! The kernels of the sparse GEMM: the tile table.

use std::fmt;

use super::Family;
use crate::dtype::Dtype;

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
    /// Whether the GEMM of 16-bit operands may start while the kernel before it ends; that of e4m3 may. It then takes a few microseconds less, but its
    /// blocks start wherever there is room first, and where those that share operands are far apart more is read from L2: on the H200 up to a tenth of
    /// the time with the middle tiles, nothing with the others.
    pub overlaps: bool,
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
/// - sm90: fitted to all five tiles on 102 products with 77 to 16896 tokens, bf16 and e4m3 operands, in one run, as `rtlynx bench tiles` does. The one of least
///   estimated time took 0.2 % longer than the fastest, on average.
/// - sm80 but for 64x64: on an H100, from 4608 x 12288 x 3072 (0.643, 0.660, 0.824 ms for 128x128, 256x128, 128x64) and 4608 x 3072 x 12288 (0.619,
///   0.667, 0.775 ms). 256x128 is for GPUs on which two blocks of 128x128 do not fit, where it is alone on a multiprocessor but has as many warps;
///   none has been measured. 64x64 is scaled from 128x64: a step by the sum of the clocks of tensor cores (`bm · bn / 32`) and shared memory
///   (`3 · stage bytes / 128`), a tile by its output elements.
///
/// A stage of e4m3 has the bytes and the instructions of one of 16-bit elements, and twice the columns.
pub const TILES: [Tile; 9] = [
    Tile { bm: 256, bn: 192, stages: 5, overlaps: true, step_ns: 596, e4m3_step_ns: 612, tile_ns: 6050, ..SM90 },
    Tile { bm: 192, bn: 192, threads: 512, stages: 6, step_ns: 482, e4m3_step_ns: 503, tile_ns: 4300, ..SM90 },
    Tile { bm: 192, bn: 160, threads: 512, stages: 6, step_ns: 446, e4m3_step_ns: 484, tile_ns: 3080, ..SM90 },
    Tile { bm: 128, bn: 192, stages: 7, step_ns: 399, e4m3_step_ns: 444, tile_ns: 2550, ..SM90 },
    Tile { bm: 128, bn: 128, stages: 8, overlaps: true, step_ns: 332, e4m3_step_ns: 391, tile_ns: 1290, ..SM90 },
    Tile { bm: 256, bn: 128, threads: 256, step_ns: 830, tile_ns: 7200, ..SM80 },
    Tile { bm: 128, bn: 128, step_ns: 449, tile_ns: 2250, ..SM80 },
    Tile { bm: 128, bn: 64, step_ns: 276, tile_ns: 2250, ..SM80 },
    Tile { bm: 64, bn: 64, step_ns: 180, tile_ns: 1100, ..SM80 },
];

/// What the tiles of a family have in common.
const SM80: Tile = Tile {
    family: Family::Sm80,
    bm: 0,
    bn: 0,
    threads: 128,
    stages: 4,
    persistent: false,
    overlaps: false,
    step_ns: 0,
    e4m3_step_ns: 0,
    tile_ns: 0,
};
const SM90: Tile = Tile {
    family: Family::Sm90,
    bm: 0,
    bn: 0,
    threads: 384,
    stages: 0,
    persistent: true,
    overlaps: false,
    step_ns: 0,
    e4m3_step_ns: 0,
    tile_ns: 0,
};

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
