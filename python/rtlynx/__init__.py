"""rtlynx: 2:4 activation sparsity for diffusion transformers, on sparse tensor cores.

    import rtlynx
    rtlynx.apply(pipe)                                # layers become sparse, in place
    compensation = rtlynx.calibrate(pipe, prompts)    # fit the error-compensating branch on the model's own activations
    compensation.save("flux.rtlynx.safetensors")
    print(rtlynx.summary(pipe))                       # what runs where, and why

Importing needs neither a GPU nor a driver; the compiled extension is loaded when the first CUDA tensor arrives.
"""

from __future__ import annotations

from rtlynx.apply import apply, remove
from rtlynx.calibrate import calibrate
from rtlynx.compensation import Compensation, load_compensation, save_compensation
from rtlynx.config import SparsityConfig
from rtlynx.errors import CompensationMismatchError, DeviceError, InvalidArgumentError, RTLynxError
from rtlynx.linear import SparseLinear
from rtlynx.summary import LayerSummary, Summary, summary
from rtlynx.version import __version__

__all__ = [
    "Compensation",
    "CompensationMismatchError",
    "DeviceError",
    "InvalidArgumentError",
    "LayerSummary",
    "RTLynxError",
    "SparseLinear",
    "SparsityConfig",
    "Summary",
    "__version__",
    "apply",
    "calibrate",
    "load_compensation",
    "remove",
    "save_compensation",
    "summary",
]
