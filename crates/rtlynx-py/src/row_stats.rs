//! Mean and deviation of rows on raw device addresses. Shapes, devices and lifetimes are `rtlynx.row_stats`' business.

use pyo3::prelude::*;
use rtlynx_core::dtype::Dtype;
use rtlynx_core::launch::Place;
use rtlynx_core::row_stats::{self, ROW_STATS, RowStatsProblem, RowStatsTensors};

use crate::error::to_python;

/// Enqueue the mean (0 if not centered) and 1 / sqrt(variance + eps) of every row. Addresses are `Tensor.data_ptr()`.
#[pyfunction]
#[pyo3(name = "row_stats")]
#[allow(clippy::too_many_arguments)] // the flat boundary between two languages
pub(crate) fn run(
    device_index: i32,
    stream: u64,
    dtype: &str,
    m: i64,
    k: i64,
    ldx: i64,
    x: u64,
    stats: u64,
    centered: bool,
    eps: f32,
) -> PyResult<()> {
    let dtype = Dtype::parse(ROW_STATS, dtype).map_err(to_python(ROW_STATS))?;
    let problem = RowStatsProblem { dtype, m, k, ldx, centered, eps };
    // SAFETY: rtlynx.row_stats passes tensors of these shapes on this device and keeps them alive on the stream; this function is private.
    unsafe { row_stats::row_stats(Place { device: device_index, stream }, &problem, &RowStatsTensors { x, stats }) }
        .map_err(to_python(ROW_STATS))
}
