//! A layer on raw device addresses, for eager calls. Shapes, devices and lifetimes are `rtlynx.layer_call`'s business.

use pyo3::prelude::*;
use rtlynx_core::dtype::Dtype;
use rtlynx_core::layer;
use rtlynx_core::problem::{SPARSE_LINEAR, SPARSIFY, SparseLinearTensors, SparsifyProblem, SparsifyTensors};
use rtlynx_core::prologue::Prologue;

use crate::error::to_python;

/// What stays the same from one call of a layer to the next. Addresses are `Tensor.data_ptr()`, 0 for an absent tensor.
#[pyclass(frozen)]
pub(crate) struct Layer(layer::Layer);

#[pymethods]
impl Layer {
    #[new]
    #[allow(clippy::too_many_arguments)] // the flat boundary between two languages
    fn new(
        device_index: i32,
        dtype: &str,
        n: i64,
        k: i64,
        rank: i64,
        score: u64,
        shift: u64,
        places: u64,
        comp_down: u64,
        weight: u64,
        weight_scale: u64,
        comp_up: u64,
        bias: u64,
        norm_compensation: bool,
        branch_of_dropped: bool,
        eps: f32,
        values_scale: f32,
    ) -> PyResult<Self> {
        let selection = SparsifyProblem {
            dtype: Dtype::parse(SPARSIFY, dtype).map_err(to_python(SPARSIFY))?,
            m: 0,
            k,
            ldx: k,
            prologue: Prologue::default(),
            gathered: places != 0,
            rank,
            norm_compensation,
            branch_of_dropped,
            eps,
            values_scale,
        };
        let selects_by = SparsifyTensors { score, shift, places, comp_down, ..SparsifyTensors::default() };
        let multiplies_by = SparseLinearTensors { weight, weight_scale, comp_up, bias, ..SparseLinearTensors::default() };
        Ok(Self(layer::Layer { device: device_index, selection, n, selects_by, multiplies_by }))
    }

    /// Bytes of the memory between selection and product for m rows.
    fn workspace_bytes(&self, m: i64) -> PyResult<u64> {
        self.0.workspace_bytes(m).map_err(to_python(SPARSIFY))
    }

    /// Enqueue selection from m contiguous rows of x.
    fn select(&self, stream: u64, m: i64, x: u64, workspace: u64) -> PyResult<()> {
        // SAFETY: rtlynx.layer_call passes tensors of these shapes on this device and keeps them alive on the stream; the class is private.
        unsafe { self.0.select(stream, m, x, workspace) }.map_err(to_python(SPARSIFY))
    }

    /// Enqueue the product of what was selected into `workspace`, by this layer or by one that selects alike.
    fn multiply(&self, stream: u64, m: i64, workspace: u64, out: u64) -> PyResult<()> {
        // SAFETY: as above.
        unsafe { self.0.multiply(stream, m, workspace, out) }.map_err(to_python(SPARSE_LINEAR))
    }

    /// Enqueue both.
    fn run(&self, stream: u64, m: i64, x: u64, workspace: u64, out: u64) -> PyResult<()> {
        self.select(stream, m, x, workspace)?;
        self.multiply(stream, m, workspace, out)
    }
}
