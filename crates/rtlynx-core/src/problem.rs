//! Which problems are valid. Every number and pointer that reaches a kernel is checked here, once.

use crate::checks::{Presence, STATS_BYTES, VECTOR_BYTES, at_least_zero, pointer, positive_multiple, row_stride, valid_eps, valid_rank};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::{K_MULTIPLE, N_MULTIPLE};
use crate::prologue::{Activation, Prologue};

/// Name of the selection operation in errors.
pub const SPARSIFY: &str = "sparsify";
/// Name of the GEMM operation in errors.
pub const SPARSE_LINEAR: &str = "sparse_linear";

/// Select, compress, measure and project one activation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SparsifyProblem {
    /// Element types of the activation and of the values stored.
    pub dtype: Dtype,
    /// Rows (tokens).
    pub m: i64,
    /// Columns (input channels) of X.
    pub k: i64,
    /// Elements from one row of x to the next.
    pub ldx: i64,
    /// How X is made of x.
    pub prologue: Prologue,
    /// Whether the channels of X are gathered before anything is selected.
    pub gathered: bool,
    /// Rank of the branch; 0 for none.
    pub rank: i64,
    /// Whether the norm compensation factor of every row is computed.
    pub norm_compensation: bool,
    /// Whether the branch reads what selection dropped rather than the whole activation.
    pub branch_of_dropped: bool,
    /// Added to the squared norm of the kept part.
    pub eps: f32,
    /// Factor on the stored values where they are e4m3; 1 where they are not.
    pub values_scale: f32,
}

impl SparsifyProblem {
    /// Checks sizes and strides.
    pub fn validate(&self) -> Result<()> {
        at_least_zero(SPARSIFY, "m", self.m)?;
        positive_multiple(SPARSIFY, "k", self.k, K_MULTIPLE)?;
        valid_rank(SPARSIFY, self.rank)?;
        let Prologue { activation, head_k, ld_head, ld_gate, norm_rows } = self.prologue;
        if head_k < 0 || head_k >= self.k || head_k % K_MULTIPLE != 0 {
            return Err(Error::invalid(SPARSIFY, "head_k", head_k, format!("a multiple of {K_MULTIPLE} below k = {}", self.k)));
        }
        if head_k > 0 && !activation.takes_head() {
            return Err(Error::invalid(SPARSIFY, "head_k", head_k, "0: without an activation, and with a norm, X is made of x alone"));
        }
        if activation == Activation::Norm && (norm_rows <= 0 || self.m % norm_rows != 0) {
            return Err(Error::invalid(SPARSIFY, "norm_rows", norm_rows, format!("a positive divisor of m = {}", self.m)));
        }
        if activation == Activation::Norm && self.gathered {
            return Err(Error::invalid(SPARSIFY, "places", "a tensor", "none: no kernel gathers the channels of a norm"));
        }
        row_stride(SPARSIFY, "ldx", self.ldx, self.x_columns())?;
        if head_k > 0 {
            row_stride(SPARSIFY, "ld_head", ld_head, head_k)?;
        }
        if activation.has_gate() {
            row_stride(SPARSIFY, "ld_gate", ld_gate, self.x_columns())?;
        }
        valid_eps(SPARSIFY, self.eps)?;
        let scale = self.values_scale;
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(Error::invalid(SPARSIFY, "values_scale", scale, "a positive finite number"));
        }
        if scale != 1.0 && !self.dtype.has_e4m3_operands() {
            return Err(Error::invalid(SPARSIFY, "values_scale", scale, "1: only e4m3 values are scaled"));
        }
        Ok(())
    }

    /// Columns of x and of the gate.
    pub const fn x_columns(&self) -> i64 {
        self.k - self.prologue.head_k
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.m == 0
    }
}

/// Device addresses of one [`SparsifyProblem`]; 0 for an absent tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SparsifyTensors {
    /// `(m, k - head_k)` in dtype, row stride `ldx`
    pub x: u64,
    /// `(m, k - head_k)` in dtype, row stride `ld_gate`; absent without an activation that reads it
    pub gate: u64,
    /// `(m, head_k)` in dtype, row stride `ld_head`; absent when `head_k` is 0
    pub head: u64,
    /// `(m, 2)` f32, mean and rstd of each row of x; absent without a norm
    pub norm_stats: u64,
    /// `(m / norm_rows, k)` in dtype, or absent
    pub norm_weight: u64,
    /// `(m / norm_rows, k)` in dtype, or absent
    pub norm_bias: u64,
    /// `(k,)` f32 or absent
    pub score: u64,
    /// `(k,)` f32 or absent
    pub shift: u64,
    /// `(k,)` u8; absent where channels are not gathered
    pub places: u64,
    /// `(k, rank)` in dtype, absent without a branch
    pub comp_down: u64,
    /// `(m, k/2)` in the operands' type, written
    pub values: u64,
    /// metadata words, written
    pub metadata: u64,
    /// `(m,)` f32, written; absent without norm compensation
    pub row_scale: u64,
    /// `(m, rank)` in dtype, written; absent without a branch
    pub branch: u64,
}

impl SparsifyTensors {
    /// Checks presence and alignment against the problem, which must be valid and not empty.
    pub fn validate(&self, problem: &SparsifyProblem) -> Result<()> {
        let branch = if problem.rank > 0 { Presence::Required } else { Presence::Forbidden("rank is 0") };
        let row_scale = if problem.norm_compensation { Presence::Required } else { Presence::Forbidden("norm compensation is off") };
        let Prologue { activation, head_k, .. } = problem.prologue;
        let gate = if activation.has_gate() { Presence::Required } else { Presence::Forbidden("the activation has none") };
        let head = if head_k > 0 { Presence::Required } else { Presence::Forbidden("head_k is 0") };
        let (norm_stats, norm_vector) = match activation {
            Activation::Norm => (Presence::Required, Presence::Optional),
            _ => (Presence::Forbidden("there is no norm"), Presence::Forbidden("there is no norm")),
        };
        let places = if problem.gathered { Presence::Required } else { Presence::Forbidden("channels are not gathered") };
        pointer(SPARSIFY, "x", self.x, Presence::Required, VECTOR_BYTES)?;
        pointer(SPARSIFY, "gate", self.gate, gate, VECTOR_BYTES)?;
        pointer(SPARSIFY, "head", self.head, head, VECTOR_BYTES)?;
        pointer(SPARSIFY, "norm_stats", self.norm_stats, norm_stats, STATS_BYTES)?;
        pointer(SPARSIFY, "norm_weight", self.norm_weight, norm_vector, VECTOR_BYTES)?;
        pointer(SPARSIFY, "norm_bias", self.norm_bias, norm_vector, VECTOR_BYTES)?;
        pointer(SPARSIFY, "score", self.score, Presence::Optional, VECTOR_BYTES)?;
        pointer(SPARSIFY, "shift", self.shift, Presence::Optional, VECTOR_BYTES)?;
        pointer(SPARSIFY, "places", self.places, places, VECTOR_BYTES)?;
        pointer(SPARSIFY, "comp_down", self.comp_down, branch, VECTOR_BYTES)?;
        pointer(SPARSIFY, "values", self.values, Presence::Required, VECTOR_BYTES)?;
        pointer(SPARSIFY, "metadata", self.metadata, Presence::Required, VECTOR_BYTES)?;
        pointer(SPARSIFY, "row_scale", self.row_scale, row_scale, size_of::<f32>() as u64)?;
        pointer(SPARSIFY, "branch", self.branch, branch, VECTOR_BYTES)
    }
}

/// Multiply a compressed activation with a dense weight, scale rows, add the branch and the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SparseLinearProblem {
    /// Element types of the operands and of branch, bias and output.
    pub dtype: Dtype,
    /// Rows (tokens).
    pub m: i64,
    /// Output channels.
    pub n: i64,
    /// Input channels.
    pub k: i64,
    /// Rank of the branch; 0 for none.
    pub rank: i64,
}

impl SparseLinearProblem {
    /// Checks sizes.
    pub fn validate(&self) -> Result<()> {
        at_least_zero(SPARSE_LINEAR, "m", self.m)?;
        positive_multiple(SPARSE_LINEAR, "n", self.n, N_MULTIPLE)?;
        positive_multiple(SPARSE_LINEAR, "k", self.k, K_MULTIPLE)?;
        valid_rank(SPARSE_LINEAR, self.rank)
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.m == 0
    }
}

/// Device addresses of one [`SparseLinearProblem`]; 0 for an absent tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SparseLinearTensors {
    /// `(m, k/2)` in the operands' type
    pub values: u64,
    /// metadata words
    pub metadata: u64,
    /// `(n, k)` in the operands' type
    pub weight: u64,
    /// `(n,)` f32 with operands of e4m3, else absent
    pub weight_scale: u64,
    /// `(m,)` f32 or absent
    pub row_scale: u64,
    /// `(m, rank)` in dtype, absent without a branch
    pub branch: u64,
    /// `(n, rank)` in dtype, absent without a branch
    pub comp_up: u64,
    /// `(n,)` in dtype or absent
    pub bias: u64,
    /// `(m, n)` in dtype, written
    pub out: u64,
}

impl SparseLinearTensors {
    /// Checks presence and alignment against the problem, which must be valid and not empty.
    pub fn validate(&self, problem: &SparseLinearProblem) -> Result<()> {
        let branch = if problem.rank > 0 { Presence::Required } else { Presence::Forbidden("rank is 0") };
        pointer(SPARSE_LINEAR, "values", self.values, Presence::Required, VECTOR_BYTES)?;
        pointer(SPARSE_LINEAR, "metadata", self.metadata, Presence::Required, VECTOR_BYTES)?;
        pointer(SPARSE_LINEAR, "weight", self.weight, Presence::Required, VECTOR_BYTES)?;
        let weight_scale =
            if problem.dtype.has_e4m3_operands() { Presence::Required } else { Presence::Forbidden("the weight is not e4m3") };
        pointer(SPARSE_LINEAR, "weight_scale", self.weight_scale, weight_scale, VECTOR_BYTES)?;
        pointer(SPARSE_LINEAR, "row_scale", self.row_scale, Presence::Optional, size_of::<f32>() as u64)?;
        pointer(SPARSE_LINEAR, "branch", self.branch, branch, VECTOR_BYTES)?;
        pointer(SPARSE_LINEAR, "comp_up", self.comp_up, branch, VECTOR_BYTES)?;
        pointer(SPARSE_LINEAR, "bias", self.bias, Presence::Optional, VECTOR_BYTES)?;
        pointer(SPARSE_LINEAR, "out", self.out, Presence::Required, VECTOR_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPARSIFY_OK: SparsifyProblem = SparsifyProblem {
        dtype: Dtype::Bf16,
        m: 5,
        k: 128,
        ldx: 128,
        prologue: Prologue { activation: Activation::None, head_k: 0, ld_head: 0, ld_gate: 0, norm_rows: 0 },
        gathered: false,
        rank: 16,
        norm_compensation: true,
        branch_of_dropped: true,
        eps: 1e-8,
        values_scale: 1.0,
    };
    const SPARSIFY_TENSORS: SparsifyTensors = SparsifyTensors {
        x: 256,
        gate: 0,
        head: 0,
        norm_stats: 0,
        norm_weight: 0,
        norm_bias: 0,
        score: 0,
        shift: 0,
        places: 0,
        comp_down: 256,
        values: 256,
        metadata: 256,
        row_scale: 4,
        branch: 256,
    };
    const LINEAR_OK: SparseLinearProblem = SparseLinearProblem { dtype: Dtype::F16, m: 5, n: 8, k: 64, rank: 0 };
    const LINEAR_TENSORS: SparseLinearTensors = SparseLinearTensors {
        values: 16,
        metadata: 16,
        weight: 16,
        weight_scale: 0,
        row_scale: 4,
        branch: 0,
        comp_up: 0,
        bias: 16,
        out: 16,
    };

    /// The argument a refusal names.
    fn refused<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
        match result {
            Err(Error::InvalidArgument { argument, .. }) => argument,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn valid_problems_pass() {
        SPARSIFY_OK.validate().unwrap();
        SPARSIFY_TENSORS.validate(&SPARSIFY_OK).unwrap();
        LINEAR_OK.validate().unwrap();
        LINEAR_TENSORS.validate(&LINEAR_OK).unwrap();
        SparsifyProblem { m: 0, ..SPARSIFY_OK }.validate().unwrap();
        SparseLinearProblem { m: 0, ..LINEAR_OK }.validate().unwrap();
    }

    #[test]
    fn sizes_outside_the_format_are_refused() {
        for k in [0, -64, 1, 65, 96, i64::MAX, 1 << 31] {
            assert_eq!(refused(SparsifyProblem { k, ldx: i64::MAX - 7, ..SPARSIFY_OK }.validate()), "k", "{k}");
            assert_eq!(refused(SparseLinearProblem { k, ..LINEAR_OK }.validate()), "k", "{k}");
        }
        for n in [0, -8, 4, 12, 1 << 31] {
            assert_eq!(refused(SparseLinearProblem { n, ..LINEAR_OK }.validate()), "n", "{n}");
        }
        for m in [-1, 1 << 31, i32::MAX as i64] {
            assert_eq!(refused(SparsifyProblem { m, ..SPARSIFY_OK }.validate()), "m", "{m}");
            assert_eq!(refused(SparseLinearProblem { m, ..LINEAR_OK }.validate()), "m", "{m}");
        }
        for rank in [-16, 8, 17, 144] {
            assert_eq!(refused(SparsifyProblem { rank, ..SPARSIFY_OK }.validate()), "rank", "{rank}");
            assert_eq!(refused(SparseLinearProblem { rank, ..LINEAR_OK }.validate()), "rank", "{rank}");
        }
        for ldx in [64, 127, 130, -128] {
            assert_eq!(refused(SparsifyProblem { ldx, ..SPARSIFY_OK }.validate()), "ldx", "{ldx}");
        }
        for eps in [-1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(SparsifyProblem { eps, ..SPARSIFY_OK }.validate()), "eps", "{eps}");
        }
        let e4m3 = SparsifyProblem { dtype: Dtype::Bf16E4m3, ..SPARSIFY_OK };
        SparsifyProblem { values_scale: 0.5, ..e4m3 }.validate().unwrap();
        for values_scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(SparsifyProblem { values_scale, ..e4m3 }.validate()), "values_scale", "{values_scale}");
        }
        assert_eq!(refused(SparsifyProblem { values_scale: 0.5, ..SPARSIFY_OK }.validate()), "values_scale");
    }

    #[test]
    fn missing_superfluous_and_misaligned_tensors_are_refused() {
        let tensors = |change: fn(&mut SparsifyTensors), problem: SparsifyProblem| {
            let mut tensors = SPARSIFY_TENSORS;
            change(&mut tensors);
            refused(tensors.validate(&problem))
        };
        assert_eq!(tensors(|t| t.x = 0, SPARSIFY_OK), "x");
        assert_eq!(tensors(|t| t.x = 264, SPARSIFY_OK), "x");
        assert_eq!(tensors(|t| t.branch = 0, SPARSIFY_OK), "branch");
        assert_eq!(tensors(|t| t.score = 4, SPARSIFY_OK), "score");
        let gathered = SparsifyProblem { gathered: true, ..SPARSIFY_OK };
        SparsifyTensors { places: 16, ..SPARSIFY_TENSORS }.validate(&gathered).unwrap();
        assert_eq!(tensors(|t| t.places = 8, gathered), "places");
        assert_eq!(tensors(|_| {}, gathered), "places");
        assert_eq!(tensors(|t| t.places = 16, SPARSIFY_OK), "places");
        assert_eq!(tensors(|_| {}, SparsifyProblem { rank: 0, ..SPARSIFY_OK }), "comp_down");
        assert_eq!(tensors(|_| {}, SparsifyProblem { norm_compensation: false, ..SPARSIFY_OK }), "row_scale");
        assert_eq!(refused(SparseLinearTensors { bias: 2, ..LINEAR_TENSORS }.validate(&LINEAR_OK)), "bias");
        assert_eq!(refused(LINEAR_TENSORS.validate(&SparseLinearProblem { rank: 16, ..LINEAR_OK })), "branch");
        let scaled = SparseLinearTensors { weight_scale: 16, ..LINEAR_TENSORS };
        scaled.validate(&SparseLinearProblem { dtype: Dtype::F16E4m3, ..LINEAR_OK }).unwrap();
        assert_eq!(refused(scaled.validate(&LINEAR_OK)), "weight_scale");
        assert_eq!(refused(LINEAR_TENSORS.validate(&SparseLinearProblem { dtype: Dtype::F16E4m3, ..LINEAR_OK })), "weight_scale");
    }

    #[test]
    fn what_x_is_made_of_must_fit() {
        let prologue = Prologue { activation: Activation::SiluGate, head_k: 64, ld_head: 72, ld_gate: 64, ..Prologue::default() };
        let good = SparsifyProblem { prologue, ldx: 64, ..SPARSIFY_OK };
        good.validate().unwrap();
        let with = |prologue| refused(SparsifyProblem { prologue, ..good }.validate());
        for head_k in [-64, 32, 128, 192] {
            assert_eq!(with(Prologue { head_k, ..prologue }), "head_k");
        }
        assert_eq!(with(Prologue { activation: Activation::None, ..prologue }), "head_k");
        assert_eq!(with(Prologue { ld_head: 56, ..prologue }), "ld_head");
        assert_eq!(with(Prologue { ld_gate: 68, ..prologue }), "ld_gate");
        assert_eq!(refused(SparsifyProblem { ldx: 56, ..good }.validate()), "ldx");
        let tensors = SparsifyTensors { gate: 256, head: 256, ..SPARSIFY_TENSORS };
        tensors.validate(&good).unwrap();
        assert_eq!(refused(SparsifyTensors { gate: 0, ..tensors }.validate(&good)), "gate");
        assert_eq!(refused(SparsifyTensors { head: 8, ..tensors }.validate(&good)), "head");
        assert_eq!(refused(tensors.validate(&SPARSIFY_OK)), "gate");
        let gelu = SparsifyProblem { prologue: Prologue { activation: Activation::GeluTanh, ..Prologue::default() }, ..SPARSIFY_OK };
        SPARSIFY_TENSORS.validate(&gelu).unwrap();
        assert_eq!(refused(SparsifyTensors { head: 256, ..SPARSIFY_TENSORS }.validate(&gelu)), "head");
    }

    #[test]
    fn a_norm_must_fit() {
        let prologue = Prologue { activation: Activation::Norm, norm_rows: 3, ..Prologue::default() };
        let good = SparsifyProblem { m: 6, prologue, ..SPARSIFY_OK };
        good.validate().unwrap();
        SparsifyProblem { m: 0, ..good }.validate().unwrap();
        for norm_rows in [-3, 0, 4, 12] {
            let prologue = Prologue { norm_rows, ..prologue };
            assert_eq!(refused(SparsifyProblem { prologue, ..good }.validate()), "norm_rows", "{norm_rows}");
        }
        let prologue = Prologue { head_k: 64, ld_head: 64, ..prologue };
        assert_eq!(refused(SparsifyProblem { prologue, ..good }.validate()), "head_k");
        let bare = SparsifyTensors { norm_stats: 8, ..SPARSIFY_TENSORS };
        bare.validate(&good).unwrap();
        SparsifyTensors { norm_weight: 16, norm_bias: 16, ..bare }.validate(&good).unwrap();
        assert_eq!(refused(SparsifyTensors { norm_stats: 0, ..bare }.validate(&good)), "norm_stats");
        assert_eq!(refused(SparsifyTensors { norm_stats: 4, ..bare }.validate(&good)), "norm_stats");
        assert_eq!(refused(SparsifyTensors { norm_weight: 8, ..bare }.validate(&good)), "norm_weight");
        assert_eq!(refused(SparsifyTensors { norm_bias: 8, ..bare }.validate(&good)), "norm_bias");
        assert_eq!(refused(SparsifyTensors { gate: 16, ..bare }.validate(&good)), "gate");
        assert_eq!(refused(bare.validate(&SPARSIFY_OK)), "norm_stats");
        assert_eq!(refused(SparsifyTensors { norm_bias: 16, ..SPARSIFY_TENSORS }.validate(&SPARSIFY_OK)), "norm_bias");
    }
}
