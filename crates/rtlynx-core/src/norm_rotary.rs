//! What a block does to queries or keys between their projections and attention: norm, concatenation, rotation. Validate, plan, launch.

use crate::checks::{Presence, VECTOR_BYTES, VECTOR_ELEMENTS, at_least_zero, pointer, positive_multiple, valid_eps};
use crate::config::{Kernel, Launch, NormRotaryKernel};
use crate::device;
use crate::dispatch::Arch;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::format::ceil_div;
use crate::launch::{Place, enqueue};
use crate::params::NormRotaryParams;

/// Name of the operation in errors.
pub const NORM_ROTARY: &str = "norm_rotary";

/// The most channels of a head.
pub const MAX_DIM: i64 = NormRotaryKernel::DIMS[NormRotaryKernel::DIMS.len() - 1];

/// Bytes of a cosine, which are loaded one by one.
const ANGLE_BYTES: u64 = 4;
/// The grid's limit along y, by which heads are divided.
const MAX_HEADS: i64 = 65535 * NormRotaryKernel::HEADS;

/// Elements from one sample, token and head to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadStrides {
    /// Between samples.
    pub sample: i64,
    /// Between tokens.
    pub token: i64,
    /// Between heads.
    pub head: i64,
}

impl HeadStrides {
    fn validate(self, argument: &'static str) -> Result<()> {
        for stride in [self.sample, self.token, self.head] {
            if stride < 0 || stride % VECTOR_ELEMENTS != 0 {
                return Err(Error::invalid(
                    NORM_ROTARY,
                    argument,
                    format!("stride {stride}"),
                    format!("strides in multiples of {VECTOR_ELEMENTS}"),
                ));
            }
        }
        Ok(())
    }
}

/// The tokens of `first`, then those of `x`, each normed if it has a weight, and all rotated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormRotaryProblem {
    /// Element type of everything but the angles, which are f32.
    pub dtype: Dtype,
    /// Samples.
    pub samples: i64,
    /// Tokens of `x`.
    pub tokens: i64,
    /// Tokens of `first`.
    pub first_tokens: i64,
    /// Heads of a token.
    pub heads: i64,
    /// Channels of a head.
    pub dim: i64,
    /// Of `x`.
    pub strides: HeadStrides,
    /// Of `first`; not read without tokens.
    pub first_strides: HeadStrides,
    /// Elements between the tokens of cosines and sines, and between their pairs of channels.
    pub angle_strides: (i64, i64),
    /// Added to the mean of squares of `x`.
    pub eps: f32,
    /// Added to the mean of squares of `first`.
    pub first_eps: f32,
}

impl NormRotaryProblem {
    /// Checks sizes and strides.
    pub fn validate(&self) -> Result<()> {
        if self.dtype.has_e4m3_operands() {
            return Err(Error::invalid(NORM_ROTARY, "dtype", self.dtype, "bfloat16 or float16"));
        }
        for (argument, size) in
            [("samples", self.samples), ("tokens", self.tokens), ("first_tokens", self.first_tokens), ("heads", self.heads)]
        {
            at_least_zero(NORM_ROTARY, argument, size)?;
        }
        at_least_zero(NORM_ROTARY, "tokens", self.rows())?;
        if self.heads > MAX_HEADS {
            return Err(Error::invalid(NORM_ROTARY, "heads", self.heads, format!("at most {MAX_HEADS}")));
        }
        positive_multiple(NORM_ROTARY, "dim", self.dim, VECTOR_ELEMENTS)?;
        if self.dim > MAX_DIM {
            return Err(Error::invalid(NORM_ROTARY, "dim", self.dim, format!("at most {MAX_DIM}")));
        }
        self.strides.validate("x")?;
        self.first_strides.validate("first")?;
        if self.angle_strides.0 < 0 || self.angle_strides.1 < 0 {
            return Err(Error::invalid(NORM_ROTARY, "cos", format!("strides {:?}", self.angle_strides), "strides of at least 0"));
        }
        valid_eps(NORM_ROTARY, self.eps)?;
        valid_eps(NORM_ROTARY, self.first_eps)
    }

    /// Tokens of all samples together. Sizes are those of 32 bits, so it cannot overflow.
    fn rows(&self) -> i64 {
        self.samples * (self.first_tokens + self.tokens)
    }
}

/// Device addresses of one [`NormRotaryProblem`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NormRotaryTensors {
    /// `(samples, tokens, heads, dim)` in dtype, strided
    pub x: u64,
    /// `(samples, first_tokens, heads, dim)` in dtype, strided; 0 without tokens
    pub first: u64,
    /// `(dim,)` in dtype; 0: `x` is not normed
    pub weight: u64,
    /// `(dim,)` in dtype; 0: `first` is not normed
    pub first_weight: u64,
    /// `(first_tokens + tokens, dim / 2)` f32, strided
    pub cos: u64,
    /// as `cos`
    pub sin: u64,
    /// `(samples, first_tokens + tokens, heads, dim)` in dtype, written
    pub out: u64,
}

impl NormRotaryTensors {
    /// Checks presence and alignment.
    pub fn validate(&self, problem: &NormRotaryProblem) -> Result<()> {
        let of = |tokens| if tokens > 0 { Presence::Required } else { Presence::Optional };
        pointer(NORM_ROTARY, "x", self.x, of(problem.tokens), VECTOR_BYTES)?;
        pointer(NORM_ROTARY, "first", self.first, of(problem.first_tokens), VECTOR_BYTES)?;
        pointer(NORM_ROTARY, "weight", self.weight, Presence::Optional, VECTOR_BYTES)?;
        pointer(NORM_ROTARY, "first_weight", self.first_weight, Presence::Optional, VECTOR_BYTES)?;
        pointer(NORM_ROTARY, "cos", self.cos, Presence::Required, ANGLE_BYTES)?;
        pointer(NORM_ROTARY, "sin", self.sin, Presence::Required, ANGLE_BYTES)?;
        pointer(NORM_ROTARY, "out", self.out, Presence::Required, VECTOR_BYTES)
    }
}

/// The kernel of the fewest lanes that hold a head, and blocks enough for every token and every [`NormRotaryKernel::HEADS`] of its heads.
pub fn plan(arch: &Arch, problem: &NormRotaryProblem) -> Result<(NormRotaryKernel, Launch)> {
    problem.validate()?;
    arch.require_sparse_tensor_cores(NORM_ROTARY)?;
    let dim = NormRotaryKernel::DIMS.into_iter().find(|&dim| problem.dim <= dim).unwrap_or(MAX_DIM);
    let kernel = NormRotaryKernel { dtype: problem.dtype, dim };
    let launch = Launch {
        blocks: (ceil_div(problem.rows(), kernel.rows()) as u32, ceil_div(problem.heads, NormRotaryKernel::HEADS) as u32),
        cluster: 1,
        threads: NormRotaryKernel::THREADS as u32,
        shared_bytes: 0,
        overlaps: false,
    };
    Ok((kernel, launch))
}

/// Norms, concatenates and rotates on the GPU. Returns once the kernel is enqueued; nothing is launched on an error.
///
/// # Safety
///
/// The addresses in `tensors` must be device memory of `place.device` of the shape and type [`NormRotaryTensors`] states for `problem`,
/// alive and not written elsewhere until the stream has run the kernel. `place.stream` must be a live stream.
pub unsafe fn norm_rotary(place: Place, problem: &NormRotaryProblem, tensors: &NormRotaryTensors) -> Result<()> {
    problem.validate()?;
    if problem.rows() == 0 || problem.heads == 0 {
        return Ok(());
    }
    tensors.validate(problem)?;
    let (kernel, launch) = plan(&device::arch(NORM_ROTARY, place.device)?, problem)?;
    let params = params(problem, tensors);
    // SAFETY: these are the parameters of the kernel; the caller vouches for what they point to.
    unsafe { enqueue(place, Kernel::NormRotary(kernel), launch, || Ok(params)) }
}

fn params(problem: &NormRotaryProblem, tensors: &NormRotaryTensors) -> NormRotaryParams {
    NormRotaryParams {
        x: tensors.x,
        first: tensors.first,
        weight: tensors.weight,
        first_weight: tensors.first_weight,
        cos: tensors.cos,
        sin: tensors.sin,
        out: tensors.out,
        sample_stride: problem.strides.sample,
        token_stride: problem.strides.token,
        head_stride: problem.strides.head,
        first_sample_stride: problem.first_strides.sample,
        first_token_stride: problem.first_strides.token,
        first_head_stride: problem.first_strides.head,
        angle_row_stride: problem.angle_strides.0,
        angle_stride: problem.angle_strides.1,
        samples: problem.samples as i32,
        tokens: problem.tokens as i32,
        first_tokens: problem.first_tokens as i32,
        heads: problem.heads as i32,
        dim: problem.dim as i32,
        eps: problem.eps,
        first_eps: problem.first_eps,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRIDES: HeadStrides = HeadStrides { sample: 4608 * 9216, token: 9216, head: 128 };
    const OK: NormRotaryProblem = NormRotaryProblem {
        dtype: Dtype::Bf16,
        samples: 1,
        tokens: 4096,
        first_tokens: 512,
        heads: 24,
        dim: 128,
        strides: STRIDES,
        first_strides: STRIDES,
        angle_strides: (128, 2),
        eps: 1e-6,
        first_eps: 1e-6,
    };
    const THERE: NormRotaryTensors = NormRotaryTensors { x: 16, first: 32, weight: 48, first_weight: 64, cos: 4, sin: 8, out: 80 };

    fn refused<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
        match result {
            Err(Error::InvalidArgument { argument, .. }) => argument,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn problems_that_do_not_fit_are_refused() {
        OK.validate().unwrap();
        NormRotaryProblem { dim: 8, tokens: 0, angle_strides: (0, 1), ..OK }.validate().unwrap();
        assert_eq!(refused(NormRotaryProblem { dtype: Dtype::F16E4m3, ..OK }.validate()), "dtype");
        assert_eq!(refused(NormRotaryProblem { samples: -1, ..OK }.validate()), "samples");
        assert_eq!(refused(NormRotaryProblem { tokens: -1, ..OK }.validate()), "tokens");
        assert_eq!(refused(NormRotaryProblem { tokens: 1 << 30, samples: 4, ..OK }.validate()), "tokens");
        assert_eq!(refused(NormRotaryProblem { first_tokens: -1, ..OK }.validate()), "first_tokens");
        assert_eq!(refused(NormRotaryProblem { heads: MAX_HEADS + 1, ..OK }.validate()), "heads");
        for dim in [0, 60, 264] {
            assert_eq!(refused(NormRotaryProblem { dim, ..OK }.validate()), "dim");
        }
        assert_eq!(refused(NormRotaryProblem { strides: HeadStrides { token: 9220, ..STRIDES }, ..OK }.validate()), "x");
        assert_eq!(refused(NormRotaryProblem { first_strides: HeadStrides { head: -128, ..STRIDES }, ..OK }.validate()), "first");
        assert_eq!(refused(NormRotaryProblem { angle_strides: (-1, 2), ..OK }.validate()), "cos");
        assert_eq!(refused(NormRotaryProblem { eps: f32::NAN, ..OK }.validate()), "eps");
        assert_eq!(refused(NormRotaryProblem { first_eps: -1.0, ..OK }.validate()), "eps");
    }

    #[test]
    fn tensors_must_be_there_and_aligned() {
        THERE.validate(&OK).unwrap();
        NormRotaryTensors { weight: 0, first_weight: 0, ..THERE }.validate(&OK).unwrap();
        NormRotaryTensors { first: 0, ..THERE }.validate(&NormRotaryProblem { first_tokens: 0, ..OK }).unwrap();
        assert_eq!(refused(NormRotaryTensors { x: 8, ..THERE }.validate(&OK)), "x");
        assert_eq!(refused(NormRotaryTensors { x: 0, ..THERE }.validate(&OK)), "x");
        assert_eq!(refused(NormRotaryTensors { first: 0, ..THERE }.validate(&OK)), "first");
        assert_eq!(refused(NormRotaryTensors { weight: 2, ..THERE }.validate(&OK)), "weight");
        assert_eq!(refused(NormRotaryTensors { first_weight: 2, ..THERE }.validate(&OK)), "first_weight");
        assert_eq!(refused(NormRotaryTensors { cos: 2, ..THERE }.validate(&OK)), "cos");
        assert_eq!(refused(NormRotaryTensors { sin: 0, ..THERE }.validate(&OK)), "sin");
        assert_eq!(refused(NormRotaryTensors { out: 8, ..THERE }.validate(&OK)), "out");
    }

    #[test]
    fn every_token_and_head_has_lanes() {
        let arch = Arch::from_capability((8, 0), 108);
        let planned = |problem| plan(&arch, &problem).unwrap();
        let (kernel, launch) = planned(OK);
        assert_eq!((kernel.to_string().as_str(), launch.blocks, launch.threads), ("norm_rotary_bf16_d128", (288, 3), 256));
        for (dim, rows) in [(8, 32), (64, 32), (72, 16), (128, 16), (136, 8), (256, 8)] {
            let (kernel, launch) = planned(NormRotaryProblem { dim, heads: 1, first_tokens: 0, tokens: rows + 1, ..OK });
            assert!(kernel.dim >= dim && kernel.rows() == rows && launch.blocks == (2, 1), "{dim}");
        }
        assert_eq!(planned(NormRotaryProblem { heads: 9, ..OK }).1.blocks.1, 2);
        let turing = plan(&Arch::from_capability((7, 5), 40), &OK);
        assert_eq!(turing, Err(Error::UnsupportedArch { op: NORM_ROTARY, capability: (7, 5) }));
    }

    #[test]
    fn no_tokens_need_no_driver() {
        let place = Place { device: 0, stream: 0 };
        for empty in [NormRotaryProblem { tokens: 0, first_tokens: 0, ..OK }, NormRotaryProblem { heads: 0, ..OK }] {
            // SAFETY: an empty problem launches nothing.
            assert_eq!(unsafe { norm_rotary(place, &empty, &NormRotaryTensors::default()) }, Ok(()));
        }
    }

    #[test]
    fn parameters_are_in_their_places() {
        let of = |sample, token, head| HeadStrides { sample, token, head };
        let problem = NormRotaryProblem { strides: of(8, 16, 24), first_strides: of(32, 40, 48), first_eps: 0.5, ..OK };
        let p = params(&problem, &THERE);
        assert_eq!([p.x, p.first, p.weight, p.first_weight, p.cos, p.sin, p.out], [16, 32, 48, 64, 4, 8, 80]);
        assert_eq!([p.sample_stride, p.token_stride, p.head_stride], [8, 16, 24]);
        assert_eq!([p.first_sample_stride, p.first_token_stride, p.first_head_stride], [32, 40, 48]);
        assert_eq!((p.angle_row_stride, p.angle_stride, p.eps, p.first_eps), (128, 2, 1e-6, 0.5));
        assert_eq!([p.samples, p.tokens, p.first_tokens, p.heads, p.dim], [1, 4096, 512, 24, 128]);
    }
}
