//! Everything that can go wrong, said so that the reader knows what to change.

use thiserror::Error;

/// `Result` with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation was refused or failed. Nothing was launched when one of these comes back, except possibly with [`Error::Cuda`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Error {
    /// An argument the operation cannot serve.
    #[error("{op}: argument `{argument}`: got {got}, expected {expected}")]
    InvalidArgument {
        /// The operation that refused.
        op: &'static str,
        /// Name of the offending argument.
        argument: &'static str,
        /// What was passed.
        got: String,
        /// What would have been accepted.
        expected: String,
    },
    /// No CUDA driver library on this machine, or one that finds no GPU.
    #[error("no usable NVIDIA driver: {reason}; install the NVIDIA driver, or run on the CPU")]
    NoDriver {
        /// What exactly is missing.
        reason: String,
    },
    /// The driver is older than the CUDA release the kernels were built with.
    #[error(
        "the NVIDIA driver is too old: got a driver for CUDA {}.{}, expected one for CUDA {}.{} or newer; update the driver",
        driver.0, driver.1, required.0, required.1
    )]
    DriverTooOld {
        /// CUDA version of the driver.
        driver: (u32, u32),
        /// Oldest CUDA version whose driver runs these kernels.
        required: (u32, u32),
    },
    /// The GPU has no sparse tensor cores.
    #[error("got a GPU of compute capability {}.{}, expected 8.0 or newer: older GPUs have no sparse tensor cores", capability.0, capability.1)]
    UnsupportedArch {
        /// The operation that refused.
        op: &'static str,
        /// Compute capability of the GPU.
        capability: (u32, u32),
    },
    /// The GPU has no sparse tensor cores for such operands that kernels here are written for.
    #[error("got e4m3 operands on a GPU of compute capability {}.{}, expected compute capability 9.0, or 16-bit operands", capability.0, capability.1)]
    UnsupportedPrecision {
        /// The operation that refused.
        op: &'static str,
        /// Compute capability of the GPU.
        capability: (u32, u32),
    },
    /// The kernels of the GPU select from a tensor as it is.
    #[error("got an activation on a GPU of compute capability {}.{}, expected compute capability 9.0, or the activation applied before", capability.0, capability.1)]
    UnsupportedActivation {
        /// The operation that refused.
        op: &'static str,
        /// Compute capability of the GPU.
        capability: (u32, u32),
    },
    /// This build contains no code for the kernel.
    #[error(
        "this build of rtlynx has no device code for kernel `{kernel}` (it holds {held}); rebuild it with nvcc and without RTLYNX_NO_DEVICE_CODE"
    )]
    NoDeviceCode {
        /// The kernel that was wanted.
        kernel: String,
        /// What the build does hold.
        held: String,
    },
    /// A CUDA driver call failed. An error of earlier asynchronous work on the device may surface here.
    #[error("{call} failed with {name} (CUDA error {code})")]
    Cuda {
        /// The driver function.
        call: &'static str,
        /// Its numeric result.
        code: u32,
        /// Its symbolic result.
        name: String,
    },
}

impl Error {
    /// Shorthand for [`Error::InvalidArgument`].
    pub fn invalid(op: &'static str, argument: &'static str, got: impl ToString, expected: impl ToString) -> Self {
        Self::InvalidArgument { op, argument, got: got.to_string(), expected: expected.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_what_was_got_and_what_was_expected() {
        let error = Error::invalid("sparsify", "k", 65, "a positive multiple of 64");
        assert_eq!(error.to_string(), "sparsify: argument `k`: got 65, expected a positive multiple of 64");
        let error = Error::DriverTooOld { driver: (12, 4), required: (13, 0) };
        assert!(error.to_string().contains("got a driver for CUDA 12.4, expected one for CUDA 13.0"), "{error}");
        let error = Error::UnsupportedArch { op: "sparse_linear", capability: (7, 5) };
        assert!(error.to_string().starts_with("got a GPU of compute capability 7.5, expected 8.0"), "{error}");
        let error = Error::UnsupportedPrecision { op: "sparsify", capability: (8, 9) };
        let expected = "got e4m3 operands on a GPU of compute capability 8.9, expected compute capability 9.0, or 16-bit operands";
        assert_eq!(error.to_string(), expected);
    }
}
