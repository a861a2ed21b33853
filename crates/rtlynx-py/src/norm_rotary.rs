//! Norm, concatenation and rotation of heads on raw device addresses. Shapes, devices and lifetimes are `rtlynx.norm_rotary`'s business.

use pyo3::prelude::*;
use rtlynx_core::dtype::Dtype;
use rtlynx_core::launch::Place;
use rtlynx_core::norm_rotary::{self, HeadStrides, NORM_ROTARY, NormRotaryProblem, NormRotaryTensors};

use crate::error::to_python;

/// Enqueue the norm of every head, where there is a weight, and its rotation, first's tokens before x's. Strides are those of samples, tokens
/// and heads, and of tokens and pairs of the angles. Addresses are `Tensor.data_ptr()`, or 0.
#[pyfunction]
#[pyo3(name = "norm_rotary")]
#[allow(clippy::too_many_arguments)] // the flat boundary between two languages
pub(crate) fn run(
    device_index: i32,
    stream: u64,
    dtype: &str,
    samples: i64,
    tokens: i64,
    first_tokens: i64,
    heads: i64,
    dim: i64,
    strides: (i64, i64, i64),
    first_strides: (i64, i64, i64),
    angle_strides: (i64, i64),
    x: u64,
    first: u64,
    weight: u64,
    first_weight: u64,
    cos: u64,
    sin: u64,
    out: u64,
    eps: f32,
    first_eps: f32,
) -> PyResult<()> {
    let dtype = Dtype::parse(NORM_ROTARY, dtype).map_err(to_python(NORM_ROTARY))?;
    let of = |(sample, token, head)| HeadStrides { sample, token, head };
    let problem = NormRotaryProblem {
        dtype,
        samples,
        tokens,
        first_tokens,
        heads,
        dim,
        strides: of(strides),
        first_strides: of(first_strides),
        angle_strides,
        eps,
        first_eps,
    };
    let tensors = NormRotaryTensors { x, first, weight, first_weight, cos, sin, out };
    // SAFETY: rtlynx.norm_rotary passes tensors of these shapes on this device and keeps them alive on the stream; this function is private.
    unsafe { norm_rotary::norm_rotary(Place { device: device_index, stream }, &problem, &tensors) }.map_err(to_python(NORM_ROTARY))
}
