//! The kernels that measure the tensor cores.

use std::fmt;

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
