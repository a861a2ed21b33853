//! What may follow a product before it is stored.

use crate::checks::{Presence, VECTOR_BYTES, pointer};
use crate::error::{Error, Result};
use crate::problem::{SPARSE_LINEAR, SparseLinearProblem};
use crate::prologue::Activation;

/// Y, or what `activation` makes of it, is multiplied by the gate and added to the residual. The default leaves Y as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epilogue {
    /// Applied to Y: none or GELU (tanh).
    pub activation: Activation,
    /// Address of `(m, n)` in dtype; 0 for none.
    pub residual: u64,
    /// Address of `(gates, n)` in dtype; 0 for none.
    pub gate: u64,
    /// Rows of the gate, each for as many neighbouring rows of Y; 0 without a gate.
    pub gates: i64,
}

impl Epilogue {
    /// Checks it against a problem that is valid and not empty, and the address that is written.
    pub fn validate(&self, problem: &SparseLinearProblem, out: u64) -> Result<()> {
        if !matches!(self.activation, Activation::None | Activation::GeluTanh) {
            return Err(Error::invalid(SPARSE_LINEAR, "activation", self.activation.name(), "none or gelu_tanh"));
        }
        let residual = if self.gate == 0 { Presence::Optional } else { Presence::Required };
        pointer(SPARSE_LINEAR, "residual", self.residual, residual, VECTOR_BYTES)?;
        let gate = if self.gates == 0 { Presence::Forbidden("it has no rows") } else { Presence::Required };
        pointer(SPARSE_LINEAR, "gate", self.gate, gate, VECTOR_BYTES)?;
        if self.gates < 0 || (self.gates > 0 && problem.m % self.gates != 0) {
            let expected = format!("a number of rows that divides m = {}", problem.m);
            return Err(Error::invalid(SPARSE_LINEAR, "gate", format!("{} rows", self.gates), expected));
        }
        let bytes = (problem.m as u64).saturating_mul(problem.n as u64).saturating_mul(2);
        if self.residual != 0 && self.residual.abs_diff(out) < bytes {
            return Err(Error::invalid(SPARSE_LINEAR, "residual", "memory that is written", "memory apart from out"));
        }
        Ok(())
    }

    /// Whether nothing follows.
    pub const fn is_nothing(&self) -> bool {
        matches!(self.activation, Activation::None) && self.residual == 0
    }

    /// Rows of Y that share a row of the gate; 1 without one.
    pub const fn gate_rows(&self, problem: &SparseLinearProblem) -> i64 {
        if self.gates == 0 { 1 } else { problem.m / self.gates }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    const PROBLEM: SparseLinearProblem = SparseLinearProblem { dtype: Dtype::Bf16, m: 6, n: 8, k: 64, rank: 0 };
    const OUT: u64 = 1024;
    const WHOLE: Epilogue = Epilogue { activation: Activation::GeluTanh, residual: 2048, gate: 4096, gates: 2 };

    fn refused(epilogue: Epilogue) -> &'static str {
        match epilogue.validate(&PROBLEM, OUT) {
            Err(Error::InvalidArgument { argument, .. }) => argument,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn every_part_may_be_absent() {
        for epilogue in
            [WHOLE, Epilogue::default(), Epilogue { gate: 0, gates: 0, ..WHOLE }, Epilogue { residual: 0, gate: 0, gates: 0, ..WHOLE }]
        {
            epilogue.validate(&PROBLEM, OUT).unwrap();
        }
        assert_eq!(WHOLE.gate_rows(&PROBLEM), 3);
        assert_eq!(Epilogue::default().gate_rows(&PROBLEM), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(refused(Epilogue { activation: Activation::SiluGate, ..WHOLE }), "activation");
        assert_eq!(refused(Epilogue { residual: 0, ..WHOLE }), "residual");
        assert_eq!(refused(Epilogue { residual: 2056, ..WHOLE }), "residual");
        assert_eq!(refused(Epilogue { gate: 4104, ..WHOLE }), "gate");
        assert_eq!(refused(Epilogue { gates: 0, ..WHOLE }), "gate");
        assert_eq!(refused(Epilogue { gate: 0, ..WHOLE }), "gate");
        for gates in [-2, 4, 12] {
            assert_eq!(refused(Epilogue { gates, ..WHOLE }), "gate", "{gates}");
        }
    }

    #[test]
    fn a_residual_in_the_output_is_refused() {
        for residual in [OUT - 80, OUT, OUT + 80] {
            assert_eq!(refused(Epilogue { residual, ..WHOLE }), "residual", "{residual}");
        }
        for residual in [OUT - 96, OUT + 96] {
            Epilogue { residual, ..WHOLE }.validate(&PROBLEM, OUT).unwrap();
        }
    }
}
