"""What this machine and installation can run, gathered without failing: every part may be absent."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from rtlynx.errors import RTLynxError
from rtlynx.usable import driver_too_old, kernel_or_reason
from rtlynx.version import __version__

_DRIVERS = "nvidia.com/drivers"


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver reports it, and what runs there: a kernel's name, or why none does."""

    index: int
    name: str
    capability: tuple[int, int]
    sms: int
    memory_bytes: int
    memory_gb_s: int
    kernel: str | None
    reason: str = ""


@dataclass(frozen=True)
class Missing:
    """Something that is not there, what it would be good for, and how to get it."""

    what: str
    consequence: str
    remedy: str


@dataclass(frozen=True)
class Environment:
    """The answer of `collect`; None wherever a part is absent."""

    version: str
    device_code: tuple[str, ...]
    nvcc: str | None
    driver: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    packages: dict[str, str | None] = field(default_factory=dict)
    torch_cuda: str | None = None
    missing: tuple[Missing, ...] = ()


def collect() -> Environment:
    """Look at the extension, the driver, the GPUs and torch."""
    core, core_error = _import("rtlynx._core")
    torch, torch_error = _import("torch")
    missing = []
    targets: tuple[str, ...] = ()
    nvcc, driver = None, None
    gpus: tuple[Gpu, ...] = ()

    if core is None:
        missing.append(Missing("compiled extension", f"no GPU kernels ({core_error})", "pip install . (needs a Rust toolchain)"))
    else:
        built = core.device_code()
        targets, nvcc, driver = tuple(built["targets"]), built["nvcc"], core.driver_version()
        try:
            gpus = tuple(_gpu(core, torch, device) for device in core.devices())
        except RTLynxError as error:
            missing.append(Missing("working driver", error.message, _DRIVERS))
        if driver is not None and driver_too_old(core):
            consequence = "no GPU can be used: it supports CUDA {}.{}, and the kernels need {}.{}".format(*driver, *built["min_driver"])
            missing.append(Missing("new enough driver", consequence, _DRIVERS))
        if not targets:
            missing.append(Missing("device code", "this build has no GPU kernels", "rebuild with nvcc: pip install --force-reinstall ."))
        if driver is None:
            missing.append(Missing("NVIDIA driver", "no GPU can be used", "needs an NVIDIA GPU; nvidia.com/drivers"))
        elif not gpus and not missing:
            missing.append(Missing("GPU", "the driver reports none", "check nvidia-smi and CUDA_VISIBLE_DEVICES"))
    if torch is None:
        missing.append(Missing("torch", f"nothing runs ({torch_error})", "pip install torch"))
    elif gpus and not torch.cuda.is_available():
        missing.append(Missing("torch with CUDA", f"torch {torch.__version__} does not see the GPU", "install a CUDA build: pytorch.org"))
    if _version("diffusers") is None:
        missing.append(Missing("diffusers", "no pipelines and no demo", "pip install diffusers"))

    return Environment(
        version=__version__,
        device_code=targets,
        nvcc=nvcc,
        driver=driver,
        gpus=gpus,
        packages={name: _version(name) for name in ("torch", "diffusers", "peft")},
        torch_cuda=torch.version.cuda if torch is not None else None,
        missing=tuple(missing),
    )


def _gpu(core: ModuleType, torch: ModuleType | None, device: dict[str, Any]) -> Gpu:
    kernel, reason = kernel_or_reason(core, device)
    if kernel is not None and (torch is None or device["index"] >= torch.cuda.device_count()):
        kernel, reason = None, "torch does not see this GPU"
    return Gpu(**device, kernel=kernel, reason=reason)


def _import(name: str) -> tuple[Any, str]:
    """The module, or None and why: an installation with a broken torch must still get an answer."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError) as error:
        return None, str(error)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
