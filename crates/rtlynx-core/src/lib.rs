//! What rtlynx does between a checked tensor and a running kernel. Knows nothing of Python.
//!
//! Top to bottom, each module using only those below it:
//!
//! | module | role |
//! | --- | --- |
//! | [`probe`] | for the benches: what the tensor cores give when nothing has to be loaded |
//! | [`fused`] | the two operations in one kernel: its problem, plan and launch |
//! | [`row_stats`] | what a norm before the selection needs of its rows: its problem, plan and launch |
//! | [`norm_rotary`] | norm, concatenation and rotation of heads: its problem, plan and launch |
//! | [`layer`] | both operations with what stays the same from call to call, and the memory between them |
//! | [`launch`] | the two operations: validate, plan, load, launch; the only caller of `cuLaunchKernelEx` |
//! | [`kernels`] | the embedded device code and a lazy cache of loaded functions |
//! | [`tuned`] | which kernels were measured fastest for which problems: they go before what dispatch estimates |
//! | [`tensor_map`] | what the copy engine of Hopper is told of a matrix: pure arguments, and their encoding by the driver |
//! | [`device`] | the driver: present or not, its version, its devices, the primary context |
//! | [`break_even`] | pure: from how many tokens on a sparse layer is faster than a dense one |
//! | [`dispatch`] | pure: (architecture, problem) → kernel and launch geometry |
//! | [`config`] | the kernels there are, as data: names, tiles, resources |
//! | [`params`] | the struct each kernel takes, twin of `cuda/include/rtlynx/params.cuh` |
//! | [`epilogue`] | what follows a product: an activation, a residual, a gate |
//! | [`problem`] | the problems of the two operations and their tensors, and which are valid |
//! | [`prologue`] | what selection reads: an activation or a norm, a gate, a head |
//! | [`checks`] | what is asked of sizes, strides and addresses, in one wording |
//! | [`dtype`] | which element types there are, and their names |
//! | [`format`](mod@format) | constants and sizes of the compressed format, twin of `cuda/include/rtlynx/format.cuh` |
//! | [`error`] | everything that can go wrong |

pub mod break_even;
pub mod checks;
pub mod config;
pub mod device;
pub mod dispatch;
pub mod dtype;
pub mod epilogue;
pub mod error;
pub mod format;
pub mod fused;
pub mod kernels;
pub mod launch;
pub mod layer;
pub mod norm_rotary;
pub mod params;
pub mod probe;
pub mod problem;
pub mod prologue;
pub mod row_stats;
pub mod tensor_map;
pub mod tuned;

#[cfg(test)]
mod header;
#[cfg(test)]
mod resources;

pub use error::{Error, Result};
