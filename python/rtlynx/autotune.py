"""`autotune`: measure which kernel is fastest for the layers of a model on this GPU, run it from now on, and remember it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from types import ModuleType
from typing import get_args

import torch
from torch import Tensor
from tqdm import tqdm

from rtlynx import launch, ops, plans
from rtlynx.config import Precision
from rtlynx.eligibility import all_sparse_layers, target_modules
from rtlynx.errors import DeviceError, InvalidArgumentError
from rtlynx.fp8 import element_types, kernel_dtype, quantize_weight
from rtlynx.linear import SparseLinear
from rtlynx.plans import Machine, Problem
from rtlynx.reference import E4M3
from rtlynx.timing import time_interleaved

_OP = "autotune"
_WORTH_IT = 0.99
"""Another kernel than the planned one must take less than this share of its time: what is closer than 1 % is noise."""


@dataclass(frozen=True)
class Tuned:
    """What is known of one product after `autotune`.

    Attributes:
        problem: Its sizes: ``m``, ``n``, ``k``, ``rank``, ``dtype``.
        planned: The kernel that is estimated to be fastest, which runs where nothing is tuned.
        kernel: The kernel that runs from now on.
        milliseconds: Kernel → its median time; empty where the kernel was known from before.
    """

    problem: Problem
    planned: str
    kernel: str
    milliseconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Time of the planned kernel over that of the chosen one; NaN where the kernel was known from before."""
        return self.milliseconds[self.planned] / self.milliseconds[self.kernel] if self.milliseconds else float("nan")


@torch.no_grad()
def autotune(
    model_or_problems: object,
    tokens: int | Sequence[int] = 4096,
    *,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    precision: Precision = "model",
    again: bool = False,
    repeats: int = 30,
) -> tuple[Tuned, ...]:
    """Measure the GEMM kernels that could run the layers of a model, and run the fastest from now on.

    Which kernel runs is otherwise estimated, from measurements of a few layers. What is found here holds for exactly these numbers of
    tokens, in this process and, through a file, in later ones on the same kind of GPU with the same driver and version of rtlynx. Call it
    before ``torch.compile`` or a CUDA graph captures the model, and after calibration, which gives layers their branch.

    Args:
        model_or_problems: A model or pipeline given to `rtlynx.apply`, wherever its weights are: only sizes are read. Or a list of
            ``(m, n, k, rank)``: tokens, output channels, input channels, rank of the branch.
        tokens: M of the model's layers, one or several: batch times tokens. Ignored for a list of problems. A layer that runs dense with
            so few tokens is left out.
        device: The GPU to measure on; default: the one the model is on, else the current one. All GPUs of its kind get the result.
        dtype: Of a list of problems; a model's layers have their own.
        precision: The same.
        again: Measure anew what was measured before.
        repeats: Timed calls of every kernel.

    Returns:
        What was found for every different product, in the model's order.

    Raises:
        InvalidArgumentError: The model has no sparse layer or none that is sparse with so many tokens, or a problem is one that no kernel
            serves. Nothing has been measured.
        DeviceError: There is no GPU, or the kernels cannot run on it.
    """
    if not torch.cuda.is_available():
        message = "there is no GPU to measure; `rtlynx info` shows what is missing"
        raise DeviceError(_OP, "device", "no GPU", "a GPU", message)
    core = launch.core()
    if isinstance(model_or_problems, Sequence):
        place = _gpu(device, None)
        if precision not in get_args(Precision):
            raise InvalidArgumentError(_OP, "precision", repr(precision), "'model' or 'fp8'")
        problems = _listed(model_or_problems, kernel_dtype(dtype, E4M3 if precision == "fp8" else None))
    else:
        layers = all_sparse_layers(target_modules(model_or_problems, _OP)).values()
        if not layers:
            raise InvalidArgumentError(_OP, "model_or_problems", "a model without sparse layers", "one given to rtlynx.apply")
        counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
        place = _gpu(device, next(iter(layers)).weight.device)
        problems = list(dict.fromkeys(problem for layer in layers for problem in _of_layer(layer, counts, place)))
        if not problems:
            least = min(layer.least_tokens(place) for layer in layers)
            raise InvalidArgumentError(_OP, "tokens", counts, f"at least {least}: with fewer all layers of this model run dense")
    return _tune(core, place.index, problems, again, repeats)


def _gpu(wanted: torch.device | str | int | None, of_model: torch.device | None) -> torch.device:
    """The GPU to measure on, with its index."""
    if wanted is None:
        wanted = of_model if of_model is not None and of_model.type == "cuda" else "cuda"
    device = torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise InvalidArgumentError(_OP, "device", str(device), f"one of {torch.cuda.device_count()} GPUs: cuda, cuda:0, ...")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _listed(problems: Sequence[object], dtype: str) -> list[Problem]:
    """A caller's list, each problem once."""
    found = []
    for sizes in problems:
        if not (isinstance(sizes, Sequence) and len(sizes) == 4 and all(isinstance(size, int) for size in sizes) and sizes[0] > 0):
            raise InvalidArgumentError(_OP, "model_or_problems", repr(sizes), "(m, n, k, rank), four integers, m at least 1")
        m, n, k, rank = sizes
        found.append(Problem(m, n, k, rank, dtype))
    return list(dict.fromkeys(found))


def _of_layer(layer: SparseLinear, tokens: Sequence[int], device: torch.device) -> Iterator[Problem]:
    """The products of a layer, for the numbers of tokens with which it is sparse."""
    least = layer.least_tokens(device) if layer.small_m == "dense" else 1
    for m in tokens:
        if m >= max(least, 1):
            yield Problem(m, layer.out_features, layer.in_features, layer.rank, kernel_dtype(layer.compute_dtype, layer.values_dtype))


def _tune(core: ModuleType, index: int, problems: Sequence[Problem], again: bool, repeats: int) -> tuple[Tuned, ...]:
    """Measure what is not known yet, keep and use what comes out."""
    gpu = core.devices()[index]
    machine = Machine.of(core, gpu)
    arch = {"capability": gpu["capability"], "sms": gpu["sms"]}
    planned = {problem: core.plan_sparse_linear(**arch, **asdict(problem)) for problem in problems}  # refuses what no kernel serves
    known = plans.load(machine)
    times: dict[Problem, dict[str, float]] = {}
    found: dict[Problem, str] = {}
    unknown = [problem for problem in problems if again or problem not in known]
    try:
        with tqdm(unknown, desc=_OP, unit="product", disable=not unknown) as progress:
            for problem in progress:
                times[problem] = measure_kernels(
                    core, index, problem, core.candidates(**arch, **asdict(problem)), known.get(problem), repeats
                )
                found[problem] = fastest(times[problem], planned[problem])
    finally:  # interrupted, it keeps what it has
        if found:
            _save(machine, found)
        kept = {problem: known[problem] for problem in problems if problem in known} | found
        plans.use(core, machine, kept)
    return tuple(Tuned(problem, planned[problem], kept[problem], times.get(problem, {})) for problem in problems)


def fastest(milliseconds: Mapping[str, float], planned: str) -> str:
    """The kernel of least time; the planned one where none is faster by more than noise."""
    best = min(milliseconds, key=milliseconds.__getitem__)
    return best if milliseconds[best] < _WORTH_IT * milliseconds[planned] else planned


def measure_kernels(
    core: ModuleType, index: int, problem: Problem, kernels: Sequence[str], before: str | None, repeats: int
) -> dict[str, float]:
    """Median milliseconds of every kernel, which take turns; afterwards the one from before runs again."""
    with torch.cuda.device(index):
        generator = torch.Generator("cuda").manual_seed(0)  # the caller's random numbers stay what they would have been
        dtype, values_dtype = element_types(problem.dtype)
        random = partial(torch.randn, device="cuda", dtype=dtype, generator=generator)
        m, n, k, rank = problem.m, problem.n, problem.k, problem.rank
        weight, bias = random(n, k) / k**0.5, random(n)
        down, up = (random(k, rank) / k**0.5, random(n, rank)) if rank else (None, None)
        sparse = ops.sparsify(random(m, k), comp_down=down, values_dtype=values_dtype)
        fp8: tuple[Tensor, torch.dtype] | tuple[()] = ()
        if values_dtype is not None:
            weight, scale = quantize_weight(weight)
            fp8 = scale, dtype

        def run(kernel: str) -> Tensor:
            core.set_plan(index, **asdict(problem), kernel=kernel)
            branch = sparse.branch if rank else None
            return ops.sparse_linear(sparse.values, sparse.metadata, weight, sparse.row_scale, branch, up, bias, *fp8)

        try:
            return time_interleaved({kernel: partial(run, kernel) for kernel in kernels}, repeats)
        finally:
            core.set_plan(index, **asdict(problem), kernel=before)


def _save(machine: Machine, found: Mapping[Problem, str]) -> None:
    try:
        plans.save(machine, found)
    except (OSError, RuntimeError) as error:  # a folder that cannot be written, a user without a home
        why = f"rtlynx: what autotune found holds for this process only: it cannot be saved ({error}); set RTLYNX_CACHE_DIR to a folder"
        warnings.warn(why, stacklevel=4)
