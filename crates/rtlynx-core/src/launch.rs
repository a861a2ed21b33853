//! The two operations: validate, plan, load, launch. The only file that calls `cuLaunchKernel`.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use crate::config::{Kernel, Launch};
use crate::device::{self, Current, check};
use crate::dispatch;
use crate::error::Result;
use crate::kernels;
use crate::params::{SparsifyParams, SpmmParams};
use crate::problem::{SPARSE_LINEAR, SPARSIFY, SparseLinearProblem, SparseLinearTensors, SparsifyProblem, SparsifyTensors};

/// Where an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the GPU.
    pub device: i32,
    /// A `CUstream` of that GPU's primary context, as an integer; 0 is the default stream.
    pub stream: u64,
}

/// Selects, compresses, measures and projects on the GPU. Returns once the kernel is enqueued; nothing is launched on an error.
///
/// # Safety
///
/// Every non-zero address in `tensors` must be device memory of `place.device` of the shape and type [`SparsifyTensors`] states for
/// `problem`, alive and not written elsewhere until the stream has run the kernel. `place.stream` must be a live stream.
pub unsafe fn sparsify(place: Place, problem: &SparsifyProblem, tensors: &SparsifyTensors) -> Result<()> {
    problem.validate()?;
    if problem.is_empty() {
        return Ok(());
    }
    tensors.validate(problem)?;
    let (kernel, launch) = dispatch::plan_sparsify(&device::device(SPARSIFY, place.device)?.arch, problem)?;
    let mut params = SparsifyParams {
        x: tensors.x,
        score: tensors.score,
        shift: tensors.shift,
        comp_down: tensors.comp_down,
        values: tensors.values,
        metadata: tensors.metadata,
        row_scale: tensors.row_scale,
        branch: tensors.branch,
        ldx: problem.ldx,
        m: problem.m as i32,
        k: problem.k as i32,
        rank: problem.rank as i32,
        branch_of_dropped: problem.branch_of_dropped.into(),
        eps: problem.eps,
    };
    // SAFETY: these are the parameters of every sparsify kernel; the caller vouches for what they point to.
    unsafe { enqueue(place, Kernel::Sparsify(kernel), launch, &mut params) }
}

/// Multiplies a compressed activation with a dense weight on the GPU. Returns once the kernel is enqueued; nothing is launched on an
/// error.
///
/// # Safety
///
/// Every non-zero address in `tensors` must be device memory of `place.device` of the shape and type [`SparseLinearTensors`] states for
/// `problem`, alive and not written elsewhere until the stream has run the kernel. `place.stream` must be a live stream.
pub unsafe fn sparse_linear(place: Place, problem: &SparseLinearProblem, tensors: &SparseLinearTensors) -> Result<()> {
    problem.validate()?;
    if problem.is_empty() {
        return Ok(());
    }
    tensors.validate(problem)?;
    let (kernel, launch) = dispatch::plan_sparse_linear(&device::device(SPARSE_LINEAR, place.device)?.arch, problem)?;
    let mut params = SpmmParams {
        values: tensors.values,
        metadata: tensors.metadata,
        weight: tensors.weight,
        row_scale: tensors.row_scale,
        branch: tensors.branch,
        comp_up: tensors.comp_up,
        bias: tensors.bias,
        out: tensors.out,
        m: problem.m as i32,
        n: problem.n as i32,
        k: problem.k as i32,
        rank: problem.rank as i32,
    };
    // SAFETY: these are the parameters of every spmm kernel; the caller vouches for what they point to.
    unsafe { enqueue(place, Kernel::Spmm(kernel), launch, &mut params) }
}

/// # Safety
///
/// `params` must be the one struct that `kernel` takes, and what it points to must be as that kernel expects. `place.device` must have
/// passed [`device::device`].
unsafe fn enqueue<P: Copy>(place: Place, kernel: Kernel, launch: Launch, params: &mut P) -> Result<()> {
    let _current = Current::enter(place.device)?;
    let function = kernels::function(place.device, kernel, launch.shared_bytes)?;
    let stream = ptr::without_provenance_mut::<sys::CUstream_st>(place.stream as usize);
    let mut arguments = [ptr::from_mut(params).cast::<c_void>()];
    // SAFETY: the function belongs to the current context; the driver copies the parameters before it returns; the rest is the
    // caller's promise.
    let status = unsafe {
        sys::cuLaunchKernel(
            function,
            launch.blocks.0,
            launch.blocks.1,
            1,
            launch.threads,
            1,
            1,
            launch.shared_bytes,
            stream,
            arguments.as_mut_ptr(),
            ptr::null_mut(),
        )
    };
    check("cuLaunchKernel", status)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::problem::Dtype;

    const NOWHERE: Place = Place { device: 0, stream: 0 };
    const LINEAR: SparseLinearProblem = SparseLinearProblem { dtype: Dtype::Bf16, m: 0, n: 8, k: 64, rank: 0 };

    #[test]
    fn no_rows_need_no_driver() {
        // SAFETY: an empty problem launches nothing.
        assert_eq!(unsafe { sparse_linear(NOWHERE, &LINEAR, &SparseLinearTensors::default()) }, Ok(()));
    }

    #[test]
    fn bad_arguments_are_refused_before_the_driver_is_asked() {
        let problem = SparseLinearProblem { m: 4, ..LINEAR };
        // SAFETY: without tensors nothing is launched.
        let refused = unsafe { sparse_linear(NOWHERE, &problem, &SparseLinearTensors::default()) };
        assert!(matches!(refused, Err(Error::InvalidArgument { argument: "values", .. })), "{refused:?}");
    }
}
