//! The measurement of the tensor cores, for the benches.

use pyo3::prelude::*;
use rtlynx_core::launch::Place;
use rtlynx_core::probe::{self, PROBE, ProbeTensors};

use crate::error::to_python;

/// Enqueue a loop of tensor core instructions on operands in place: name is dense_ss, dense_rs, sparse_ss or sparse_rs.
///
/// Every multiprocessor multiplies 256 x 64 by 64 x 192, `steps` times. Addresses are `Tensor.data_ptr()`; rtlynx.bench.probe has the shapes.
#[pyfunction]
#[pyo3(name = "probe")]
#[allow(clippy::too_many_arguments)] // the flat boundary between two languages
pub(crate) fn run(
    device_index: i32,
    stream: u64,
    name: &str,
    steps: i64,
    data: u64,
    metadata: u64,
    sums: u64,
    cycles: u64,
) -> PyResult<()> {
    let kernel = probe::parse(name).map_err(to_python(PROBE))?;
    let tensors = ProbeTensors { data, metadata, sums, cycles };
    // SAFETY: rtlynx.bench.probe passes tensors of these shapes on this device and keeps them alive on the stream; this function is private.
    unsafe { probe::probe(Place { device: device_index, stream }, kernel, steps, &tensors) }.map_err(to_python(PROBE))
}
