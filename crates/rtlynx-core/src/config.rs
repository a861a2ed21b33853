//! The kernels there are, as data: names, tiles, resources; one file per kind. Adding a kernel means adding a row there and a file in `cuda/kernels`.

use std::{fmt, iter};

use crate::dtype::Dtype;
use crate::prologue::Activation;

mod fused;
mod norm_rotary;
mod probe;
mod row_stats;
mod sparsify;
mod spmm;

pub use fused::{FUSED_TILES, FusedKernel, FusedTile};
pub use norm_rotary::NormRotaryKernel;
pub use probe::ProbeKernel;
pub use row_stats::RowStatsKernel;
pub use sparsify::SparsifyKernel;
pub use spmm::{SpmmKernel, TILES, Tile};

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
    /// Norm and rotation of heads.
    NormRotary(NormRotaryKernel),
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
            Self::NormRotary(kernel) => kernel.fmt(f),
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
        assert_eq!(NormRotaryKernel { dtype: Dtype::Bf16, dim: 128 }.to_string(), "norm_rotary_bf16_d128");
        assert_eq!(SpmmKernel { dtype: Dtype::Bf16, tile: TILES[0], epilogue: false }.to_string(), "spmm_sm90_bf16_256x192x64_s5");
        assert_eq!(SpmmKernel { dtype: Dtype::Bf16E4m3, tile: TILES[0], epilogue: false }.to_string(), "spmm_sm90_bf16e4m3_256x192x128_s5");
        assert_eq!(SpmmKernel { dtype: Dtype::F16, tile: TILES[7], epilogue: false }.to_string(), "spmm_sm80_f16_128x64x64_s4");
        assert_eq!(SparsifyKernel::all().count(), 136);
        let epilogue = SpmmKernel { dtype: Dtype::F16, tile: TILES[1], epilogue: false }.with_epilogue();
        assert_eq!(epilogue.to_string(), "spmm_sm90_f16_192x192x64_s6_epilogue");
        assert_eq!(SpmmKernel::all().count(), 48);
    }

    #[test]
    fn shared_memory_is_what_the_kernels_lay_out() {
        assert_eq!(TILES.map(|tile| tile.shared_bytes()), [204880, 221280, 196704, 229488, 196736, 131072, 98304, 65536, 49152]);
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
