//! The whole layer in one kernel, on raw device addresses. Shapes, devices and lifetimes are `rtlynx.fused`'s business.

use pyo3::prelude::*;
use rtlynx_core::dtype::Dtype;
use rtlynx_core::fused::{self, FUSED_LINEAR, FusedLinearProblem, FusedLinearTensors};
use rtlynx_core::launch::Place;

use crate::error::to_python;

/// Enqueue selection, sparse product, row scale, branch and bias in one kernel. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the flat boundary between two languages
pub(crate) fn fused_linear(
    device_index: i32,
    stream: u64,
    dtype: &str,
    m: i64,
    n: i64,
    k: i64,
    ldx: i64,
    rank: i64,
    x: u64,
    score: u64,
    shift: u64,
    comp_down: u64,
    weight: u64,
    comp_up: u64,
    bias: u64,
    branch: u64,
    progress: u64,
    out: u64,
    branch_of_dropped: bool,
    norm_compensation: bool,
    eps: f32,
) -> PyResult<()> {
    let dtype = Dtype::parse(FUSED_LINEAR, dtype).map_err(to_python(FUSED_LINEAR))?;
    let problem = FusedLinearProblem { dtype, m, n, k, ldx, rank, norm_compensation, branch_of_dropped, eps };
    let tensors = FusedLinearTensors { x, score, shift, comp_down, weight, comp_up, bias, branch, progress, out };
    // SAFETY: rtlynx.fused passes tensors of these shapes on this device and keeps them alive on the stream; this function is private.
    unsafe { fused::fused_linear(Place { device: device_index, stream }, &problem, &tensors) }.map_err(to_python(FUSED_LINEAR))
}
