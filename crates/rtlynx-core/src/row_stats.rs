//! Mean and deviation of every row of a matrix, for a norm that selection then does itself: validate, plan, launch.

use crate::checks::{Presence, STATS_BYTES, VECTOR_BYTES, at_least_zero, pointer, positive_multiple, row_stride, valid_eps};
use crate::config::{Kernel, Launch, RowStatsKernel};
use crate::device;
use crate::dispatch::Arch;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::{K_MULTIPLE, ceil_div};
use crate::launch::{Place, enqueue};
use crate::params::RowStatsParams;

/// Name of the operation in errors.
pub const ROW_STATS: &str = "row_stats";

/// Mean and `1 / sqrt(variance + eps)` of every row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStatsProblem {
    /// Element type of the matrix.
    pub dtype: Dtype,
    /// Rows (tokens).
    pub m: i64,
    /// Columns (channels).
    pub k: i64,
    /// Elements from one row to the next.
    pub ldx: i64,
    /// Whether the mean is that of the row rather than 0.
    pub centered: bool,
    /// Added to the variance.
    pub eps: f32,
}

impl RowStatsProblem {
    /// Checks sizes and strides.
    pub fn validate(&self) -> Result<()> {
        if self.dtype.has_e4m3_operands() {
            return Err(Error::invalid(ROW_STATS, "dtype", self.dtype, "bfloat16 or float16"));
        }
        at_least_zero(ROW_STATS, "m", self.m)?;
        positive_multiple(ROW_STATS, "k", self.k, K_MULTIPLE)?;
        row_stride(ROW_STATS, "ldx", self.ldx, self.k)?;
        valid_eps(ROW_STATS, self.eps)
    }
}

/// Device addresses of one [`RowStatsProblem`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowStatsTensors {
    /// `(m, k)` in dtype, row stride `ldx`
    pub x: u64,
    /// `(m, 2)` f32, written
    pub stats: u64,
}

impl RowStatsTensors {
    /// Checks presence and alignment.
    pub fn validate(&self) -> Result<()> {
        pointer(ROW_STATS, "x", self.x, Presence::Required, VECTOR_BYTES)?;
        pointer(ROW_STATS, "stats", self.stats, Presence::Required, STATS_BYTES)
    }
}

/// The kernel, and blocks enough for a warp to every row.
pub fn plan(arch: &Arch, problem: &RowStatsProblem) -> Result<(RowStatsKernel, Launch)> {
    problem.validate()?;
    arch.require_sparse_tensor_cores(ROW_STATS)?;
    let launch = Launch {
        blocks: (ceil_div(problem.m, RowStatsKernel::WARPS) as u32, 1),
        cluster: 1,
        threads: 32 * RowStatsKernel::WARPS as u32,
        shared_bytes: 0,
        overlaps: false,
    };
    Ok((RowStatsKernel { dtype: problem.dtype }, launch))
}

/// Computes the statistics on the GPU. Returns once the kernel is enqueued; nothing is launched on an error.
///
/// # Safety
///
/// The addresses in `tensors` must be device memory of `place.device` of the shape and type [`RowStatsTensors`] states for `problem`, alive
/// and not written elsewhere until the stream has run the kernel. `place.stream` must be a live stream.
pub unsafe fn row_stats(place: Place, problem: &RowStatsProblem, tensors: &RowStatsTensors) -> Result<()> {
    problem.validate()?;
    if problem.m == 0 {
        return Ok(());
    }
    tensors.validate()?;
    let (kernel, launch) = plan(&device::arch(ROW_STATS, place.device)?, problem)?;
    let params = RowStatsParams {
        x: tensors.x,
        stats: tensors.stats,
        ldx: problem.ldx,
        m: problem.m as i32,
        k: problem.k as i32,
        centered: problem.centered.into(),
        eps: problem.eps,
    };
    // SAFETY: these are the parameters of the kernel; the caller vouches for what they point to.
    unsafe { enqueue(place, Kernel::RowStats(kernel), launch, || Ok(params)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: RowStatsProblem = RowStatsProblem { dtype: Dtype::Bf16, m: 5, k: 128, ldx: 136, centered: true, eps: 1e-6 };

    fn refused<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
        match result {
            Err(Error::InvalidArgument { argument, .. }) => argument,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn problems_that_do_not_fit_are_refused() {
        OK.validate().unwrap();
        assert_eq!(refused(RowStatsProblem { dtype: Dtype::F16E4m3, ..OK }.validate()), "dtype");
        assert_eq!(refused(RowStatsProblem { m: -1, ..OK }.validate()), "m");
        assert_eq!(refused(RowStatsProblem { k: 96, ..OK }.validate()), "k");
        assert_eq!(refused(RowStatsProblem { ldx: 120, ..OK }.validate()), "ldx");
        assert_eq!(refused(RowStatsProblem { ldx: 132, ..OK }.validate()), "ldx");
        assert_eq!(refused(RowStatsProblem { eps: f32::NAN, ..OK }.validate()), "eps");
    }

    #[test]
    fn tensors_must_be_there_and_aligned() {
        RowStatsTensors { x: 16, stats: 8 }.validate().unwrap();
        assert_eq!(refused(RowStatsTensors { x: 8, stats: 8 }.validate()), "x");
        assert_eq!(refused(RowStatsTensors { x: 16, stats: 4 }.validate()), "stats");
        assert_eq!(refused(RowStatsTensors { x: 16, stats: 0 }.validate()), "stats");
    }

    #[test]
    fn every_row_has_a_warp() {
        let blocks = |m| plan(&Arch::from_capability((8, 0), 108), &RowStatsProblem { m, ..OK }).unwrap().1.blocks;
        assert_eq!([1, 4, 5, 4608].map(blocks), [(1, 1), (1, 1), (2, 1), (1152, 1)]);
        let turing = plan(&Arch::from_capability((7, 5), 40), &OK);
        assert_eq!(turing, Err(Error::UnsupportedArch { op: ROW_STATS, capability: (7, 5) }));
    }

    #[test]
    fn no_rows_need_no_driver() {
        // SAFETY: an empty problem launches nothing.
        let done = unsafe { row_stats(Place { device: 0, stream: 0 }, &RowStatsProblem { m: 0, ..OK }, &RowStatsTensors::default()) };
        assert_eq!(done, Ok(()));
    }
}
