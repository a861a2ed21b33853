//! What is asked of sizes, strides and addresses, in one wording for every operation.

use crate::error::{Error, Result};
use crate::format::{MAX_RANK, RANK_MULTIPLE};

/// Bytes that kernels load and store at a time: what every tensor's first element must be aligned to.
pub const VECTOR_BYTES: u64 = 16;
/// Bytes of the mean and rstd of a row, which are loaded and stored together.
pub(crate) const STATS_BYTES: u64 = 8;
/// Elements of a 16-bit type in one vector.
pub(crate) const VECTOR_ELEMENTS: i64 = 8;
/// Kernels index rows and columns with 32-bit integers, and pad rows up to a block.
const MAX_SIZE: i64 = i32::MAX as i64 - 256;

/// Whether a tensor may be absent.
#[derive(Clone, Copy)]
pub(crate) enum Presence {
    Required,
    Optional,
    Forbidden(&'static str),
}

pub(crate) fn pointer(op: &'static str, argument: &'static str, address: u64, presence: Presence, alignment: u64) -> Result<()> {
    match presence {
        Presence::Required if address == 0 => Err(Error::invalid(op, argument, "no tensor", "a tensor")),
        Presence::Forbidden(why) if address != 0 => Err(Error::invalid(op, argument, "a tensor", format!("none: {why}"))),
        _ if !address.is_multiple_of(alignment) => {
            Err(Error::invalid(op, argument, format!("address {address:#x}"), format!("an address aligned to {alignment} bytes")))
        }
        _ => Ok(()),
    }
}

pub(crate) fn at_least_zero(op: &'static str, argument: &'static str, got: i64) -> Result<()> {
    if (0..=MAX_SIZE).contains(&got) { Ok(()) } else { Err(Error::invalid(op, argument, got, format!("0 to {MAX_SIZE}"))) }
}

pub(crate) fn positive_multiple(op: &'static str, argument: &'static str, got: i64, of: i64) -> Result<()> {
    if got > 0 && got <= MAX_SIZE && got % of == 0 {
        Ok(())
    } else {
        Err(Error::invalid(op, argument, got, format!("a positive multiple of {of}, at most {MAX_SIZE}")))
    }
}

pub(crate) fn valid_rank(op: &'static str, got: i64) -> Result<()> {
    if (0..=MAX_RANK).contains(&got) && got % RANK_MULTIPLE == 0 {
        Ok(())
    } else {
        Err(Error::invalid(op, "rank", got, format!("a multiple of {RANK_MULTIPLE}, 0 to {MAX_RANK}")))
    }
}

pub(crate) fn valid_eps(op: &'static str, got: f32) -> Result<()> {
    if got >= 0.0 && got.is_finite() { Ok(()) } else { Err(Error::invalid(op, "eps", got, "a finite number, at least 0")) }
}

pub(crate) fn row_stride(op: &'static str, argument: &'static str, got: i64, columns: i64) -> Result<()> {
    if got >= columns && got % VECTOR_ELEMENTS == 0 {
        Ok(())
    } else {
        Err(Error::invalid(op, argument, got, format!("a multiple of {VECTOR_ELEMENTS}, at least {columns}")))
    }
}
