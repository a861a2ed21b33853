"""What the extension runs on a GPU, or why nothing: the one answer of layers and of `rtlynx info`. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from rtlynx.errors import RTLynxError

EXAMPLE = {"m": 4096, "n": 3072, "k": 3072, "rank": 64}
"""The layer whose kernel stands for all: FLUX.1's attention width and 4096 image tokens."""


def kernel_or_reason(core: ModuleType, gpu: Mapping[str, Any]) -> tuple[str | None, str]:
    """(kernel, "") of `EXAMPLE` in bfloat16 on one of ``core.devices()``; where none can run (None, why)."""
    if not core.device_code()["targets"]:
        return None, "this build of rtlynx has no device code"
    if driver_too_old(core):
        driver, needed = core.driver_version(), core.device_code()["min_driver"]
        return None, "the driver supports CUDA {}.{}, and the kernels need {}.{}".format(*driver, *needed)
    try:
        return core.plan_sparse_linear(gpu["capability"], gpu["sms"], **EXAMPLE, dtype="bfloat16"), ""
    except RTLynxError as error:
        return None, error.message


def driver_too_old(core: ModuleType) -> bool:
    """Whether there is a driver, and it cannot load the device code."""
    driver, needed = core.driver_version(), core.device_code()["min_driver"]
    return driver is not None and needed is not None and driver < needed
