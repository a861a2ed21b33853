//! A whole layer, with all that stays the same from one call to the next: both operations, and one piece of memory for what passes between
//! them. For eager calls, whose time on the host is that of everything but the kernels.

use crate::epilogue::Epilogue;
use crate::error::Result;
use crate::format::{BLOCK_COLS, TILE_ROWS, ceil_div, padded_rows};
use crate::launch::{self, Place};
use crate::problem::{SparseLinearProblem, SparseLinearTensors, SparsifyProblem, SparsifyTensors};
use crate::prologue::Prologue;

/// Alignment of each part of the memory: what the caching allocators of the field give a tensor's first element.
const PART_BYTES: i64 = 512;

/// A layer, of which each call says what it reads and what follows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    /// Index of the GPU.
    pub device: i32,
    /// Of any input: `m`, `ldx` and `prologue` are not read.
    pub selection: SparsifyProblem,
    /// Output channels.
    pub n: i64,
    /// What selection reads beside x; the rest is not read.
    pub selects_by: SparsifyTensors,
    /// What the product reads beside what was selected; the rest is not read.
    pub multiplies_by: SparseLinearTensors,
}

/// The rows that a call selects from, and what is done to them before. Addresses are 0 for what is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Input {
    /// Address of the first row.
    pub x: u64,
    /// Elements from one row to the next.
    pub ldx: i64,
    /// Activation and concatenation; no norm.
    pub prologue: Prologue,
    /// Address of what the activation multiplies by.
    pub gate: u64,
    /// Address of the columns before those of x.
    pub head: u64,
}

/// What selection writes and the product reads, as bytes from the start of a piece of memory, and the size of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    metadata: u64,
    row_scale: u64,
    branch: u64,
    bytes: u64,
}

impl Layer {
    /// Bytes between selection and product for `m` rows, which must be a valid number of them.
    pub fn workspace_bytes(&self, m: i64) -> Result<u64> {
        self.selection_of(m, self.selection.k, Prologue::default()).validate()?;
        Ok(self.parts(m).bytes)
    }

    /// Enqueues selection.
    ///
    /// # Safety
    ///
    /// As of [`launch::sparsify`], for `input` of `m` rows, for what the layer was made with, and for `workspace`: memory of
    /// [`Self::workspace_bytes`] that is written.
    pub unsafe fn select(&self, stream: u64, m: i64, input: &Input, workspace: u64) -> Result<()> {
        let parts = self.parts(m);
        let Input { x, ldx, prologue, gate, head } = *input;
        let problem = self.selection_of(m, ldx, prologue);
        let tensors = SparsifyTensors {
            x,
            gate,
            head,
            values: workspace,
            metadata: workspace + parts.metadata,
            row_scale: if problem.norm_compensation { workspace + parts.row_scale } else { 0 },
            branch: if problem.rank > 0 { workspace + parts.branch } else { 0 },
            ..self.selects_by
        };
        // SAFETY: the parts are apart and as large as the problem needs; the rest is the caller's promise.
        unsafe { launch::sparsify(Place { device: self.device, stream }, &problem, &tensors) }
    }

    /// Enqueues the product of what [`Self::select`], of this layer or of one that selects alike, left in `workspace`, and what follows it.
    ///
    /// # Safety
    ///
    /// As of [`launch::sparse_linear`], for what the layer was made with, for `workspace`, for `epilogue`, and for `out`: memory of `m` rows
    /// that is written.
    pub unsafe fn multiply(&self, stream: u64, m: i64, workspace: u64, epilogue: &Epilogue, out: u64) -> Result<()> {
        let parts = self.parts(m);
        let SparsifyProblem { dtype, k, rank, norm_compensation, .. } = self.selection;
        let problem = SparseLinearProblem { dtype, m, n: self.n, k, rank };
        let tensors = SparseLinearTensors {
            values: workspace,
            metadata: workspace + parts.metadata,
            row_scale: if norm_compensation { workspace + parts.row_scale } else { 0 },
            branch: if rank > 0 { workspace + parts.branch } else { 0 },
            out,
            ..self.multiplies_by
        };
        // SAFETY: as above.
        unsafe { launch::sparse_linear(Place { device: self.device, stream }, &problem, epilogue, &tensors) }
    }

    fn selection_of(&self, m: i64, ldx: i64, prologue: Prologue) -> SparsifyProblem {
        SparsifyProblem { m, ldx, prologue, ..self.selection }
    }

    fn parts(&self, m: i64) -> Parts {
        let SparsifyProblem { dtype, k, rank, norm_compensation, .. } = self.selection;
        let mut end = 0;
        let mut part = |bytes: i64| {
            let start = end;
            end += ceil_div(bytes, PART_BYTES) * PART_BYTES;
            start as u64
        };
        part(m * k / 2 * dtype.operand_bytes());
        let metadata = part(metadata_bytes(m, k));
        let row_scale = part(if norm_compensation { m * size_of::<f32>() as i64 } else { 0 });
        let branch = part(m * rank * 2);
        Parts { metadata, row_scale, branch, bytes: end as u64 }
    }
}

/// Of `(⌈k/256⌉, 4⌈m/64⌉, 32, 4)` words.
fn metadata_bytes(m: i64, k: i64) -> i64 {
    let tiles = padded_rows(m) / TILE_ROWS;
    ceil_div(k, BLOCK_COLS) * tiles * 32 * 4 * size_of::<u32>() as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::error::Error;
    use crate::prologue::Activation;

    const LAYER: Layer = Layer {
        device: 0,
        selection: SparsifyProblem {
            dtype: Dtype::Bf16E4m3,
            m: 0,
            k: 320,
            ldx: 0,
            prologue: Prologue { activation: Activation::None, head_k: 0, ld_head: 0, ld_gate: 0, norm_rows: 0 },
            gathered: false,
            rank: 16,
            norm_compensation: true,
            branch_of_dropped: true,
            eps: 1e-8,
            values_scale: 1.0,
        },
        n: 64,
        selects_by: SparsifyTensors {
            x: 0,
            gate: 0,
            head: 0,
            norm_stats: 0,
            norm_weight: 0,
            norm_bias: 0,
            score: 0,
            shift: 0,
            places: 0,
            comp_down: 512,
            values: 0,
            metadata: 0,
            row_scale: 0,
            branch: 0,
        },
        multiplies_by: SparseLinearTensors {
            values: 0,
            metadata: 0,
            weight: 512,
            weight_scale: 512,
            row_scale: 0,
            branch: 0,
            comp_up: 512,
            bias: 0,
            out: 0,
        },
    };

    const INPUT: Input = Input { x: 0, ldx: 320, prologue: LAYER.selection.prologue, gate: 0, head: 0 };

    #[test]
    fn parts_are_apart_and_aligned() {
        // 70 rows: values 70 * 160 bytes, metadata of 2 blocks of 8 tiles, 70 floats, 70 * 16 halves.
        assert_eq!(LAYER.parts(70), Parts { metadata: 11264, row_scale: 11264 + 8192, branch: 19456 + 512, bytes: 19968 + 2560 });
        assert_eq!(LAYER.workspace_bytes(0), Ok(0));
    }

    #[test]
    fn rows_beyond_what_kernels_count_are_refused() {
        for m in [-1, i64::MAX] {
            assert!(matches!(LAYER.workspace_bytes(m), Err(Error::InvalidArgument { argument: "m", .. })), "{m}");
        }
    }

    #[test]
    fn what_is_missing_is_refused_before_the_driver_is_asked() {
        // SAFETY: without memory nothing is launched.
        let selected = unsafe { LAYER.select(0, 4, &INPUT, 512) };
        // SAFETY: as above.
        let multiplied = unsafe { LAYER.multiply(0, 4, 512, &Epilogue::default(), 0) };
        assert!(matches!(selected, Err(Error::InvalidArgument { argument: "x", .. })), "{selected:?}");
        assert!(matches!(multiplied, Err(Error::InvalidArgument { argument: "out", .. })), "{multiplied:?}");
    }

    #[test]
    fn what_comes_before_and_after_is_checked_too() {
        let prologue = Prologue { activation: Activation::GeluTanh, head_k: 64, ld_head: 64, ..INPUT.prologue };
        // SAFETY: nothing is launched without a head, nor with a gate and nothing to add it to.
        let selected = unsafe { LAYER.select(0, 4, &Input { x: 4096, ldx: 256, prologue, ..INPUT }, 512) };
        // SAFETY: as above.
        let multiplied = unsafe { LAYER.multiply(0, 4, 512, &Epilogue { gate: 512, gates: 1, ..Epilogue::default() }, 4096) };
        assert!(matches!(selected, Err(Error::InvalidArgument { argument: "head", .. })), "{selected:?}");
        assert!(matches!(multiplied, Err(Error::InvalidArgument { argument: "residual", .. })), "{multiplied:?}");
    }
}
