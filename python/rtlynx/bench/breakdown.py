"""Where the time of a step goes: kernels by what they do, told from their names."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KINDS: dict[str, re.Pattern[str]] = {
    "select": re.compile(r"sparsify"),
    "attention": re.compile(r"flash|fmha|attention|sdpa|_attn_|cudnn.*(mha|sdp)", re.IGNORECASE),
    "gemm": re.compile(r"spmm|fused_linear|gemm|nvjet|cutlass|xmma|scaled_mm|addmm|aten::mm|sparse_linear|cublas|splitk", re.IGNORECASE),
}
"""Kind → the kernels of that kind, the first that matches; every other kernel is the rest."""


def kind(kernel: str) -> str:
    """``"select"``, ``"attention"``, ``"gemm"`` or ``"other"``."""
    return next((name for name, pattern in KINDS.items() if pattern.search(kernel)), "other")


def milliseconds_by_kind(step: Callable[[], object], device: torch.device, repeats: int = 2) -> dict[str, float]:
    """Time of the kernels of one step by kind, mean of ``repeats``; on a CPU that of the ops."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(repeats):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    times = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.events() or ():
        if (event.device_type == DeviceType.CUDA) is on_gpu:
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[kind(event.name)] += spent / repeats * 1e-3
    return times
