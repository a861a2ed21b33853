"""rtlynx: 2:4 activation sparsity for diffusion transformers, on sparse tensor cores.

    import rtlynx
    rtlynx.apply(pipe)                                # layers become sparse, in place
    compensation = rtlynx.calibrate(pipe, prompts)    # fit the error-compensating branch on the model's own activations
    compensation.save("flux.rtlynx.safetensors")
    print(rtlynx.summary(pipe))                       # what runs where, and why

Importing needs neither a GPU nor a driver; the compiled extension is loaded when the first CUDA tensor arrives. The public names are
imported when they are first used, so that the command line answers without waiting for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rtlynx.errors import CompensationMismatchError, DeviceError, DistributedError, InvalidArgumentError, RTLynxError
from rtlynx.version import __version__

if TYPE_CHECKING:
    from rtlynx.apply import apply, remove
    from rtlynx.autotune import Tuned
    from rtlynx.autotune import autotune as autotune
    from rtlynx.calibrate.calibrate import calibrate as calibrate
    from rtlynx.compact import compact
    from rtlynx.compensation import Compensation, load_compensation, save_compensation
    from rtlynx.config import SparsityConfig
    from rtlynx.evaluate.evaluate import Evaluation
    from rtlynx.evaluate.evaluate import evaluate as evaluate
    from rtlynx.integrations.diffusers import RTLynxConfig
    from rtlynx.linear import SparseLinear
    from rtlynx.refresh import refresh
    from rtlynx.search.search import Search
    from rtlynx.search.search import search as search
    from rtlynx.summary import LayerSummary, Summary, summary

_HOME = {
    "Compensation": "compensation",
    "Evaluation": "evaluate",
    "LayerSummary": "summary",
    "RTLynxConfig": "integrations.diffusers",
    "Search": "search",
    "SparseLinear": "linear",
    "SparsityConfig": "config",
    "Summary": "summary",
    "Tuned": "autotune",
    "apply": "apply",
    "autotune": "autotune",
    "calibrate": "calibrate",
    "compact": "compact",
    "evaluate": "evaluate",
    "load_compensation": "compensation",
    "refresh": "refresh",
    "remove": "apply",
    "save_compensation": "compensation",
    "search": "search",
    "summary": "summary",
}
"""Public name → the module that defines it."""

__all__ = [
    "Compensation",
    "CompensationMismatchError",
    "DeviceError",
    "DistributedError",
    "Evaluation",
    "InvalidArgumentError",
    "LayerSummary",
    "RTLynxConfig",
    "RTLynxError",
    "Search",
    "SparseLinear",
    "SparsityConfig",
    "Summary",
    "Tuned",
    "__version__",
    "apply",
    "autotune",
    "calibrate",
    "compact",
    "evaluate",
    "load_compensation",
    "refresh",
    "remove",
    "save_compensation",
    "search",
    "summary",
]


class _Package(ModuleType):
    """Loads public names on first use."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing rtlynx.apply binds that module here; where a module and the function in it share a name, the function wins.
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
