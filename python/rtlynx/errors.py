"""Every error rtlynx raises on purpose. The Rust extension raises these same classes."""

from __future__ import annotations


class RTLynxError(Exception):
    """Base class: ``except rtlynx.RTLynxError`` catches everything rtlynx raises on purpose."""


class InvalidArgumentError(RTLynxError, ValueError):
    """An argument was refused before anything was launched or overwritten.

    Attributes:
        op: The operation that refused, e.g. ``"sparsify"``.
        argument: The name of the offending argument.
        got: What was passed, in words.
        expected: What would have been accepted, in words.
    """

    def __init__(self, op: str, argument: str, got: object, expected: str) -> None:
        self.op = op
        self.argument = argument
        self.got = str(got)
        self.expected = expected
        super().__init__(f"{op}: argument `{argument}`: got {self.got}, expected {expected}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        return type(self), (self.op, self.argument, self.got, self.expected)


class DeviceError(RTLynxError, RuntimeError):
    """The GPU path cannot run: no driver, a driver or GPU too old, no device code, or a failed CUDA call."""


class CompensationMismatchError(RTLynxError, ValueError):
    """A compensation file does not belong to this model (other layers, shapes or weights)."""


class DistributedError(RTLynxError, RuntimeError):
    """Another process of the same calibration failed; its own error says why."""
