//! The whole layer in one kernel: validate, plan, launch. `sparsify` and `sparse_linear` in one, for where that is faster.

use crate::checks::{Presence, VECTOR_BYTES, VECTOR_ELEMENTS, at_least_zero, pointer, positive_multiple, valid_eps, valid_rank};
use crate::config::{FUSED_TILES, FusedKernel, FusedTile, Kernel, Launch};
use crate::device;
use crate::dispatch::Arch;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::{K_MULTIPLE, N_MULTIPLE, ceil_div};
use crate::launch::{Place, enqueue};
use crate::params::FusedParams;

/// Name of the operation in errors.
pub const FUSED_LINEAR: &str = "fused_linear";

/// Rows for which the binding allocates one counter of `progress`: no tile has fewer.
pub const COUNTED_ROWS: i64 = 64;

/// Select in a dense activation and multiply what is kept with a dense weight, scale rows, add the branch and the bias.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FusedLinearProblem {
    /// Element type of activation, weight, branch factors, bias and output.
    pub dtype: Dtype,
    /// Rows (tokens).
    pub m: i64,
    /// Output channels.
    pub n: i64,
    /// Input channels.
    pub k: i64,
    /// Elements from one row of the activation to the next.
    pub ldx: i64,
    /// Rank of the branch; 0 for none.
    pub rank: i64,
    /// Whether the norm compensation factor of every row is applied.
    pub norm_compensation: bool,
    /// Whether the branch reads what selection dropped rather than the whole activation.
    pub branch_of_dropped: bool,
    /// Added to the squared norm of the kept part.
    pub eps: f32,
}

impl FusedLinearProblem {
    /// Checks sizes and strides. Unlike sparsify, the kernel counts `ldx` with 32 bits.
    pub fn validate(&self) -> Result<()> {
        if self.dtype.has_e4m3_operands() {
            return Err(Error::invalid(FUSED_LINEAR, "dtype", self.dtype, "bfloat16 or float16"));
        }
        at_least_zero(FUSED_LINEAR, "m", self.m)?;
        positive_multiple(FUSED_LINEAR, "n", self.n, N_MULTIPLE)?;
        positive_multiple(FUSED_LINEAR, "k", self.k, K_MULTIPLE)?;
        positive_multiple(FUSED_LINEAR, "ldx", self.ldx, VECTOR_ELEMENTS)?;
        if self.ldx < self.k {
            return Err(Error::invalid(FUSED_LINEAR, "ldx", self.ldx, format!("at least k = {}", self.k)));
        }
        valid_rank(FUSED_LINEAR, self.rank)?;
        valid_eps(FUSED_LINEAR, self.eps)
    }
}

/// Device addresses of one [`FusedLinearProblem`]; 0 for an absent tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FusedLinearTensors {
    /// `(m, k)` in dtype, row stride `ldx`
    pub x: u64,
    /// `(k,)` f32 or absent
    pub score: u64,
    /// `(k,)` f32 or absent
    pub shift: u64,
    /// `(k, rank)` in dtype, absent without a branch
    pub comp_down: u64,
    /// `(n, k)` in dtype
    pub weight: u64,
    /// `(n, rank)` in dtype, absent without a branch
    pub comp_up: u64,
    /// `(n,)` in dtype or absent
    pub bias: u64,
    /// `(m, rank)` in dtype, overwritten; absent without a branch
    pub branch: u64,
    /// `(1 + ⌈m/COUNTED_ROWS⌉,)` u32, zeros, overwritten; absent without a branch
    pub progress: u64,
    /// `(m, n)` in dtype, written
    pub out: u64,
}

impl FusedLinearTensors {
    /// Checks presence and alignment against the problem, which must be valid and not empty.
    pub fn validate(&self, problem: &FusedLinearProblem) -> Result<()> {
        let branch = if problem.rank > 0 { Presence::Required } else { Presence::Forbidden("rank is 0") };
        for (argument, address, presence) in [
            ("x", self.x, Presence::Required),
            ("score", self.score, Presence::Optional),
            ("shift", self.shift, Presence::Optional),
            ("comp_down", self.comp_down, branch),
            ("weight", self.weight, Presence::Required),
            ("comp_up", self.comp_up, branch),
            ("bias", self.bias, Presence::Optional),
            ("branch", self.branch, branch),
            ("progress", self.progress, branch),
            ("out", self.out, Presence::Required),
        ] {
            pointer(FUSED_LINEAR, argument, address, presence, VECTOR_BYTES)?;
        }
        Ok(())
    }
}

/// The kernel of least estimated time.
pub fn plan(arch: &Arch, problem: &FusedLinearProblem) -> Result<(FusedKernel, Launch)> {
    problem.validate()?;
    arch.require_sparse_tensor_cores(FUSED_LINEAR)?;
    let candidates = FUSED_TILES.into_iter().filter(|tile| tile.shared_bytes() <= arch.shared_bytes);
    let tile = candidates.min_by_key(|tile| estimated_ns(arch, tile, problem)).expect("the smallest tile fits every GPU from 8.0 on");
    let tiles = tiles(&tile, problem);
    if tiles > i32::MAX.into() {
        let got = format!("{} rows of {} outputs", problem.m, problem.n);
        return Err(Error::invalid(FUSED_LINEAR, "m", got, "fewer than 2^31 tiles"));
    }
    let launch = Launch {
        blocks: (tiles as u32, 1),
        cluster: 1,
        threads: FusedTile::THREADS,
        shared_bytes: tile.shared_bytes() as u32,
        overlaps: false,
    };
    Ok((FusedKernel { dtype: problem.dtype, tile }, launch))
}

/// Tiles of the output, and of the branch's input, which has them for itself.
fn tiles(tile: &FusedTile, problem: &FusedLinearProblem) -> i64 {
    ceil_div(problem.m, tile.bm) * (ceil_div(problem.n, tile.bn) + ceil_div(problem.rank, tile.bn))
}

/// Estimated time to rank tiles by: that of the multiprocessor with the most tiles, as for the sparse GEMM.
fn estimated_ns(arch: &Arch, tile: &FusedTile, problem: &FusedLinearProblem) -> i64 {
    let steps = problem.k / FusedTile::BK;
    ceil_div(tiles(tile, problem), arch.sms.max(1)).saturating_mul(steps * tile.step_ns + tile.tile_ns)
}

/// Runs the whole layer on the GPU. Returns once the kernel is enqueued; nothing is launched on an error.
///
/// # Safety
///
/// Every non-zero address in `tensors` must be device memory of `place.device` of the shape and type [`FusedLinearTensors`] states for
/// `problem`, alive and not used elsewhere until the stream has run the kernel, except that inputs may be read. `place.stream` must be a
/// live stream.
pub unsafe fn fused_linear(place: Place, problem: &FusedLinearProblem, tensors: &FusedLinearTensors) -> Result<()> {
    problem.validate()?;
    if problem.m == 0 {
        return Ok(());
    }
    tensors.validate(problem)?;
    let (kernel, launch) = plan(&device::arch(FUSED_LINEAR, place.device)?, problem)?;
    let params = FusedParams {
        x: tensors.x,
        score: tensors.score,
        shift: tensors.shift,
        comp_down: tensors.comp_down,
        weight: tensors.weight,
        comp_up: tensors.comp_up,
        bias: tensors.bias,
        branch: tensors.branch,
        progress: tensors.progress,
        out: tensors.out,
        ldx: problem.ldx as i32,
        m: problem.m as i32,
        n: problem.n as i32,
        k: problem.k as i32,
        rank: problem.rank as i32,
        branch_of_dropped: problem.branch_of_dropped.into(),
        norm_compensation: problem.norm_compensation.into(),
        eps: problem.eps,
    };
    // SAFETY: these are the parameters of every fused kernel; the caller vouches for what they point to.
    unsafe { enqueue(place, Kernel::Fused(kernel), launch, || Ok(params)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: FusedLinearProblem = FusedLinearProblem {
        dtype: Dtype::Bf16,
        m: 5,
        n: 8,
        k: 128,
        ldx: 128,
        rank: 16,
        norm_compensation: true,
        branch_of_dropped: true,
        eps: 1e-8,
    };
    const TENSORS: FusedLinearTensors = FusedLinearTensors {
        x: 256,
        score: 0,
        shift: 0,
        comp_down: 256,
        weight: 256,
        comp_up: 256,
        bias: 256,
        branch: 256,
        progress: 256,
        out: 256,
    };

    fn h200() -> Arch {
        Arch::from_capability((9, 0), 132)
    }

    fn layer(m: i64, n: i64, k: i64, rank: i64) -> FusedLinearProblem {
        FusedLinearProblem { m, n, k, ldx: k, rank, ..OK }
    }

    /// The argument a refusal names.
    fn refused<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
        match result {
            Err(Error::InvalidArgument { argument, .. }) => argument,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn bad_sizes_are_refused() {
        OK.validate().unwrap();
        FusedLinearProblem { m: 0, ..OK }.validate().unwrap();
        for ldx in [64, 120, 130, -128, 1 << 31] {
            assert_eq!(refused(FusedLinearProblem { ldx, ..OK }.validate()), "ldx", "{ldx}");
        }
        assert_eq!(refused(FusedLinearProblem { m: -1, ..OK }.validate()), "m");
        assert_eq!(refused(FusedLinearProblem { n: 12, ..OK }.validate()), "n");
        assert_eq!(refused(FusedLinearProblem { k: 96, ..OK }.validate()), "k");
        assert_eq!(refused(FusedLinearProblem { rank: 24, ..OK }.validate()), "rank");
        assert_eq!(refused(FusedLinearProblem { eps: f32::NAN, ..OK }.validate()), "eps");
    }

    #[test]
    fn missing_superfluous_and_misaligned_tensors_are_refused() {
        TENSORS.validate(&OK).unwrap();
        let without_branch = FusedLinearTensors { comp_down: 0, comp_up: 0, branch: 0, progress: 0, ..TENSORS };
        without_branch.validate(&FusedLinearProblem { rank: 0, ..OK }).unwrap();
        assert_eq!(refused(without_branch.validate(&OK)), "comp_down");
        assert_eq!(refused(TENSORS.validate(&FusedLinearProblem { rank: 0, ..OK })), "comp_down");
        assert_eq!(refused(FusedLinearTensors { progress: 0, ..TENSORS }.validate(&OK)), "progress");
        assert_eq!(refused(FusedLinearTensors { x: 264, ..TENSORS }.validate(&OK)), "x");
        assert_eq!(refused(FusedLinearTensors { score: 4, ..TENSORS }.validate(&OK)), "score");
        assert_eq!(refused(FusedLinearTensors { out: 0, ..TENSORS }.validate(&OK)), "out");
    }

    #[test]
    fn large_problems_take_large_tiles_and_small_ones_small_tiles() {
        let name = |problem| plan(&h200(), &problem).unwrap().0.to_string();
        let (large, small) = ("fused_sm80_bf16_128x128x64_s3", "fused_sm80_bf16_64x64x64_s4");
        assert_eq!([layer(4608, 12288, 3072, 64), layer(64, 3072, 3072, 0)].map(name), [large, small]);
    }

    #[test]
    fn the_grid_covers_output_and_branch_once() {
        for (m, n, rank) in [(1, 8, 0), (63, 72, 16), (129, 128, 128), (4608, 12288, 64), (1000, 3080, 80)] {
            let (FusedKernel { tile, .. }, launch) = plan(&h200(), &layer(m, n, 64, rank)).unwrap();
            let rows = ceil_div(m, tile.bm);
            assert_eq!(i64::from(launch.blocks.0), rows * ceil_div(n, tile.bn) + rows * ceil_div(rank, tile.bn), "{tile}");
            assert_eq!(i64::from(launch.shared_bytes), tile.shared_bytes());
        }
    }

    #[test]
    fn no_tile_has_fewer_rows_than_the_counters_are_made_for() {
        assert!(FUSED_TILES.iter().all(|tile| tile.bm >= COUNTED_ROWS));
    }

    #[test]
    fn every_gpu_with_sparse_tensor_cores_has_a_kernel() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)] {
            let arch = Arch::from_capability(capability, 84);
            let (kernel, _) = plan(&arch, &layer(4608, 3072, 3072, 64)).unwrap();
            assert!(kernel.tile.shared_bytes() <= arch.shared_bytes, "{capability:?}: {kernel}");
        }
        let turing = Arch::from_capability((7, 5), 40);
        assert_eq!(plan(&turing, &OK), Err(Error::UnsupportedArch { op: FUSED_LINEAR, capability: (7, 5) }));
        assert_eq!(refused(plan(&h200(), &layer(1 << 30, 1 << 30, 64, 0))), "m");
    }

    #[test]
    fn refusals_come_before_the_driver_is_asked() {
        let nowhere = Place { device: 0, stream: 0 };
        // SAFETY: an empty problem launches nothing, and neither does one without tensors.
        assert_eq!(unsafe { fused_linear(nowhere, &layer(0, 8, 64, 0), &FusedLinearTensors::default()) }, Ok(()));
        // SAFETY: as above.
        assert_eq!(refused(unsafe { fused_linear(nowhere, &OK, &FusedLinearTensors::default()) }), "x");
    }
}
