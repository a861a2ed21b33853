//! The two operations on raw device addresses. Shapes, devices and lifetimes are `rtlynx.ops`' business.

use pyo3::prelude::*;
use rtlynx_core::dtype::Dtype;
use rtlynx_core::epilogue::Epilogue;
use rtlynx_core::launch::{self, Place};
use rtlynx_core::problem::{SPARSE_LINEAR, SPARSIFY, SparseLinearProblem, SparseLinearTensors, SparsifyProblem, SparsifyTensors};
use rtlynx_core::prologue::{Activation, Prologue};

use crate::error::to_python;

/// Enqueue selection, compression, row norms and the branch's projection. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the flat boundary between two languages
pub(crate) fn sparsify(
    device_index: i32,
    stream: u64,
    dtype: &str,
    m: i64,
    k: i64,
    ldx: i64,
    rank: i64,
    activation: &str,
    head_k: i64,
    ld_head: i64,
    ld_gate: i64,
    norm_rows: i64,
    x: u64,
    gate: u64,
    head: u64,
    norm_stats: u64,
    norm_weight: u64,
    norm_bias: u64,
    score: u64,
    shift: u64,
    places: u64,
    comp_down: u64,
    values: u64,
    metadata: u64,
    row_scale: u64,
    branch: u64,
    branch_of_dropped: bool,
    eps: f32,
    values_scale: f32,
) -> PyResult<()> {
    let dtype = Dtype::parse(SPARSIFY, dtype).map_err(to_python(SPARSIFY))?;
    let activation = Activation::parse(SPARSIFY, activation).map_err(to_python(SPARSIFY))?;
    let prologue = Prologue { activation, head_k, ld_head, ld_gate, norm_rows };
    let problem = SparsifyProblem {
        dtype,
        m,
        k,
        ldx,
        prologue,
        gathered: places != 0,
        rank,
        norm_compensation: row_scale != 0,
        branch_of_dropped,
        eps,
        values_scale,
    };
    let tensors = SparsifyTensors {
        x,
        gate,
        head,
        norm_stats,
        norm_weight,
        norm_bias,
        score,
        shift,
        places,
        comp_down,
        values,
        metadata,
        row_scale,
        branch,
    };
    // SAFETY: rtlynx.ops passes tensors of these shapes on this device and keeps them alive on the stream; this function is private.
    unsafe { launch::sparsify(Place { device: device_index, stream }, &problem, &tensors) }.map_err(to_python(SPARSIFY))
}

/// What `sparsify` can apply to x on this GPU: "none", "norm", and on some GPUs more.
#[pyfunction]
pub(crate) fn activations(device_index: i32) -> PyResult<Vec<&'static str>> {
    Ok(launch::activations(device_index).map_err(to_python(SPARSIFY))?.into_iter().map(Activation::name).collect())
}

/// Enqueue the sparse GEMM with row scale, branch, bias and what follows: activation, residual and `gates` rows of a gate. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // the flat boundary between two languages
pub(crate) fn sparse_linear(
    device_index: i32,
    stream: u64,
    dtype: &str,
    m: i64,
    n: i64,
    k: i64,
    rank: i64,
    values: u64,
    metadata: u64,
    weight: u64,
    weight_scale: u64,
    row_scale: u64,
    branch: u64,
    comp_up: u64,
    bias: u64,
    out: u64,
    activation: &str,
    residual: u64,
    gate: u64,
    gates: i64,
) -> PyResult<()> {
    let dtype = Dtype::parse(SPARSE_LINEAR, dtype).map_err(to_python(SPARSE_LINEAR))?;
    let problem = SparseLinearProblem { dtype, m, n, k, rank };
    let tensors = SparseLinearTensors { values, metadata, weight, weight_scale, row_scale, branch, comp_up, bias, out };
    let activation = Activation::parse(SPARSE_LINEAR, activation).map_err(to_python(SPARSE_LINEAR))?;
    let epilogue = Epilogue { activation, residual, gate, gates };
    // SAFETY: rtlynx.ops passes tensors of these shapes on this device and keeps them alive on the stream; this function is private.
    unsafe { launch::sparse_linear(Place { device: device_index, stream }, &problem, &epilogue, &tensors) }
        .map_err(to_python(SPARSE_LINEAR))
}
