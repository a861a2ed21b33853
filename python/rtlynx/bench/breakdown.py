"""Where the time of a step goes: kernels by what they do, told from their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

BETWEEN = re.compile(r"triton_(poi|red|per)_")
"""Inductor's kernels that are neither product nor attention. In their names are also the ops that they only prepare something for."""
KINDS: dict[str, re.Pattern[str]] = {
    "select": re.compile(r"sparsify"),
    "attention": re.compile(r"flash|fmha|attention|sdpa|_attn_|cudnn.*(mha|sdp)", re.IGNORECASE),
    "gemm": re.compile(r"spmm|fused_linear|gemm|nvjet|cutlass|xmma|scaled_mm|addmm|aten::mm|sparse_linear|cublas|splitk", re.IGNORECASE),
}
"""Kind → the kernels of that kind, the first that matches; every other kernel is the rest."""


def kind(kernel: str) -> str:
    """``"select"``, ``"attention"``, ``"gemm"`` or ``"other"``."""
    if BETWEEN.match(kernel):
        return "other"
    return next((name for name, pattern in KINDS.items() if pattern.search(kernel)), "other")


def milliseconds_by_kind(step: Callable[[], object], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Time of the kernels of one step by kind, mean of ``repeats`` after as many that warm the device up; on a CPU that of the ops."""
    on_gpu = device.type == "cuda"
    for _ in range(repeats):
        step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(repeats):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [event for event in profiler.events() or () if (event.device_type == DeviceType.CUDA) is on_gpu]
    if on_gpu:
        kernels = [event for event in events if not getattr(event, "is_user_annotation", False)]
        spent = apart([(event.name, event.time_range.start, event.time_range.end) for event in kernels])
    else:
        spent = [(event.name, event.self_cpu_time_total) for event in events]
    times = dict.fromkeys((*KINDS, "other"), 0.0)
    for name, microseconds in spent:
        times[kind(name)] += microseconds / repeats * 1e-3
    return times


def apart(kernels: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
    """Name and duration of kernels from name, start and end, in the order of their starts.

    A kernel may start while the one before still runs (programmatic dependent launch). What they have in common counts for the first, so
    that durations add up to the time in which there was a kernel.
    """
    found, until = [], float("-inf")
    for name, start, end in sorted(kernels, key=lambda each: each[1:]):
        found.append((name, max(0.0, end - max(start, until))))
        until = max(until, end)
    return found
