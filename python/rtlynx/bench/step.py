"""One denoising step of a full-size model: dense, sparse, and what else a user would pick, eager and compiled, in one process."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import rtlynx
from rtlynx import InvalidArgumentError, SparsityConfig
from rtlynx.adaln_shift import check_adaln_shift
from rtlynx.bench.breakdown import milliseconds_by_kind
from rtlynx.bench.models import BenchModel
from rtlynx.bench.peer import Unavailable
from rtlynx.bench.random_model import build, random_compensation, variant
from rtlynx.eligibility import candidates
from rtlynx.fp8 import missing_kernels
from rtlynx.fusions.install import original_class

logger = logging.getLogger("rtlynx")


@dataclass(frozen=True)
class StepTimes:
    """One row of model.csv. Times are milliseconds.

    Attributes:
        mode: A key of `MODES`.
        compiled: Whether the repeated blocks were compiled, each as one graph; the whole model where diffusers names none.
        step_ms: Median time of a forward.
        gemm_ms, attention_ms, select_ms: Of that, the kernels of a kind, from a profile of its own.
        other_ms: What remains of the step: all other kernels, and gaps between kernels.
        memory_gb: Weights and buffers of this mode alone, and what a step allocates beyond, in 10⁹ bytes.
        speedup: Over the dense step that is compiled like this one.
        gap_ms: Of `other_ms`, what no kernel ran in: the device waited for the host. From the profile, which is of other calls at another
            clock, so it can be a little off, also below 0; NaN in files of versions that did not tell.
        graph_ms: Median time of the same forward replayed as a CUDA graph, where the host costs nothing; NaN where it is not compiled, not
            on a GPU, or cannot be captured.
    """

    model: str
    height: int
    width: int
    mode: str
    compiled: bool
    step_ms: float
    gemm_ms: float
    attention_ms: float
    select_ms: float
    other_ms: float
    memory_gb: float
    speedup: float
    gap_ms: float = math.nan
    graph_ms: float = math.nan


def _dense(module: nn.Module, rank: int) -> None:
    """The model as it is."""


def _naive(module: nn.Module, rank: int) -> None:
    """Selection alone, without compensation of any kind."""
    rtlynx.apply(module, SparsityConfig(branch="none", rank=0, norm_compensation=False))


def _compensated(module: nn.Module, rank: int) -> None:
    """Norm compensation and a branch on every sparse layer."""
    rtlynx.apply(module, SparsityConfig(rank=rank))
    random_compensation(module, rank)


def _sparse_fp8(module: nn.Module, rank: int, fuse: bool = True, adaln_shift: bool = False) -> None:
    """Compensated, with the operands of the sparse products in e4m3."""
    reason = missing_kernels(next(module.parameters()).device)
    if reason is not None:
        raise Unavailable(reason)
    rtlynx.apply(module, SparsityConfig(rank=rank, precision="fp8", fuse=fuse, adaln_shift=adaln_shift))
    random_compensation(module, rank)


def _sparse_fp8_compact(module: nn.Module, rank: int) -> None:
    """`_sparse_fp8` with the e4m3 copy as the only weight (`rtlynx.compact`)."""
    _sparse_fp8(module, rank)
    rtlynx.compact(module)


def _unfused(module: nn.Module, rank: int) -> None:
    """`_sparse_fp8` with every activation as a pass of its own."""
    _sparse_fp8(module, rank, fuse=False)


def _without_adaln_shift(module: nn.Module, rank: int) -> None:
    """`_sparse_fp8` that selects without the shift of adaLN."""
    try:
        check_adaln_shift(module, SparsityConfig(adaln_shift=True))
    except InvalidArgumentError as error:
        raise Unavailable(str(error)) from error
    _sparse_fp8(module, rank, adaln_shift=True)


def _fp8(module: nn.Module, rank: int) -> None:
    """torchao's dynamic fp8, a scale per row, on the layers that would be sparse."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise Unavailable(str(error)) from error
    chosen = {c.name for c in candidates(module, SparsityConfig()) if c.reason is None}
    # Otherwise torchao sets inductor's options for the whole process: every mode would be tuned, for minutes.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(module, config, filter_fn=lambda _, name: name in chosen)


def _fp8_storage(module: nn.Module, rank: int, before: Callable[[nn.Module, int], None] = _compensated) -> None:
    """Compensated, and every layer's weight stored in fp8 until it runs: diffusers' layerwise casting."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:  # casting would change those of the other modes
                part._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
    before(module, rank)
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)  # type: ignore[operator]


def _first_block_cache(module: nn.Module, rank: int, before: Callable[[nn.Module, int], None] = _compensated) -> None:
    """Compensated, in a step whose first block finds so little changed that the other blocks are skipped."""
    before(module, rank)
    if not hasattr(module, "enable_cache"):
        raise Unavailable(f"{type(module).__name__} has no caches")
    from diffusers import FirstBlockCacheConfig

    module.enable_cache(FirstBlockCacheConfig(threshold=1.0))  # type: ignore[operator]  # inputs repeat: any threshold would do


MODES: dict[str, Callable[[nn.Module, int], None]] = {
    "dense": _dense,
    "naive": _naive,
    "compensated": _compensated,
    "sparse fp8": _sparse_fp8,
    "sparse fp8 compact": _sparse_fp8_compact,
    "sparse fp8 unfused": _unfused,
    "sparse fp8 adaln": _without_adaln_shift,
    "fp8": _fp8,
    "fp8-storage": _fp8_storage,
    "first-block-cache": _first_block_cache,
    "dense fp8-storage": partial(_fp8_storage, before=_dense),
    "dense first-block-cache": partial(_first_block_cache, before=_dense),
}
"""Name → what makes a model of random weights one of this mode, given the rank."""
USUAL_MODES = ("dense", "naive", "compensated", "sparse fp8", "fp8")
WITHOUT = " without "
"""Between a mode and the class of the blocks that are left as diffusers wrote them: ``"sparse fp8 without FluxAttention"``."""
_HOOKED = ("fp8-storage", "first-block-cache")
_EAGER_ONLY = (*_HOOKED, *(f"dense {mode}" for mode in _HOOKED))  # hooks around the layers or blocks: no whole graph
_WITH_BRANCH = ("compensated", "sparse fp8", "sparse fp8 compact", "sparse fp8 unfused", "sparse fp8 adaln", *_HOOKED)


@torch.no_grad()
def measure_step(
    model: BenchModel,
    device: torch.device,
    *,
    size: tuple[int, int] | None = None,
    rank: int = 64,
    repeats: int = 10,
    eager: bool = True,
    compiled: bool = True,
    modes: tuple[str, ...] = USUAL_MODES,
    compile_options: Mapping[str, Any] | None = None,
    after_row: Callable[[list[StepTimes], list[str]], None] = lambda rows, notes: None,
) -> tuple[list[StepTimes], list[str]]:
    """Time one step of ``model`` in every mode.

    All modes share one set of weights and take turns, so that a clock that sags under load sags for all of them.

    Args:
        model: What to build.
        device: Where.
        size: Height and width; default: the model's.
        rank: Of the branch in the compensated mode.
        repeats: Timed steps of each.
        eager: Whether to time eager modes.
        compiled: Whether to time compiled modes.
        modes: Which of `MODES`, or one of them `WITHOUT` one kind of fused blocks; "dense" is always measured.
        compile_options: For ``compile_repeated_blocks``, beside ``fullgraph=True``, or for ``compile`` of the whole model.
        after_row: Called after each row with all until then, and the notes: profiles take longer than the timed steps.

    Returns:
        The rows, and notes for the file's header: how long `rtlynx.apply` took, and why a mode is missing.
    """
    size = size or model.size
    torch.manual_seed(0)
    module = build(model, device)
    inputs = model.inputs(size, device, torch.bfloat16, module.config)
    notes: list[str] = []
    steps: dict[tuple[str, bool], Any] = {}
    for mode in dict.fromkeys(("dense", *modes)):
        for use_compiler in (False,) * eager + (True,) * (compiled and mode.partition(WITHOUT)[0] not in _EAGER_ONLY):
            one = variant(module)
            start = time.perf_counter()
            try:
                _make(one, mode, rank)
            except Unavailable as error:
                notes.append(f"{mode} not measured: {error}")
                break
            _synchronize(device)
            if mode in _WITH_BRANCH and not use_compiler:
                notes.append(f"apply, {_label(mode, rank)} in every layer: {time.perf_counter() - start:.2f} s")
            if use_compiler:
                _compile(one, **(compile_options or {}))
            steps[mode, use_compiler] = one
    if compiled and not _names_blocks(module):
        notes.append("compiled whole: diffusers names no repeated blocks")
    # Variants are looked up by their guards, each in the code of the same block classes.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 8 * len(steps))
    calls = {key: _call(one, inputs) for key, one in steps.items()}
    memory = {}
    for key, call in tqdm(calls.items(), desc=f"{model.name}: first steps", unit="mode"):
        if not call().isfinite().all():
            notes.append(f"the output of {key} is not finite")
        call()
        memory[key] = (_held_bytes(steps[key]) + _peak_bytes(call, device)) * 1e-9
    times = time_in_turns(calls, device, repeats)
    rows = []
    for (mode, use_compiler), call in tqdm(calls.items(), desc=f"{model.name}: profiles", unit="mode"):
        kinds = milliseconds_by_kind(call, device)
        step_ms = times[mode, use_compiler]
        rows.append(
            StepTimes(
                model=model.name,
                height=size[0],
                width=size[1],
                mode=_label(mode, rank),
                compiled=use_compiler,
                step_ms=step_ms,
                gemm_ms=kinds["gemm"],
                attention_ms=kinds["attention"],
                select_ms=kinds["select"],
                other_ms=step_ms - kinds["gemm"] - kinds["attention"] - kinds["select"],
                gap_ms=step_ms - sum(kinds.values()),
                graph_ms=_replayed(call, device, repeats) if use_compiler else math.nan,
                memory_gb=memory[mode, use_compiler],
                speedup=times["dense", use_compiler] / step_ms,
            )
        )
        after_row(rows, notes)
    return rows, notes


def _make(module: nn.Module, mode: str, rank: int) -> None:
    """Make a model of random weights one of this mode.

    Raises:
        Unavailable: It cannot be one here.
    """
    base, _, left = mode.partition(WITHOUT)
    MODES[base](module, rank)
    blocks = [block for block in module.modules() if original_class(block) is not type(block) and type(block).__name__ == left]
    if left and not blocks:
        fused = sorted({type(block).__name__ for block in module.modules() if original_class(block) is not type(block)})
        raise Unavailable(f"no {left} among the fused blocks: {', '.join(fused) or 'none'}")
    for block in blocks:
        block.__class__ = original_class(block)


def _names_blocks(module: Any) -> bool:
    return bool(getattr(module, "_repeated_blocks", None))


def _compile(module: Any, **options: Any) -> None:
    """The repeated blocks, each as one graph; all of the model where diffusers does not say which they are (SD3, PixArt).

    Either way it is a variant's own modules that are compiled: the others stay eager without anything being undone.
    """
    if _names_blocks(module):
        module.compile_repeated_blocks(fullgraph=True, **options)
    else:
        module.compile(**options)


def _label(mode: str, rank: int) -> str:
    """What a row is called: a mode with a branch by the rank, and by what else it is."""
    base, without, left = mode.partition(WITHOUT)
    if base not in _WITH_BRANCH:
        return mode
    return (f"rank {rank}" if base == "compensated" else f"rank {rank}, {base}") + without + left


def _call(module: Any, inputs: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with module.cache_context("step") if getattr(module, "is_cache_enabled", False) else nullcontext():
            sample = module(**inputs, return_dict=False)[0]
        return sample[0] if isinstance(sample, list) else sample  # type: ignore[no-any-return]

    return call


def time_in_turns(calls: Mapping[Any, Callable[[], object]], device: torch.device, repeats: int) -> dict[Any, float]:
    """Median milliseconds of every call, host and device together: gaps in which the device waits for the host count."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in tqdm(range(repeats), desc="timed rounds", unit="round"):
        for key, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            times[key].append((time.perf_counter() - start) * 1e3)
    return {key: statistics.median(values) for key, values in times.items()}


def _replayed(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median milliseconds of a call captured as a CUDA graph; NaN where there are none, or something in it cannot be captured."""
    if device.type != "cuda":
        return math.nan
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        logger.warning("no CUDA graph of a step: %s", error)
        return math.nan
    return time_in_turns({"": graph.replay}, device, repeats)[""]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _held_bytes(module: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each storage once; those of a tensor subclass by what it holds."""
    held: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
        for part in [getattr(tensor, name) for name in names] or [tensor]:
            storage = part.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """What a call allocates at most beyond what is there before; 0 on a CPU, where torch does not say."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
