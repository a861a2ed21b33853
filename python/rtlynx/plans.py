"""The autotune cache: which kernel was measured fastest for a problem, on disk, one file for each GPU, driver and build of rtlynx."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rtlynx.checks import KERNEL_DTYPES
from rtlynx.errors import RTLynxError
from rtlynx.fp8 import kernel_dtype
from rtlynx.io import atomic_path
from rtlynx.reference import E4M3
from rtlynx.version import __version__

FORMAT = 1
DTYPES = tuple(kernel_dtype(dtype, values_dtype) for values_dtype in (None, E4M3) for dtype in KERNEL_DTYPES)
"""The extension's names of the element types that the kernels serve; e4m3 ones have kernels on some GPUs only."""


@dataclass(frozen=True, order=True)
class Problem:
    """One product as dispatch sees it: sizes, rank of the branch, the extension's name of the element types (`rtlynx.fp8.kernel_dtype`)."""

    m: int
    n: int
    k: int
    rank: int
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Machine:
    """What a measurement holds for. Where any of it differs, the plans are another file's.

    Attributes:
        gpu: The driver's name for it.
        driver: CUDA version of the driver.
        rtlynx: Version of the package.
        kernels: Names of all kernels that dispatch could have chosen, so that a build with another one is tuned anew.
    """

    gpu: str
    driver: str
    rtlynx: str
    kernels: tuple[str, ...]

    @classmethod
    def of(cls, core: ModuleType, device: Mapping[str, Any]) -> Machine:
        """That of one entry of ``core.devices()``.

        Raises:
            DeviceError: There is no driver, or the kernels cannot run on this GPU.
        """
        any_problem = {"m": 1, "n": 64, "k": 64, "rank": 0}
        kernels = [core.candidates(device["capability"], device["sms"], **any_problem, dtype=dtype) for dtype in DTYPES]
        driver = ".".join(map(str, core.driver_version() or ()))
        return cls(gpu=device["name"], driver=driver, rtlynx=__version__, kernels=tuple(name for names in kernels for name in names))

    @property
    def path(self) -> Path:
        """Its file."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]
        return cache_folder() / "plans" / f"{digest}.json"


def cache_folder() -> Path:
    """``RTLYNX_CACHE_DIR``, else ``rtlynx`` in the user's cache folder as the XDG base directory specification finds it."""
    if folder := os.environ.get("RTLYNX_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtlynx"


def load(machine: Machine) -> dict[Problem, str]:
    """Problem → kernel as saved for this machine; nothing where nothing was, with a warning where a file is there but unreadable."""
    try:
        path = machine.path
    except RuntimeError:  # a user without a home, as containers have them, has saved nothing
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            return {}
        return {Problem(**plan["problem"]): str(plan["kernel"]) for plan in stored["plans"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"rtlynx: ignoring the autotune cache {path}, which cannot be read ({error}); delete it", stacklevel=2)
        return {}


def save(machine: Machine, plans: Mapping[Problem, str]) -> Path:
    """Add plans to those saved before, replacing the same problems'; returns the file."""
    merged = load(machine) | dict(plans)
    listed = [{"problem": asdict(problem), "kernel": kernel} for problem, kernel in sorted(merged.items())]
    text = json.dumps({"format": FORMAT, "machine": asdict(machine), "plans": listed}, indent=1) + "\n"
    with atomic_path(machine.path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return machine.path


def use(core: ModuleType, machine: Machine, plans: Mapping[Problem, str]) -> None:
    """Make every GPU of this kind run the planned kernels from now on."""
    for device in core.devices():
        if _machine(core, device) == machine:
            for problem, kernel in plans.items():
                core.set_plan(device["index"], **asdict(problem), kernel=kernel)


def use_saved(core: ModuleType) -> None:
    """Make all GPUs run what is saved for them. It never fails: without plans everything runs too, as fast as dispatch estimates."""
    try:
        devices = core.devices()
    except RTLynxError:  # the first operation will say so
        return
    for machine in {machine for device in devices if (machine := _machine(core, device)) is not None}:
        try:
            use(core, machine, load(machine))
        except (RTLynxError, TypeError, OverflowError) as error:  # someone else wrote that
            warnings.warn(f"rtlynx: ignoring what is left of the autotune cache {machine.path} ({error}); delete it", stacklevel=2)


def _machine(core: ModuleType, device: Mapping[str, Any]) -> Machine | None:
    """That of a GPU, or None for one that the kernels cannot run on."""
    try:
        return Machine.of(core, device)
    except RTLynxError:
        return None
