//! `rtlynx_core::Error` → the classes of `rtlynx.errors`.

use pyo3::PyErr;
use rtlynx_core::Error;

mod python {
    use pyo3::import_exception;

    import_exception!(rtlynx.errors, DeviceError);
    import_exception!(rtlynx.errors, InvalidArgumentError);
}

/// A refused argument keeps its four parts; everything else is a `DeviceError` with the message.
pub(crate) fn to_python(error: Error) -> PyErr {
    match error {
        Error::InvalidArgument { op, argument, got, expected } => python::InvalidArgumentError::new_err((op, argument, got, expected)),
        other => python::DeviceError::new_err(other.to_string()),
    }
}
