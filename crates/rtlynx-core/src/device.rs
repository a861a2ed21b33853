//! The CUDA driver: whether it is there, its version, its devices, and the primary context that PyTorch uses too.

use std::ffi::{c_int, c_uint};
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use crate::dispatch::Arch;
use crate::error::{Error, Result};

/// What is known of one GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The driver's name for it, e.g. `NVIDIA H200`.
    pub name: String,
    /// What dispatch needs.
    pub arch: Arch,
    /// Global memory in bytes.
    pub memory_bytes: u64,
    /// What its memory could give at most, from clock and bus width, in 10⁹ bytes a second.
    pub memory_gb_s: i64,
}

/// CUDA version of the driver, as (major, minor); `None` on a machine without a driver.
pub fn driver_version() -> Option<(u32, u32)> {
    if !library_is_present() {
        return None;
    }
    let mut version: c_int = 0;
    // SAFETY: the library is there, the pointer is valid, and this is one of the two calls allowed before cuInit.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    check("cuDriverGetVersion", status).ok()?;
    let version = u32::try_from(version).ok()?;
    (version > 0).then_some((version / 1000, version % 1000 / 10))
}

/// The GPUs of this process, in the driver's order (that of `cuda:0`, `cuda:1`, ...); empty without a driver or without a GPU.
pub fn devices() -> Result<&'static [Device]> {
    match driver() {
        Ok(driver) => Ok(&driver.devices),
        Err(Error::NoDriver { .. }) => Ok(&[]),
        Err(error) => Err(error),
    }
}

/// One GPU by its index; `op` names the operation in the error.
pub fn device(op: &'static str, index: i32) -> Result<&'static Device> {
    let devices = &driver()?.devices;
    let device = usize::try_from(index).ok().and_then(|index| devices.get(index));
    device.ok_or_else(|| Error::invalid(op, "device_index", index, format!("a GPU index below {}", devices.len())))
}

static PORTABLE_KERNELS_ONLY: AtomicBool = AtomicBool::new(false);

/// Switches the whole process to the kernels every GPU from compute capability 8.0 on can run, or back, and returns what was set before.
/// For tests and comparisons on a GPU that has kernels of its own.
pub fn use_portable_kernels(enabled: bool) -> bool {
    PORTABLE_KERNELS_ONLY.swap(enabled, Ordering::Relaxed)
}

/// What dispatch needs to know of a GPU, by its index; `op` names the operation in the error.
pub(crate) fn arch(op: &'static str, index: i32) -> Result<Arch> {
    let arch = device(op, index)?.arch;
    Ok(if PORTABLE_KERNELS_ONLY.load(Ordering::Relaxed) { arch.portable() } else { arch })
}

/// Turns a driver status into a `Result`; `call` names the driver function.
pub(crate) fn check(call: &'static str, status: CUresult) -> Result<()> {
    match status {
        CUresult::CUDA_SUCCESS => Ok(()),
        _ => Err(Error::Cuda { call, code: status as u32, name: format!("{status:?}") }),
    }
}

/// The same for cudarc's wrappers.
pub(crate) fn checked<T>(call: &'static str, result: std::result::Result<T, result::DriverError>) -> Result<T> {
    result.or_else(|error| check(call, error.0).map(|()| unreachable!("a DriverError is never CUDA_SUCCESS")))
}

/// Whether the driver library loads: cudarc panics on any call without it.
fn library_is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loading libcuda runs NVIDIA's own initialisers and nothing of ours depends on them.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

struct Driver {
    devices: Vec<Device>,
    /// Primary context of every device, retained on first use and kept for the life of the process, as PyTorch does.
    contexts: Vec<OnceLock<Context>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Context(sys::CUcontext);

// SAFETY: a CUcontext is a handle that any thread may make current; nothing here dereferences it.
unsafe impl Send for Context {}
// SAFETY: as above; the handle itself is never written.
unsafe impl Sync for Context {}

/// The initialised driver. A failure is remembered: neither drivers nor GPUs appear while a process runs.
fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    DRIVER.get_or_init(initialise).as_ref().map_err(Clone::clone)
}

fn initialise() -> Result<Driver> {
    if !library_is_present() {
        return Err(Error::NoDriver { reason: "the driver library (libcuda) is not on this machine".to_owned() });
    }
    match checked("cuInit", result::init()) {
        Ok(()) => {}
        Err(Error::Cuda { code, name, .. }) if no_gpu(code) => {
            return Err(Error::NoDriver { reason: format!("the driver library finds no GPU ({name})") });
        }
        Err(error) => return Err(error),
    }
    let count = checked("cuDeviceGetCount", result::device::get_count())?;
    let devices: Vec<Device> = (0..count).map(describe).collect::<Result<_>>()?;
    Ok(Driver { contexts: devices.iter().map(|_| OnceLock::new()).collect(), devices })
}

/// Results of cuInit that mean: there is nothing to run on.
fn no_gpu(code: u32) -> bool {
    [CUresult::CUDA_ERROR_NO_DEVICE, CUresult::CUDA_ERROR_STUB_LIBRARY].iter().any(|status| *status as u32 == code)
}

fn describe(index: c_int) -> Result<Device> {
    let handle = checked("cuDeviceGet", result::device::get(index))?;
    let attribute = |attribute| {
        // SAFETY: `handle` comes from cuDeviceGet.
        checked("cuDeviceGetAttribute", unsafe { result::device::get_attribute(handle, attribute) })
    };
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
    );
    let sms = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.into();
    let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.into();
    // SAFETY: `handle` comes from cuDeviceGet.
    let memory_bytes = checked("cuDeviceTotalMem", unsafe { result::device::total_mem(handle) })? as u64;
    let name = checked("cuDeviceGetName", result::device::get_name(handle))?;
    // Both edges of the clock carry data.
    let clock_khz = i64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?);
    let bus_bytes = i64::from(attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?) / 8;
    let memory_gb_s = 2 * clock_khz * bus_bytes / 1_000_000;
    Ok(Device { name, arch: Arch { capability, sms, shared_bytes }, memory_bytes, memory_gb_s })
}

/// While it lives, the primary context of a device is current on this thread; afterwards what was current before is again.
pub(crate) struct Current {
    pushed: bool,
    /// The current context belongs to the thread.
    _not_send: PhantomData<*const ()>,
}

impl Current {
    /// `index` must have passed [`device`].
    pub(crate) fn enter(index: i32) -> Result<Self> {
        let context = primary_context(index)?;
        let mut current = ptr::null_mut();
        // SAFETY: the driver is initialised and the pointer is valid.
        let status = unsafe { sys::cuCtxGetCurrent(&raw mut current) };
        check("cuCtxGetCurrent", status)?;
        // PyTorch's device guard has normally made it current already: then there is nothing to do or undo.
        let pushed = current != context.0;
        if pushed {
            // SAFETY: the context is a primary context that stays retained.
            let status = unsafe { sys::cuCtxPushCurrent_v2(context.0) };
            check("cuCtxPushCurrent", status)?;
        }
        Ok(Self { pushed, _not_send: PhantomData })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: pops what `enter` pushed on this same thread. A failure leaves nothing to be done here.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}

fn primary_context(index: i32) -> Result<Context> {
    let slot = &driver()?.contexts[index as usize];
    if let Some(context) = slot.get() {
        return Ok(*context);
    }
    let handle = checked("cuDeviceGet", result::device::get(index))?;
    // SAFETY: `handle` comes from cuDeviceGet. Two threads that race here retain twice, which only keeps the context alive.
    let context = checked("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(handle) })?;
    Ok(*slot.get_or_init(|| Context(context)))
}

/// While it lives, this thread may make calls that stream capture would otherwise forbid, such as loading a module: none of them
/// touches the captured stream.
pub(crate) struct RelaxedCapture {
    previous: sys::CUstreamCaptureMode,
}

impl RelaxedCapture {
    pub(crate) fn enter() -> Result<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is valid; the call swaps the thread's mode with `mode`.
        let status = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
        check("cuThreadExchangeStreamCaptureMode", status)?;
        Ok(Self { previous: mode })
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        // SAFETY: puts back the mode that `enter` found. A failure leaves nothing to be done here.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.previous) };
    }
}

/// Sets the only attribute launches need: how much dynamic shared memory a function may ask for.
pub(crate) fn allow_shared_bytes(function: sys::CUfunction, bytes: c_uint) -> Result<()> {
    let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: `function` was just loaded in the current context; the driver checks the size.
    let status = unsafe { sys::cuFuncSetAttribute(function, attribute, bytes as c_int) };
    check("cuFuncSetAttribute", status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_is_an_answer_not_a_panic() {
        if driver_version().is_none() {
            assert_eq!(devices(), Ok(&[][..]));
            assert!(matches!(device("sparsify", 0), Err(Error::NoDriver { .. })));
        } else {
            assert!(devices().is_ok());
        }
    }

    #[test]
    fn failed_calls_are_named() {
        let error = check("cuLaunchKernelEx", CUresult::CUDA_ERROR_INVALID_VALUE).unwrap_err();
        assert_eq!(error.to_string(), "cuLaunchKernelEx failed with CUDA_ERROR_INVALID_VALUE (CUDA error 1)");
    }
}
