//! The embedded device code, and a lazy cache of the functions loaded from it.

use std::collections::{BTreeSet, HashMap};
use std::ffi::CString;
use std::sync::{LazyLock, Mutex, PoisonError};

use cudarc::driver::{result, sys};

use crate::config::Kernel;
use crate::device::{self, RelaxedCapture, checked};
use crate::error::{Error, Result};

/// One fatbin and what the build found in it.
#[derive(Debug)]
struct Image {
    /// Stem of the source file.
    stem: &'static str,
    /// Device code for all targets.
    fatbin: &'static Aligned<[u8]>,
    /// Its targets, e.g. `sm_80` (machine code), `compute_80` (PTX).
    targets: &'static [&'static str],
    /// Symbols of its kernels.
    kernels: &'static [&'static str],
}

/// The driver reads a fatbin's header as 64-bit words.
#[derive(Debug)]
#[repr(C, align(16))]
struct Aligned<T: ?Sized>(T);

include!(concat!(env!("OUT_DIR"), "/device_code.rs"));

/// Release of the nvcc that compiled the device code, e.g. `13.0.88`; `None` in a build without device code.
pub fn nvcc_version() -> Option<&'static str> {
    NVCC
}

/// Targets of the embedded device code, by architecture, machine code before PTX of the same one.
pub fn targets() -> Vec<&'static str> {
    let all: BTreeSet<&str> = IMAGES.iter().flat_map(|image| image.targets).copied().collect();
    let mut targets: Vec<&str> = all.into_iter().collect();
    targets.sort_by_key(|target| (architecture(target), !target.starts_with("sm_")));
    targets
}

/// 90 of `sm_90a` and of `compute_90`.
fn architecture(target: &str) -> Option<u32> {
    target.split_once('_')?.1.trim_end_matches(char::is_alphabetic).parse().ok()
}

/// Symbols of every embedded kernel.
pub fn symbols() -> impl Iterator<Item = &'static str> {
    IMAGES.iter().flat_map(|image| image.kernels).copied()
}

/// Oldest CUDA version whose driver runs the embedded code: the minor release that compiled it does not matter, the major one does.
pub fn required_driver() -> Option<(u32, u32)> {
    built_with().map(|(major, _)| (major, 0))
}

/// Major and minor release of the nvcc that compiled the device code.
fn built_with() -> Option<(u32, u32)> {
    let mut numbers = NVCC?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Refuses a driver older than the embedded code; without any code there is nothing to be too old for.
pub(crate) fn check_driver() -> Result<()> {
    match (device::driver_version(), required_driver()) {
        (Some(driver), Some(required)) if driver < required => Err(Error::DriverTooOld { driver, required }),
        _ => Ok(()),
    }
}

/// The function of a kernel on a device, loaded on first use with permission for the shared memory it needs.
///
/// The primary context of the device must be current.
pub(crate) fn function(device: i32, kernel: Kernel, shared_bytes: u32) -> Result<sys::CUfunction> {
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = cache.functions.get(&(device, kernel)) {
        return Ok(function.0);
    }
    check_driver()?;
    let _relaxed = RelaxedCapture::enter()?;
    let symbol = kernel.to_string();
    let image = IMAGES.iter().position(|image| image.kernels.contains(&symbol.as_str())).ok_or_else(|| no_device_code(&symbol))?;
    let module = match cache.modules.get(&(device, image)) {
        Some(module) => module.0,
        None => {
            let module = load(&IMAGES[image])?;
            cache.modules.insert((device, image), Handle(module));
            module
        }
    };
    let symbol = CString::new(symbol).expect("kernel symbols have no NUL");
    // SAFETY: the module is loaded and is never unloaded.
    let function = checked("cuModuleGetFunction", unsafe { result::module::get_function(module, symbol) })?;
    device::allow_shared_bytes(function, shared_bytes)?;
    cache.functions.insert((device, kernel), Handle(function));
    Ok(function)
}

/// What has been loaded so far. It stays for the life of the process, like the primary contexts it belongs to.
#[derive(Default)]
struct Cache {
    /// By device and index into [`IMAGES`].
    modules: HashMap<(i32, usize), Handle<sys::CUmodule>>,
    functions: HashMap<(i32, Kernel), Handle<sys::CUfunction>>,
}

static CACHE: LazyLock<Mutex<Cache>> = LazyLock::new(Mutex::default);

/// A handle of the driver.
struct Handle<T>(T);

// SAFETY: the driver lets every thread use its module and function handles; nothing here dereferences them.
unsafe impl<T> Send for Handle<T> {}

fn load(image: &Image) -> Result<sys::CUmodule> {
    let code = image.fatbin.0.as_ptr().cast();
    // SAFETY: `code` is a whole fatbin that nvcc wrote, aligned as the driver reads it, and static.
    let loaded = unsafe { result::module::load_data(code) };
    checked("cuModuleLoadData", loaded).map_err(|error| match (error, device::driver_version()) {
        // The GPU needs the PTX compiled, and the driver knows PTX only up to its own minor release.
        (Error::Cuda { code, .. }, Some(driver)) if code == sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION as u32 => {
            Error::DriverTooOld { driver, required: built_with().unwrap_or(driver) }
        }
        (error, _) => error,
    })
}

fn no_device_code(symbol: &str) -> Error {
    let held: Vec<&str> = IMAGES.iter().map(|image| image.stem).collect();
    let held = if held.is_empty() { "none at all".to_owned() } else { held.join(", ") };
    Error::NoDeviceCode { kernel: symbol.to_owned(), held }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{FusedKernel, NormRotaryKernel, ProbeKernel, RowStatsKernel, SparsifyKernel, SpmmKernel};

    #[test]
    fn what_is_embedded_is_what_is_launched() {
        if nvcc_version().is_none() {
            eprintln!("skipped: built with RTLYNX_NO_DEVICE_CODE=1");
            return;
        }
        let embedded: BTreeSet<&str> = symbols().collect();
        let ops = SparsifyKernel::all().map(Kernel::Sparsify).chain(SpmmKernel::all().map(Kernel::Spmm));
        let ops = ops.chain(FusedKernel::all().map(Kernel::Fused)).chain(RowStatsKernel::all().map(Kernel::RowStats));
        let ops = ops.chain(NormRotaryKernel::all().map(Kernel::NormRotary));
        let named: BTreeSet<String> = ops.chain(ProbeKernel::all().map(Kernel::Probe)).map(|kernel| kernel.to_string()).collect();
        let named: BTreeSet<&str> = named.iter().map(String::as_str).collect();
        assert_eq!(embedded, named, "left: embedded device code, right: crates/rtlynx-core/src/config");
    }

    #[test]
    fn device_code_and_nvcc_come_together() {
        assert_eq!(nvcc_version().is_some(), !targets().is_empty());
        if nvcc_version().is_some() {
            assert_eq!(targets(), ["sm_80", "compute_80", "sm_90a"]);
            assert!(required_driver().is_some_and(|(major, _)| major >= 12));
        }
    }
}
