//! Which kernel runs, with what geometry: pure functions of (architecture, problem) over printable values, tested without a GPU.

use crate::config::{Family, Launch, SparsifyKernel, SpmmKernel, TILES, Tile};
use crate::error::{Error, Result};
use crate::format::{ceil_div, padded_rows};
use crate::problem::{SPARSE_LINEAR, SPARSIFY, SparseLinearProblem, SparsifyProblem};

/// What dispatch needs to know of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub sms: i64,
    /// Most shared memory one block may use, in bytes.
    pub shared_bytes: i64,
}

/// Shared memory the driver keeps of every resident block.
const RESERVED_SHARED_BYTES: i64 = 1024;

impl Arch {
    /// An architecture that is not present: shared memory as in the CUDA C++ Programming Guide, table of technical specifications.
    /// A capability the table does not name gets the smallest of them all.
    pub fn from_capability(capability: (u32, u32), sms: i64) -> Self {
        let kib = match capability {
            (8, 0 | 7) => 163,
            (9..=11, _) => 227,
            _ => 99,
        };
        Self { capability, sms, shared_bytes: kib * 1024 }
    }

    /// Blocks of a tile that one multiprocessor runs at a time; 0 when not even one fits.
    fn resident_blocks(&self, tile: &Tile) -> i64 {
        let whole = self.shared_bytes + RESERVED_SHARED_BYTES;
        (whole / (tile.shared_bytes() + RESERVED_SHARED_BYTES)).min(tile.max_blocks)
    }

    /// Whether the instructions of a family exist here.
    fn runs(&self, family: Family) -> bool {
        match family {
            Family::Sm80 => self.capability >= (8, 0),
        }
    }

    fn require_sparse_tensor_cores(&self, op: &'static str) -> Result<()> {
        if self.capability >= (8, 0) { Ok(()) } else { Err(Error::UnsupportedArch { op, capability: self.capability }) }
    }
}

/// The sparsify kernel of the smallest sufficient rank capacity, one block per 16 rows; ranks above the largest capacity take several
/// blocks side by side.
pub fn plan_sparsify(arch: &Arch, problem: &SparsifyProblem) -> Result<(SparsifyKernel, Launch)> {
    problem.validate()?;
    arch.require_sparse_tensor_cores(SPARSIFY)?;
    let [.., largest] = SparsifyKernel::CAPACITIES;
    let capacity = SparsifyKernel::CAPACITIES.into_iter().find(|&capacity| capacity >= problem.rank).unwrap_or(largest);
    let scaled = problem.rank > 0 && problem.branch_of_dropped && problem.norm_compensation;
    let kernel = SparsifyKernel { dtype: problem.dtype, capacity, scaled };
    let launch = Launch {
        // Padding rows too: the metadata describes them, and the GEMM reads it whole.
        blocks: (
            ceil_div(padded_rows(problem.m), SparsifyKernel::ROWS) as u32,
            if problem.rank > 0 { ceil_div(problem.rank, capacity) as u32 } else { 1 },
        ),
        threads: SparsifyKernel::THREADS,
        shared_bytes: kernel.shared_bytes(),
    };
    Ok((kernel, launch))
}

/// The GEMM kernel of least estimated cost.
pub fn plan_sparse_linear(arch: &Arch, problem: &SparseLinearProblem) -> Result<(SpmmKernel, Launch)> {
    problem.validate()?;
    arch.require_sparse_tensor_cores(SPARSE_LINEAR)?;
    let candidates = TILES.into_iter().filter(|tile| arch.runs(tile.family) && arch.resident_blocks(tile) > 0);
    let tile = candidates.min_by_key(|tile| cost(arch, tile, problem)).expect("the smallest tile fits every GPU from 8.0 on");
    let blocks = u32::try_from(tiles(&tile, problem)).ok().filter(|&blocks| blocks <= i32::MAX as u32).ok_or_else(|| {
        Error::invalid(SPARSE_LINEAR, "m", format!("{} rows of {} outputs", problem.m, problem.n), "fewer than 2^31 output tiles")
    })?;
    let launch = Launch { blocks: (blocks, 1), threads: tile.threads, shared_bytes: tile.shared_bytes() as u32 };
    Ok((SpmmKernel { dtype: problem.dtype, tile }, launch))
}

/// Output tiles of a problem.
fn tiles(tile: &Tile, problem: &SparseLinearProblem) -> i64 {
    ceil_div(problem.m, tile.bm) * ceil_div(problem.n, tile.bn)
}

/// Estimated time of the whole GEMM, in units of no meaning outside this comparison: waves of resident blocks × time of a wave.
///
/// A multiprocessor works on its resident blocks side by side. A wave that fills only some of the slots is taken to be as long as a
/// full one: what its blocks do not wait for each other, they wait for memory. K and the branch's steps are the same for every tile
/// and drop out.
fn cost(arch: &Arch, tile: &Tile, problem: &SparseLinearProblem) -> i64 {
    let resident = arch.resident_blocks(tile);
    ceil_div(tiles(tile, problem), arch.sms.max(1) * resident) * resident * step_cost(tile)
}

/// Clocks × 128 of one k-step of one block on a multiprocessor to itself. The tensor cores take `bm · bn / 32` clocks (4096 FLOP a clock,
/// 64 columns); shared memory takes `3 · stage bytes / 128`: every byte is written once and read by two of the 2 × 2 warps.
fn step_cost(tile: &Tile) -> i64 {
    4 * tile.bm * tile.bn + 3 * tile.stage_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::Dtype;

    fn h200() -> Arch {
        Arch::from_capability((9, 0), 132)
    }

    fn linear(m: i64, n: i64, k: i64) -> SparseLinearProblem {
        SparseLinearProblem { dtype: Dtype::Bf16, m, n, k, rank: 64 }
    }

    fn sparsify(m: i64, rank: i64) -> SparsifyProblem {
        SparsifyProblem { dtype: Dtype::F16, m, k: 3072, ldx: 3072, rank, norm_compensation: true, branch_of_dropped: true, eps: 1e-8 }
    }

    #[test]
    fn large_problems_take_large_tiles_and_small_ones_small_tiles() {
        let name = |problem| plan_sparse_linear(&h200(), &problem).unwrap().0.to_string();
        assert_eq!(name(linear(4608, 12288, 3072)), "spmm_sm80_bf16_128x128x64_s4");
        assert_eq!(name(linear(64, 64, 3072)), "spmm_sm80_bf16_64x64x64_s4");
        assert_eq!(name(linear(512, 3072, 3072)), "spmm_sm80_bf16_64x64x64_s4");
    }

    #[test]
    fn the_grid_covers_every_output_element_once() {
        for (m, n) in [(1, 8), (63, 72), (129, 128), (4608, 12288), (1000, 3080)] {
            let (kernel, launch) = plan_sparse_linear(&h200(), &linear(m, n, 64)).unwrap();
            let Tile { bm, bn, .. } = kernel.tile;
            assert_eq!(i64::from(launch.blocks.0), ceil_div(m, bm) * ceil_div(n, bn));
            assert_eq!(i64::from(launch.shared_bytes), kernel.tile.shared_bytes());
        }
    }

    #[test]
    fn tiles_that_do_not_fit_shared_memory_are_never_chosen() {
        let mut small = Arch::from_capability((8, 6), 84);
        assert_eq!(small.resident_blocks(&TILES[0]), 1);
        small.shared_bytes = 64 * 1024;
        let (kernel, _) = plan_sparse_linear(&small, &linear(4608, 12288, 3072)).unwrap();
        assert!(kernel.tile.shared_bytes() <= small.shared_bytes, "{kernel}");
    }

    #[test]
    fn occupancy_is_bound_by_shared_memory_and_registers() {
        let blocks = |capability| TILES.map(|tile| Arch::from_capability(capability, 100).resident_blocks(&tile));
        assert_eq!(blocks((8, 0)), [1, 2, 3]);
        assert_eq!(blocks((8, 9)), [1, 1, 2]);
        assert_eq!(blocks((9, 0)), [2, 3, 4]);
    }

    #[test]
    fn sparsify_takes_the_smallest_sufficient_capacity() {
        let name = |rank| plan_sparsify(&h200(), &sparsify(10, rank)).unwrap().0.to_string();
        assert_eq!(
            [0, 16, 48, 64, 80, 128].map(name),
            [
                "sparsify_f16_r0",
                "sparsify_f16_r16_scaled",
                "sparsify_f16_r64_scaled",
                "sparsify_f16_r64_scaled",
                "sparsify_f16_r64_scaled",
                "sparsify_f16_r64_scaled",
            ]
        );
    }

    #[test]
    fn two_accumulators_only_for_the_scaled_branch_of_the_dropped_part() {
        let scaled = |problem| plan_sparsify(&h200(), &problem).unwrap().0.scaled;
        assert!(scaled(sparsify(10, 16)));
        assert!(!scaled(SparsifyProblem { norm_compensation: false, ..sparsify(10, 16) }));
        assert!(!scaled(SparsifyProblem { branch_of_dropped: false, ..sparsify(10, 16) }));
    }

    #[test]
    fn sparsify_covers_the_padding_rows() {
        let blocks = |m| plan_sparsify(&h200(), &sparsify(m, 0)).unwrap().1.blocks;
        assert_eq!([1, 64, 65, 4608].map(blocks), [(4, 1), (4, 1), (8, 1), (288, 1)]);
    }

    #[test]
    fn ranks_above_the_largest_capacity_are_split_over_blocks() {
        let blocks = |rank| plan_sparsify(&h200(), &sparsify(64, rank)).unwrap().1.blocks;
        assert_eq!([0, 16, 48, 64, 80, 128].map(blocks), [(4, 1), (4, 1), (4, 1), (4, 1), (4, 2), (4, 2)]);
    }

    #[test]
    fn older_gpus_and_bad_problems_are_refused() {
        let turing = Arch::from_capability((7, 5), 40);
        assert_eq!(
            plan_sparse_linear(&turing, &linear(64, 64, 64)),
            Err(Error::UnsupportedArch { op: "sparse_linear", capability: (7, 5) })
        );
        assert_eq!(plan_sparsify(&turing, &sparsify(64, 0)), Err(Error::UnsupportedArch { op: "sparsify", capability: (7, 5) }));
        assert!(matches!(plan_sparse_linear(&h200(), &linear(64, 65, 64)), Err(Error::InvalidArgument { argument: "n", .. })));
        let too_many = linear(1 << 30, 1 << 30, 64);
        assert!(matches!(plan_sparse_linear(&h200(), &too_many), Err(Error::InvalidArgument { argument: "m", .. })));
    }
}
