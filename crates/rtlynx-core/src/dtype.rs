//! Which element types there are, and their names.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Element types of a layer: of activations, branch, bias and output, and of the two operands of the sparse product, which may be e4m3 instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// bfloat16 with operands of e4m3
    Bf16E4m3,
    /// IEEE half precision with operands of e4m3
    F16E4m3,
}

impl Dtype {
    /// Every combination the kernels serve.
    pub const ALL: [Self; 4] = [Self::Bf16, Self::F16, Self::Bf16E4m3, Self::F16E4m3];
    /// One type for everything.
    pub const PLAIN: [Self; 2] = [Self::Bf16, Self::F16];

    /// Reads torch's name of the type, with `_e4m3` behind it for such operands; `op` names the operation in the error.
    pub fn parse(op: &'static str, name: &str) -> Result<Self> {
        name.parse().map_err(|()| Error::invalid(op, "dtype", name, "bfloat16 or float16, or either with _e4m3 behind it"))
    }

    /// Whether the sparse product multiplies e4m3.
    pub const fn has_e4m3_operands(self) -> bool {
        matches!(self, Self::Bf16E4m3 | Self::F16E4m3)
    }

    /// Bytes of an element of the operands.
    pub const fn operand_bytes(self) -> i64 {
        if self.has_e4m3_operands() { 1 } else { 2 }
    }
}

impl FromStr for Dtype {
    type Err = ();

    fn from_str(name: &str) -> std::result::Result<Self, ()> {
        match name {
            "bfloat16" => Ok(Self::Bf16),
            "float16" => Ok(Self::F16),
            "bfloat16_e4m3" => Ok(Self::Bf16E4m3),
            "float16_e4m3" => Ok(Self::F16E4m3),
            _ => Err(()),
        }
    }
}

/// As it stands in kernel names.
impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Bf16E4m3 => "bf16e4m3",
            Self::F16E4m3 => "f16e4m3",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_are_torch_names() {
        assert_eq!(Dtype::parse("sparsify", "bfloat16"), Ok(Dtype::Bf16));
        assert_eq!(Dtype::parse("sparsify", "float16"), Ok(Dtype::F16));
        assert_eq!(Dtype::parse("sparsify", "bfloat16_e4m3"), Ok(Dtype::Bf16E4m3));
        assert_eq!(Dtype::parse("sparsify", "float16_e4m3"), Ok(Dtype::F16E4m3));
        assert!(matches!(Dtype::parse("sparsify", "float32"), Err(Error::InvalidArgument { argument: "dtype", .. })));
    }
}
