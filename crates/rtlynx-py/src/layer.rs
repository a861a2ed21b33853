//! A layer on raw device addresses, for eager calls. Shapes, devices and lifetimes are `rtlynx.layer_call`'s business.

use pyo3::prelude::*;
use rtlynx_core::dtype::Dtype;
use rtlynx_core::epilogue::Epilogue;
use rtlynx_core::layer::{self, Input};
use rtlynx_core::problem::{SPARSE_LINEAR, SPARSIFY, SparseLinearTensors, SparsifyProblem, SparsifyTensors};
use rtlynx_core::prologue::{Activation, Prologue};

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
        let input = Input { x, ldx: self.0.selection.k, prologue: Prologue::default(), gate: 0, head: 0 };
        self.select_input(stream, m, &input, workspace)
    }

    /// Enqueue the product of what was selected into `workspace`, by this layer or by one that selects alike.
    fn multiply(&self, stream: u64, m: i64, workspace: u64, out: u64) -> PyResult<()> {
        self.multiply_and(stream, m, workspace, &Epilogue::default(), out)
    }

    /// Enqueue both.
    fn run(&self, stream: u64, m: i64, x: u64, workspace: u64, out: u64) -> PyResult<()> {
        self.select(stream, m, x, workspace)?;
        self.multiply(stream, m, workspace, out)
    }

    /// Enqueue both, with what comes before the layer, as `sparsify` has it, and a gated sum after it, as `sparse_linear` does.
    #[allow(clippy::too_many_arguments)] // the flat boundary between two languages
    fn run_fused(
        &self,
        stream: u64,
        m: i64,
        x: u64,
        ldx: i64,
        activation: &str,
        gate: u64,
        ld_gate: i64,
        head: u64,
        head_k: i64,
        ld_head: i64,
        workspace: u64,
        residual: u64,
        residual_gate: u64,
        residual_gates: i64,
        out: u64,
    ) -> PyResult<()> {
        let activation = Activation::parse(SPARSIFY, activation).map_err(to_python(SPARSIFY))?;
        let prologue = Prologue { activation, head_k, ld_head, ld_gate, norm_rows: 0 };
        let epilogue = Epilogue { activation: Activation::None, residual, gate: residual_gate, gates: residual_gates };
        self.select_input(stream, m, &Input { x, ldx, prologue, gate, head }, workspace)?;
        self.multiply_and(stream, m, workspace, &epilogue, out)
    }
}

impl Layer {
    fn select_input(&self, stream: u64, m: i64, input: &Input, workspace: u64) -> PyResult<()> {
        // SAFETY: rtlynx.layer_call passes tensors of these shapes on this device and keeps them alive on the stream; the class is private.
        unsafe { self.0.select(stream, m, input, workspace) }.map_err(to_python(SPARSIFY))
    }

    fn multiply_and(&self, stream: u64, m: i64, workspace: u64, epilogue: &Epilogue, out: u64) -> PyResult<()> {
        // SAFETY: as above.
        unsafe { self.0.multiply(stream, m, workspace, epilogue, out) }.map_err(to_python(SPARSE_LINEAR))
    }
}
