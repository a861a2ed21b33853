//! `rtlynx_core::Error` → the classes of `rtlynx.errors`.

use pyo3::PyErr;
use rtlynx_core::Error;

mod python {
    use pyo3::import_exception;

    import_exception!(rtlynx.errors, DeviceError);
    import_exception!(rtlynx.errors, InvalidArgumentError);
}

/// Of an operation: a refused argument is an `InvalidArgumentError`, everything else a `DeviceError` about the device, with the core's message.
/// Both have the four parts of a refusal.
pub(crate) fn to_python(op: &'static str) -> impl Fn(Error) -> PyErr {
    move |error| {
        let message = error.to_string();
        let (op, got, expected) = match error {
            Error::InvalidArgument { op, argument, got, expected } => {
                return python::InvalidArgumentError::new_err((op, argument, got, expected));
            }
            Error::NoDriver { reason } => (op, reason, "a usable NVIDIA driver".to_owned()),
            Error::DriverTooOld { driver, required } => {
                (op, format!("a driver for CUDA {}", dotted(driver)), format!("one for CUDA {} or newer", dotted(required)))
            }
            Error::UnsupportedArch { op, capability } => {
                (op, format!("compute capability {}", dotted(capability)), "compute capability 8.0 or newer".to_owned())
            }
            Error::UnsupportedPrecision { op, capability } => {
                (op, format!("compute capability {}", dotted(capability)), "compute capability 9.0 for e4m3 operands".to_owned())
            }
            Error::UnsupportedActivation { op, capability } => {
                (op, format!("compute capability {}", dotted(capability)), "compute capability 9.0 for an activation".to_owned())
            }
            Error::NoDeviceCode { kernel, held } => (op, format!("a build that holds {held}"), format!("one that holds {kernel}")),
            Error::Cuda { call, code, name } => (op, format!("{name} ({code}) of {call}"), "CUDA_SUCCESS".to_owned()),
        };
        python::DeviceError::new_err((op, "device", got, expected, message))
    }
}

/// `8.9` of a compute capability, `12.4` of a release.
fn dotted((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}
