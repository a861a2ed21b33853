//! The struct each kernel takes by value. Twins of `cuda/include/rtlynx/params.cuh`; a test compares them field by field.

use cudarc::driver::sys::CUtensorMap;

/// An address in device memory; 0 is the null pointer.
pub type Address = u64;

/// What the `sparsify_*` kernels of the portable family take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SparsifyParams {
    /// `[m, k]`, rows `ldx` elements apart
    pub x: Address,
    /// `[k]` f32 factor on the magnitudes that selection compares, or null
    pub score: Address,
    /// `[k]` f32 subtracted from x first, or null
    pub shift: Address,
    /// `[k]` u8 where gathered columns stand in the pieces of their unit, or null
    pub places: Address,
    /// `[k, rank]`, or null when rank is 0
    pub comp_down: Address,
    /// `[m, k / 2]` out
    pub values: Address,
    /// metadata words out
    pub metadata: Address,
    /// `[m]` f32 out, or null: no norm compensation
    pub row_scale: Address,
    /// `[m, rank]` out, or null when rank is 0
    pub branch: Address,
    /// elements between rows of x
    pub ldx: i64,
    /// tokens
    pub m: i32,
    /// channels
    pub k: i32,
    /// at most the kernel's rank capacity
    pub rank: i32,
    /// 1: the branch reads what selection dropped, 0: the whole of x
    pub branch_of_dropped: i32,
    /// of the row scale
    pub eps: f32,
    /// `[m, 2]` f32 mean and rstd of each row of x; not read without a norm
    pub norm_stats: Address,
    /// `[m / norm_rows, k]`, or null: ones
    pub norm_weight: Address,
    /// `[m / norm_rows, k]`, or null: zeros
    pub norm_bias: Address,
    /// rows of x that share a row of these
    pub norm_rows: i32,
}

/// What the `sparsify_sm90_*` kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SparsifySm90Params {
    /// `[m, k - head_k]`
    pub x: CUtensorMap,
    /// `[k, rank]`; not read when rank is 0
    pub comp_down: CUtensorMap,
    /// `[k]` f32 factor on the magnitudes that selection compares, or null
    pub score: Address,
    /// `[k]` f32 subtracted from x first, or null
    pub shift: Address,
    /// `[k]` u8 where gathered columns stand in the pieces of their unit, or null
    pub places: Address,
    /// `[m, k / 2]` out
    pub values: Address,
    /// metadata words out
    pub metadata: Address,
    /// `[m]` f32 out, or null: no norm compensation
    pub row_scale: Address,
    /// `[m, rank]` out, or null when rank is 0
    pub branch: Address,
    /// tokens
    pub m: i32,
    /// channels
    pub k: i32,
    /// branch rank
    pub rank: i32,
    /// 1: the branch reads what selection dropped, 0: the whole of x
    pub branch_of_dropped: i32,
    /// of the row scale
    pub eps: f32,
    /// of the stored values, where they are e4m3
    pub values_scale: f32,
    /// `[m, head_k]`; not read when `head_k` is 0
    pub head: CUtensorMap,
    /// `[m, k - head_k]`; not read without a gate
    pub gate: CUtensorMap,
    /// columns of X that are head's
    pub head_k: i32,
    /// `[m, 2]` f32 mean and rstd of each row of x; not read without a norm
    pub norm_stats: Address,
    /// `[m / norm_rows, k]`, or null: ones
    pub norm_weight: Address,
    /// `[m / norm_rows, k]`, or null: zeros
    pub norm_bias: Address,
    /// rows of x that share a row of these
    pub norm_rows: i32,
}

/// What the `row_stats_*` kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RowStatsParams {
    /// `[m, k]`, rows `ldx` elements apart
    pub x: Address,
    /// `[m, 2]` f32 out: mean and rstd of each row
    pub stats: Address,
    /// elements between rows of x
    pub ldx: i64,
    /// tokens
    pub m: i32,
    /// channels
    pub k: i32,
    /// 1: rstd of the deviations from the mean, 0: mean is 0, rstd of the elements
    pub centered: i32,
    /// added to the mean of squares
    pub eps: f32,
}

/// What the `norm_rotary_*` kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NormRotaryParams {
    /// `[samples, tokens, heads, dim]`, strided
    pub x: Address,
    /// `[samples, first_tokens, heads, dim]`, strided, or null without tokens
    pub first: Address,
    /// `[dim]`, or null: no norm of x
    pub weight: Address,
    /// `[dim]`, or null: no norm of first
    pub first_weight: Address,
    /// `[first_tokens + tokens, dim / 2]` f32, strided
    pub cos: Address,
    /// the same of the sines, with the strides of cos
    pub sin: Address,
    /// `[samples, first_tokens + tokens, heads, dim]` out
    pub out: Address,
    /// elements between samples of x
    pub sample_stride: i64,
    /// elements between tokens of x
    pub token_stride: i64,
    /// elements between heads of x
    pub head_stride: i64,
    /// elements between samples of first
    pub first_sample_stride: i64,
    /// elements between tokens of first
    pub first_token_stride: i64,
    /// elements between heads of first
    pub first_head_stride: i64,
    /// elements between tokens of cos and sin
    pub angle_row_stride: i64,
    /// elements between pairs of channels of cos and sin
    pub angle_stride: i64,
    /// samples
    pub samples: i32,
    /// tokens of x
    pub tokens: i32,
    /// tokens of first
    pub first_tokens: i32,
    /// heads of a token
    pub heads: i32,
    /// channels of a head
    pub dim: i32,
    /// added to the mean of squares of x
    pub eps: f32,
    /// added to the mean of squares of first
    pub first_eps: f32,
}

/// What the `spmm_sm80_*` kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SpmmParams {
    /// `[m, k / 2]`
    pub values: Address,
    /// metadata words
    pub metadata: Address,
    /// `[n, k]`
    pub weight: Address,
    /// `[m]` f32, or null
    pub row_scale: Address,
    /// `[m, rank]`, or null when rank is 0
    pub branch: Address,
    /// `[n, rank]`, or null when rank is 0
    pub comp_up: Address,
    /// `[n]`, or null
    pub bias: Address,
    /// `[m, n]` out
    pub out: Address,
    /// `[m, n]`, or null
    pub residual: Address,
    /// `[m / gate_rows, n]`, or null; only with a residual
    pub gate: Address,
    /// tokens
    pub m: i32,
    /// output channels
    pub n: i32,
    /// input channels
    pub k: i32,
    /// branch rank
    pub rank: i32,
    /// rows of Y that share a row of the gate
    pub gate_rows: i32,
    /// 1: Y goes through GELU (tanh) before a residual is added, 0: it does not
    pub gelu_tanh: i32,
}

/// What the `spmm_sm90_*` kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SpmmSm90Params {
    /// `[m, k / 2]`
    pub values: CUtensorMap,
    /// `[n, k]`
    pub weight: CUtensorMap,
    /// `[m, rank]`; not read when rank is 0
    pub branch: CUtensorMap,
    /// `[n, rank]`; not read when rank is 0
    pub comp_up: CUtensorMap,
    /// metadata words
    pub metadata: Address,
    /// `[m]` f32, or null
    pub row_scale: Address,
    /// `[n]` f32 where operands are e4m3, else null
    pub weight_scale: Address,
    /// `[n]`, or null
    pub bias: Address,
    /// `[m, n]` out
    pub out: Address,
    /// `[m, n]`, or null
    pub residual: Address,
    /// `[m / gate_rows, n]`, or null; only with a residual
    pub gate: Address,
    /// tokens
    pub m: i32,
    /// output channels
    pub n: i32,
    /// input channels
    pub k: i32,
    /// branch rank
    pub rank: i32,
    /// rows of Y that share a row of the gate
    pub gate_rows: i32,
    /// 1: Y goes through GELU (tanh) before a residual is added, 0: it does not
    pub gelu_tanh: i32,
}

/// What the `fused_sm80_*` kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FusedParams {
    /// `[m, k]`, rows `ldx` elements apart
    pub x: Address,
    /// `[k]` f32 factor on the magnitudes that selection compares, or null
    pub score: Address,
    /// `[k]` f32 subtracted from x first, or null
    pub shift: Address,
    /// `[k, rank]`, or null when rank is 0
    pub comp_down: Address,
    /// `[n, k]`
    pub weight: Address,
    /// `[n, rank]`, or null when rank is 0
    pub comp_up: Address,
    /// `[n]`, or null
    pub bias: Address,
    /// `[m, rank]` scratch, or null when rank is 0
    pub branch: Address,
    /// counters, zeros, or null when rank is 0
    pub progress: Address,
    /// `[m, n]` out
    pub out: Address,
    /// elements between rows of x
    pub ldx: i32,
    /// tokens
    pub m: i32,
    /// output channels
    pub n: i32,
    /// input channels
    pub k: i32,
    /// branch rank
    pub rank: i32,
    /// 1: the branch reads what selection dropped, 0: the whole of x
    pub branch_of_dropped: i32,
    /// 1: rows are scaled, 0: they are not
    pub norm_compensation: i32,
    /// of the row scale
    pub eps: f32,
}

/// What the `probe_sm90_*` kernels take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ProbeParams {
    /// A and W as shared memory holds them
    pub data: Address,
    /// metadata words of 256 rows; not read by dense probes
    pub metadata: Address,
    /// `[blocks, 256]` f32 out
    pub sums: Address,
    /// `[blocks, 256]` i64 out
    pub cycles: Address,
    /// of 64 dense columns
    pub steps: i32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::fields;

    const HEADER: &str = include_str!("../../../cuda/include/rtlynx/params.cuh");
    const SOURCE: &str = include_str!("params.rs");

    /// `(type, name)` of the fields of `pub struct NAME` in this file, in order.
    fn rust_fields(name: &str) -> Vec<(&'static str, &'static str)> {
        let (_, rest) = SOURCE.split_once(&format!("#[repr(C)]\n#[derive(Clone, Copy, Debug)]\npub struct {name} {{")).unwrap();
        let (body, _) = rest.split_once("\n}").unwrap();
        let lines = body.lines().filter_map(|line| line.trim().strip_prefix("pub ")?.strip_suffix(','));
        lines.map(|line| line.split_once(": ").map(|(name, kind)| (kind, name)).unwrap()).collect()
    }

    /// The Rust twin of a C type.
    fn twin(c: &str) -> &'static str {
        match c {
            pointer if pointer.ends_with('*') => "Address",
            "int64_t" => "i64",
            "int32_t" => "i32",
            "float" => "f32",
            "CUtensorMap" => "CUtensorMap",
            other => panic!("no twin for the C type `{other}`"),
        }
    }

    #[test]
    fn structs_are_those_of_the_cuda_header() {
        let names = [
            "SparsifyParams",
            "SparsifySm90Params",
            "RowStatsParams",
            "NormRotaryParams",
            "SpmmParams",
            "SpmmSm90Params",
            "FusedParams",
            "ProbeParams",
        ];
        for name in names {
            let expected: Vec<_> = fields(HEADER, name).into_iter().map(|(kind, field)| (twin(kind), field)).collect();
            assert!(expected.len() > 4, "{name}: {expected:?}");
            assert_eq!(rust_fields(name), expected, "{name}");
        }
    }

    /// The copy engine wants maps aligned to 64 bytes. CUDA's header says 64 before release 13 and 128 since: that moves no field, only the
    /// end of the struct.
    #[test]
    fn tensor_maps_lie_where_the_kernel_reads_them() {
        assert!(align_of::<SpmmSm90Params>() >= 64 && align_of::<SparsifySm90Params>() >= 64);
        assert_eq!(size_of::<CUtensorMap>(), 128);
        assert_eq!(std::mem::offset_of!(SparsifySm90Params, score), 2 * 128);
        assert_eq!(std::mem::offset_of!(SpmmSm90Params, comp_up), 3 * 128);
        assert_eq!(std::mem::offset_of!(SpmmSm90Params, metadata), 4 * 128);
    }
}
