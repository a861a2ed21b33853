//! The two operations: validate, plan, load, launch. The only file that calls `cuLaunchKernelEx`.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use crate::config::{Family, Kernel, Launch, SparsifyKernel, Tile};
use crate::device::{self, Current, check};
use crate::dispatch;
use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::kernels;
use crate::params::{SparsifyParams, SparsifySm90Params, SpmmParams, SpmmSm90Params};
use crate::problem::{SPARSE_LINEAR, SPARSIFY, SparseLinearProblem, SparseLinearTensors, SparsifyProblem, SparsifyTensors};
use crate::prologue::Activation;
use crate::tensor_map::{self, SparsifyMaps, SpmmMaps, TensorMap};
use crate::tuned;

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
    let (kernel, launch) = dispatch::plan_sparsify(&device::arch(SPARSIFY, place.device)?, problem)?;
    let kernel_name = Kernel::Sparsify(kernel);
    match kernel.family {
        // SAFETY: these are the parameters of the family's kernels; the caller vouches for what they point to.
        Family::Sm80 => unsafe { enqueue(place, kernel_name, launch, || Ok(sparsify_params(problem, tensors))) },
        // SAFETY: as above.
        Family::Sm90 => unsafe { enqueue(place, kernel_name, launch, || sparsify_sm90_params(&kernel, problem, tensors)) },
    }
}

/// What [`sparsify`] can apply to x on a GPU.
pub fn activations(device: i32) -> Result<Vec<Activation>> {
    Ok(dispatch::activations(&device::arch(SPARSIFY, device)?).collect())
}

fn sparsify_params(problem: &SparsifyProblem, tensors: &SparsifyTensors) -> SparsifyParams {
    SparsifyParams {
        x: tensors.x,
        score: tensors.score,
        shift: tensors.shift,
        places: tensors.places,
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
        norm_stats: tensors.norm_stats,
        norm_weight: tensors.norm_weight,
        norm_bias: tensors.norm_bias,
        norm_rows: problem.prologue.norm_rows as i32,
    }
}

fn sparsify_sm90_params(kernel: &SparsifyKernel, problem: &SparsifyProblem, tensors: &SparsifyTensors) -> Result<SparsifySm90Params> {
    let maps = SparsifyMaps::new(kernel, problem, tensors);
    Ok(SparsifySm90Params {
        x: maps.x.encode()?,
        comp_down: encoded(maps.comp_down)?,
        head: encoded(maps.head)?,
        gate: encoded(maps.gate)?,
        head_k: problem.prologue.head_k as i32,
        score: tensors.score,
        shift: tensors.shift,
        places: tensors.places,
        values: tensors.values,
        metadata: tensors.metadata,
        row_scale: tensors.row_scale,
        branch: tensors.branch,
        m: problem.m as i32,
        k: problem.k as i32,
        rank: problem.rank as i32,
        branch_of_dropped: problem.branch_of_dropped.into(),
        eps: problem.eps,
        values_scale: problem.values_scale,
        norm_stats: tensors.norm_stats,
        norm_weight: tensors.norm_weight,
        norm_bias: tensors.norm_bias,
        norm_rows: problem.prologue.norm_rows as i32,
    })
}

fn encoded(map: Option<TensorMap>) -> Result<sys::CUtensorMap> {
    map.map_or(Ok(tensor_map::UNUSED), |map| map.encode())
}

/// Multiplies a compressed activation with a dense weight on the GPU, and does what follows. Returns once the kernel is enqueued; nothing is launched on an
/// error.
///
/// # Safety
///
/// Every non-zero address in `tensors` and `epilogue` must be device memory of `place.device` of the shape and type [`SparseLinearTensors`]
/// and [`Epilogue`] state for `problem`, alive and not written elsewhere until the stream has run the kernel. `place.stream` must be a live stream.
pub unsafe fn sparse_linear(place: Place, problem: &SparseLinearProblem, epilogue: &Epilogue, tensors: &SparseLinearTensors) -> Result<()> {
    problem.validate()?;
    if problem.is_empty() {
        return Ok(());
    }
    tensors.validate(problem)?;
    epilogue.validate(problem, tensors.out)?;
    let (kernel, launch) = tuned::plan_sparse_linear(place.device, &device::arch(SPARSE_LINEAR, place.device)?, problem)?;
    let kernel = if epilogue.is_nothing() { kernel } else { kernel.with_epilogue() };
    match kernel.tile.family {
        // SAFETY: these are the parameters of the family's kernels; the caller vouches for what they point to.
        Family::Sm80 => unsafe { enqueue(place, Kernel::Spmm(kernel), launch, || Ok(spmm_params(problem, epilogue, tensors))) },
        // SAFETY: as above.
        Family::Sm90 => unsafe {
            enqueue(place, Kernel::Spmm(kernel), launch, || spmm_sm90_params(&kernel.tile, problem, epilogue, tensors))
        },
    }
}

fn spmm_params(problem: &SparseLinearProblem, epilogue: &Epilogue, tensors: &SparseLinearTensors) -> SpmmParams {
    SpmmParams {
        values: tensors.values,
        metadata: tensors.metadata,
        weight: tensors.weight,
        row_scale: tensors.row_scale,
        branch: tensors.branch,
        comp_up: tensors.comp_up,
        bias: tensors.bias,
        out: tensors.out,
        residual: epilogue.residual,
        gate: epilogue.gate,
        m: problem.m as i32,
        n: problem.n as i32,
        k: problem.k as i32,
        rank: problem.rank as i32,
        gate_rows: epilogue.gate_rows(problem) as i32,
        gelu_tanh: (epilogue.activation == Activation::GeluTanh).into(),
    }
}

fn spmm_sm90_params(
    tile: &Tile,
    problem: &SparseLinearProblem,
    epilogue: &Epilogue,
    tensors: &SparseLinearTensors,
) -> Result<SpmmSm90Params> {
    let maps = SpmmMaps::new(tile, problem, tensors);
    Ok(SpmmSm90Params {
        values: maps.values.encode()?,
        weight: maps.weight.encode()?,
        branch: encoded(maps.branch)?,
        comp_up: encoded(maps.comp_up)?,
        metadata: tensors.metadata,
        row_scale: tensors.row_scale,
        weight_scale: tensors.weight_scale,
        bias: tensors.bias,
        out: tensors.out,
        residual: epilogue.residual,
        gate: epilogue.gate,
        m: problem.m as i32,
        n: problem.n as i32,
        k: problem.k as i32,
        rank: problem.rank as i32,
        gate_rows: epilogue.gate_rows(problem) as i32,
        gelu_tanh: (epilogue.activation == Activation::GeluTanh).into(),
    })
}

/// Launches a kernel with the parameters that `params` makes. They are made last: by then the driver is known to be new enough for the
/// calls that takes.
///
/// # Safety
///
/// `params` must make the one struct that `kernel` takes, and what it points to must be as that kernel expects. `place.device` must have
/// passed [`device::device`].
pub(crate) unsafe fn enqueue<P: Copy>(place: Place, kernel: Kernel, launch: Launch, params: impl FnOnce() -> Result<P>) -> Result<()> {
    let _current = Current::enter(place.device)?;
    let function = kernels::function(place.device, kernel, launch.shared_bytes)?;
    let stream = ptr::without_provenance_mut::<sys::CUstream_st>(place.stream as usize);
    let mut params = params()?;
    let mut arguments = [ptr::from_mut(&mut params).cast::<c_void>()];
    // GPUs that know neither clusters nor overlap are asked for neither.
    let (mut attributes, mut count) = ([cluster_of(1); 2], 0);
    if launch.cluster > 1 {
        attributes[count] = cluster_of(launch.cluster);
        count += 1;
    }
    if launch.overlaps {
        attributes[count] = overlapping();
        count += 1;
    }
    let config = sys::CUlaunchConfig {
        gridDimX: launch.blocks.0,
        gridDimY: launch.blocks.1,
        gridDimZ: 1,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.shared_bytes,
        hStream: stream,
        attrs: attributes.as_mut_ptr(),
        numAttrs: count as u32,
    };
    // SAFETY: the function belongs to the current context; the driver copies the parameters and the attributes before it returns; the rest
    // is the caller's promise.
    let status = unsafe { sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), ptr::null_mut()) };
    check("cuLaunchKernelEx", status)
}

/// The launch attribute that makes a cluster of every `blocks` neighbours along x.
fn cluster_of(blocks: u32) -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks, y: 1, z: 1 };
    sys::CUlaunchAttribute { id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, pad: [0; 4], value }
}

/// The launch attribute that lets a kernel start while the one before it in the stream still runs, once all blocks of that one allow it.
fn overlapping() -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    sys::CUlaunchAttribute { id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, pad: [0; 4], value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::error::Error;

    const NOWHERE: Place = Place { device: 0, stream: 0 };
    const LINEAR: SparseLinearProblem = SparseLinearProblem { dtype: Dtype::Bf16, m: 0, n: 8, k: 64, rank: 0 };

    #[test]
    fn no_rows_need_no_driver() {
        // SAFETY: an empty problem launches nothing.
        assert_eq!(unsafe { sparse_linear(NOWHERE, &LINEAR, &Epilogue::default(), &SparseLinearTensors::default()) }, Ok(()));
    }

    #[test]
    fn bad_arguments_are_refused_before_the_driver_is_asked() {
        let problem = SparseLinearProblem { m: 4, ..LINEAR };
        // SAFETY: without tensors nothing is launched.
        let refused = unsafe { sparse_linear(NOWHERE, &problem, &Epilogue::default(), &SparseLinearTensors::default()) };
        assert!(matches!(refused, Err(Error::InvalidArgument { argument: "values", .. })), "{refused:?}");
    }
}
