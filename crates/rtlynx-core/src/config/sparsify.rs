//! The kernels of the selection.

use std::fmt;

use super::Family;
use crate::dtype::Dtype;
use crate::format::TILE_ROWS;
use crate::prologue::Activation;

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
