//! `rtlynx._core`: the export list of the Python extension.

use pyo3::prelude::*;

mod error;
mod fused;
mod info;
mod layer;
mod norm_rotary;
mod ops;
mod probe;
mod row_stats;

/// Device code, dispatch and launch of rtlynx. Private: use `rtlynx.ops` and the layers above it.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::fused::fused_linear;
    #[pymodule_export]
    use super::info::{candidates, device_code, devices, driver_version, gemm_kernel};
    #[pymodule_export]
    use super::info::{least_tokens, plan_sparse_linear, set_plan, use_portable_kernels};
    #[pymodule_export]
    use super::layer::Layer;
    #[pymodule_export]
    use super::norm_rotary::run as norm_rotary;
    #[pymodule_export]
    use super::ops::{activations, sparse_linear, sparsify};
    #[pymodule_export]
    use super::probe::run;
    #[pymodule_export]
    use super::row_stats::run as row_stats;

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // Python's name for it
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    const K_MULTIPLE: i64 = rtlynx_core::format::K_MULTIPLE;
    #[pymodule_export]
    const N_MULTIPLE: i64 = rtlynx_core::format::N_MULTIPLE;
    #[pymodule_export]
    const RANK_MULTIPLE: i64 = rtlynx_core::format::RANK_MULTIPLE;
    #[pymodule_export]
    const MAX_RANK: i64 = rtlynx_core::format::MAX_RANK;
    #[pymodule_export]
    const GROUP: i64 = rtlynx_core::format::GROUP;
    #[pymodule_export]
    const TILE_ROWS: i64 = rtlynx_core::format::TILE_ROWS;
    #[pymodule_export]
    const PADDED_ROWS: i64 = rtlynx_core::format::PADDED_ROWS;
    #[pymodule_export]
    const BLOCK_COLS: i64 = rtlynx_core::format::BLOCK_COLS;
    #[pymodule_export]
    const PIECE: i64 = rtlynx_core::format::PIECE_COLS;
    #[pymodule_export]
    const PADDING_WORD: u32 = rtlynx_core::format::PADDING_WORD;
    #[pymodule_export]
    const ALIGNMENT: u64 = rtlynx_core::checks::VECTOR_BYTES;
    #[pymodule_export]
    const COUNTED_ROWS: i64 = rtlynx_core::fused::COUNTED_ROWS;
    #[pymodule_export]
    const MAX_HEAD_DIM: i64 = rtlynx_core::norm_rotary::MAX_DIM;
}
