"""Where the demo runs: which device, in which precision, on kernels or on the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rtlynx.environment import collect
from rtlynx.errors import DeviceError, InvalidArgumentError


@dataclass(frozen=True)
class Place:
    """A device and how the demo uses it.

    Attributes:
        device: The torch device.
        dtype: float32 on the CPU, where half precision is slow; bfloat16 on a GPU, which the kernels take.
        name: The hardware, for people.
        prompts: How many prompts the demo samples there unless told otherwise.
        calibration_prompts: How many others it calibrates on.
        batch: Pictures sampled at once.
    """

    device: torch.device
    dtype: torch.dtype
    name: str
    prompts: int
    calibration_prompts: int
    batch: int

    @property
    def on_gpu(self) -> bool:
        """Whether the sparse layers run the kernels."""
        return self.device.type == "cuda"


def choose_place(wanted: str) -> Place:
    """Turn ``--device`` into a place.

    Args:
        wanted: ``"cpu"``, ``"cuda"``, ``"cuda:<index>"``, or ``"auto"``: the first GPU on which the kernels run, else the CPU.

    Raises:
        InvalidArgumentError: Not one of these.
        DeviceError: A GPU was asked for by name and the kernels cannot run there; says why.
    """
    if wanted == "cpu":
        return _cpu()
    if wanted != "auto" and wanted != "cuda" and not (wanted.startswith("cuda:") and wanted[5:].isdigit()):
        raise InvalidArgumentError("demo", "device", repr(wanted), "auto, cpu, cuda or cuda:<index>")

    environment = collect()
    index = int(wanted[5:]) if wanted.startswith("cuda:") else None
    candidates = [gpu for gpu in environment.gpus if index in (None, gpu.index)]
    for gpu in candidates:
        if gpu.kernel:
            return Place(torch.device("cuda", gpu.index), torch.bfloat16, gpu.name, prompts=64, calibration_prompts=64, batch=64)
    if wanted == "auto":
        return _cpu()
    reasons = [f"cuda:{gpu.index} ({gpu.name}): {gpu.reason}" for gpu in candidates]
    reasons = reasons or [f"{item.what} missing: {item.consequence}" for item in environment.missing] or [f"there is no {wanted}"]
    got = "; ".join(reasons)
    message = f"the kernels cannot run on {wanted}: {got}. `rtlynx info` shows what runs where"
    raise DeviceError("demo", "device", got, "a GPU on which the kernels run", message)


def _cpu() -> Place:
    return Place(torch.device("cpu"), torch.float32, f"CPU, {torch.get_num_threads()} threads", prompts=8, calibration_prompts=16, batch=8)
