//! What this build holds, what this machine has, and what would run where.

use pyo3::prelude::*;
use rtlynx_core::break_even;
use rtlynx_core::dispatch::{self, Arch};
use rtlynx_core::dtype::Dtype;
use rtlynx_core::problem::{SPARSE_LINEAR, SparseLinearProblem};
use rtlynx_core::{device, kernels, tuned};

use crate::error::to_python;

/// A dict for Python.
#[derive(IntoPyObject)]
pub(crate) struct DeviceCode {
    targets: Vec<&'static str>,
    nvcc: Option<&'static str>,
    min_driver: Option<(u32, u32)>,
}

/// A dict for Python.
#[derive(IntoPyObject)]
pub(crate) struct Device {
    index: usize,
    name: &'static str,
    capability: (u32, u32),
    sms: i64,
    memory_bytes: u64,
    memory_gb_s: i64,
}

/// What was built in: targets (["sm_80", ...]), nvcc ("13.0.88") and min_driver ((13, 0), the CUDA version the driver must support).
///
/// A build without device code has no targets and None for the rest.
#[pyfunction]
#[pyo3(signature = () -> "dict[str, object]")]
pub(crate) fn device_code() -> DeviceCode {
    DeviceCode { targets: kernels::targets(), nvcc: kernels::nvcc_version(), min_driver: kernels::required_driver() }
}

/// CUDA version of the driver as (major, minor); None on a machine without one.
#[pyfunction]
pub(crate) fn driver_version() -> Option<(u32, u32)> {
    device::driver_version()
}

/// The GPUs in the order of cuda:0, cuda:1, ...: index, name, capability, sms, memory_bytes, memory_gb_s. Empty without a driver.
#[pyfunction]
#[pyo3(signature = () -> "list[dict[str, object]]")]
pub(crate) fn devices() -> PyResult<Vec<Device>> {
    let devices = device::devices().map_err(to_python("devices"))?.iter().enumerate();
    let describe = |(index, device): (usize, &'static device::Device)| Device {
        index,
        name: &device.name,
        capability: device.arch.capability,
        sms: device.arch.sms,
        memory_bytes: device.memory_bytes,
        memory_gb_s: device.memory_gb_s,
    };
    Ok(devices.map(describe).collect())
}

/// Run the kernels that every GPU from compute capability 8.0 on has, in the whole process, or stop doing so; returns what was set before.
///
/// For tests and comparisons on a GPU that has kernels of its own.
#[pyfunction]
pub(crate) fn use_portable_kernels(enabled: bool) -> bool {
    device::use_portable_kernels(enabled)
}

/// The GEMM kernel for a problem on a GPU of this compute capability; needs no GPU.
///
/// Raises InvalidArgumentError for sizes the format cannot hold, DeviceError for a GPU without sparse tensor cores.
#[pyfunction]
pub(crate) fn plan_sparse_linear(capability: (u32, u32), sms: i64, m: i64, n: i64, k: i64, rank: i64, dtype: &str) -> PyResult<String> {
    let problem = SparseLinearProblem { dtype: Dtype::parse(SPARSE_LINEAR, dtype).map_err(to_python(SPARSE_LINEAR))?, m, n, k, rank };
    let (kernel, _) = dispatch::plan_sparse_linear(&Arch::from_capability(capability, sms), &problem).map_err(to_python(SPARSE_LINEAR))?;
    Ok(kernel.to_string())
}

/// The GEMM kernels that can run a problem on a GPU of this compute capability, the plan among them; needs no GPU.
///
/// Raises as plan_sparse_linear.
#[pyfunction]
pub(crate) fn candidates(capability: (u32, u32), sms: i64, m: i64, n: i64, k: i64, rank: i64, dtype: &str) -> PyResult<Vec<String>> {
    let problem = SparseLinearProblem { dtype: Dtype::parse(SPARSE_LINEAR, dtype).map_err(to_python(SPARSE_LINEAR))?, m, n, k, rank };
    let arch = Arch::from_capability(capability, sms);
    let candidates = dispatch::candidates(&arch, &problem).map_err(to_python(SPARSE_LINEAR))?;
    Ok(candidates.map(|(kernel, _)| kernel.to_string()).collect())
}

/// Run one of the candidates for a problem on a GPU of this machine from now on, in the whole process; None: what is planned for it.
///
/// Raises InvalidArgumentError for a kernel that cannot run it there and as plan_sparse_linear.
#[pyfunction]
#[pyo3(signature = (device_index, m, n, k, rank, dtype, kernel))]
pub(crate) fn set_plan(device_index: i32, m: i64, n: i64, k: i64, rank: i64, dtype: &str, kernel: Option<&str>) -> PyResult<()> {
    let problem = SparseLinearProblem { dtype: Dtype::parse(SPARSE_LINEAR, dtype).map_err(to_python(SPARSE_LINEAR))?, m, n, k, rank };
    tuned::set(device_index, &problem, kernel).map_err(to_python(SPARSE_LINEAR))
}

/// The GEMM kernel that sparse_linear launches for a problem on a GPU of this machine: the one of set_plan, else the planned one.
///
/// Raises as plan_sparse_linear.
#[pyfunction]
pub(crate) fn gemm_kernel(device_index: i32, m: i64, n: i64, k: i64, rank: i64, dtype: &str) -> PyResult<String> {
    let problem = SparseLinearProblem { dtype: Dtype::parse(SPARSE_LINEAR, dtype).map_err(to_python(SPARSE_LINEAR))?, m, n, k, rank };
    tuned::kernel(device_index, &problem).map_err(to_python(SPARSE_LINEAR))
}

/// From how many tokens on a sparse layer (n, k) is estimated to be no slower than a dense one on a GPU of this compute capability; needs no GPU.
/// memory_gb_s: as `devices` tells it, 4916 for an H200.
///
/// 0 where nothing has been measured, 2^63 - 1 where it never is. Raises as plan_sparse_linear.
#[pyfunction]
pub(crate) fn least_tokens(capability: (u32, u32), sms: i64, memory_gb_s: i64, n: i64, k: i64, rank: i64, dtype: &str) -> PyResult<i64> {
    let problem = SparseLinearProblem { dtype: Dtype::parse(SPARSE_LINEAR, dtype).map_err(to_python(SPARSE_LINEAR))?, m: 0, n, k, rank };
    break_even::least_tokens(&Arch::from_capability(capability, sms), memory_gb_s, &problem).map_err(to_python(SPARSE_LINEAR))
}
