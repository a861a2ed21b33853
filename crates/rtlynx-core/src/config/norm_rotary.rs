//! The kernels that norm and rotate heads.

use std::fmt;

use crate::dtype::Dtype;

/// `norm_rotary_{dtype}_d{dim}`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NormRotaryKernel {
    /// Element type.
    pub dtype: Dtype,
    /// The most channels a head may have, one of [`Self::DIMS`].
    pub dim: i64,
}

impl NormRotaryKernel {
    /// Of which there is a kernel each.
    pub const DIMS: [i64; 3] = [64, 128, 256];
    /// Threads of a block.
    pub const THREADS: i64 = 256;
    /// Heads of a token that a group of lanes takes.
    pub const HEADS: i64 = 8;

    /// Every kernel.
    pub fn all() -> impl Iterator<Item = Self> {
        Dtype::PLAIN.into_iter().flat_map(|dtype| Self::DIMS.map(|dim| Self { dtype, dim }))
    }

    /// Tokens of a block: a lane takes 8 channels of each.
    pub const fn rows(self) -> i64 {
        Self::THREADS / (self.dim / 8)
    }
}

impl fmt::Display for NormRotaryKernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "norm_rotary_{}_d{}", self.dtype, self.dim)
    }
}
