//! What selection's X is made of, before anything is selected.

use std::fmt;

use crate::error::{Error, Result};

/// What X is made of: its first `head_k` columns are those of the head, the others the activation of x.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prologue {
    /// Applied to x.
    pub activation: Activation,
    /// Columns of the head; 0 for none.
    pub head_k: i64,
    /// Elements from one row of the head to the next.
    pub ld_head: i64,
    /// Elements from one row of the gate to the next.
    pub ld_gate: i64,
    /// Rows of x that share a row of the norm's weight and bias.
    pub norm_rows: i64,
}

/// What is applied to x before anything else, in float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// GELU with tanh in place of the error function.
    GeluTanh,
    /// SiLU(x) times the gate.
    SiluGate,
    /// `(x - mean) · rstd · weight + bias`, with mean and rstd of each row.
    Norm,
}

impl Activation {
    /// Those that make X another tensor than x.
    pub const SOME: [Self; 3] = [Self::GeluTanh, Self::SiluGate, Self::Norm];

    /// Reads the name that `rtlynx.launch` has for it.
    pub fn parse(op: &'static str, name: &str) -> Result<Self> {
        let known = [Self::None, Self::GeluTanh, Self::SiluGate, Self::Norm];
        let found = known.into_iter().find(|activation| activation.name() == name);
        found.ok_or_else(|| Error::invalid(op, "activation", name, known.map(Self::name).join(", ")))
    }

    /// The name that [`Self::parse`] reads.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::GeluTanh => "gelu_tanh",
            Self::SiluGate => "silu_gate",
            Self::Norm => "norm",
        }
    }

    /// Whether it reads a gate.
    pub const fn has_gate(self) -> bool {
        matches!(self, Self::SiluGate)
    }

    /// Whether channels that are taken as they are may come before it.
    pub const fn takes_head(self) -> bool {
        matches!(self, Self::GeluTanh | Self::SiluGate)
    }
}

/// What stands at the end of kernel names.
impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "",
            Self::GeluTanh => "_gelu_tanh",
            Self::SiluGate => "_silu_gate",
            Self::Norm => "_norm",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_python_op() {
        for activation in [Activation::None, Activation::GeluTanh, Activation::SiluGate, Activation::Norm] {
            assert_eq!(Activation::parse("sparsify", activation.name()), Ok(activation));
        }
        let refused = Activation::parse("sparsify", "relu");
        assert!(matches!(refused, Err(Error::InvalidArgument { argument: "activation", .. })), "{refused:?}");
    }
}
