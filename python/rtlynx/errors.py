"""Every error rtlynx raises on purpose. The Rust extension raises these same classes."""

from __future__ import annotations


class RTLynxError(Exception):
    """Base class: ``except rtlynx.RTLynxError`` catches everything rtlynx raises on purpose.

    Attributes:
        message: What is wrong, without what it is about.
    """

    @property
    def message(self) -> str:
        """See the class."""
        return str(self)


class _Refusal(RTLynxError):
    """What a refusal consists of, for programs that want to know; `message` is for people, in place of what was got and expected."""

    def __init__(self, op: str, argument: str, got: object, expected: str, message: str | None = None) -> None:
        self.op = op
        self.argument = argument
        self.got = str(got)
        self.expected = expected
        self._message = message or f"got {self.got}, expected {expected}"
        super().__init__(f"{op}: argument `{argument}`: {self.message}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str, str]]:
        return type(self), (self.op, self.argument, self.got, self.expected, self.message)

    @property
    def message(self) -> str:
        return self._message


class InvalidArgumentError(_Refusal, ValueError):
    """An argument was refused before anything was launched or overwritten.

    Attributes:
        op: The operation that refused, e.g. ``"sparsify"``.
        argument: The name of the offending argument.
        got: What was passed, in words.
        expected: What would have been accepted, in words.
    """


class DeviceError(_Refusal, RuntimeError):
    """The GPU path cannot run: no driver, a driver or GPU too old, no device code, or a failed CUDA call.

    Attributes:
        op: The operation that could not run, e.g. ``"sparsify"``.
        argument: ``"device"``: where it was to run.
        got: What is there, in words.
        expected: What the operation needs, in words.
    """


class CompensationMismatchError(_Refusal, ValueError):
    """A compensation file does not belong to this model (other layers, shapes or weights).

    Attributes:
        op: The operation that refused, e.g. ``"Compensation"``.
        argument: ``"pipe_or_module"`` for a model that does not fit, ``"path"`` for a file that is none or cannot be read, ``"tensors"``
            for one whose tensors do not fit the layers, ``"checkpoint"``
            for a saved model whose compensation does not fit its layers.
        got: What the model or the file has, in words.
        expected: What it would need, in words.
    """


class DistributedError(RTLynxError, RuntimeError):
    """Another process of the same calibration failed; its own error says why."""
