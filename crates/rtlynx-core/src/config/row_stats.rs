//! The kernels of the statistics of rows.

use std::fmt;

use crate::dtype::Dtype;

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
