"""Which linear layers of a model become sparse, and why the others do not: the one decision `apply` and `summary` share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from rtlynx.checks import SUPPORTED_DTYPES
from rtlynx.config import Precision, SparsityConfig
from rtlynx.errors import InvalidArgumentError
from rtlynx.fp8 import missing_kernels
from rtlynx.launch import why_no_kernels
from rtlynx.linear import SparseLinear
from rtlynx.patterns import first_match
from rtlynx.recipes import Recipe, find_recipe
from rtlynx.reference import K_MULTIPLE, N_MULTIPLE


@dataclass(frozen=True)
class Candidate:
    """One linear layer of a model and what is to become of it.

    Attributes:
        name: Full dotted name, without the ``.base_layer`` of a peft wrapper.
        module: The layer itself.
        reason: Why it stays dense; None if it is to be sparse.
        wanted: Whether the configuration asks for it, so that a `reason` is a limitation rather than a choice.
        per_sample: Whether the recipe says that it sees one row per sample instead of one per token.
    """

    name: str
    module: nn.Linear
    reason: str | None
    wanted: bool
    per_sample: bool


def target_module(pipe_or_module: object, op: str) -> nn.Module:
    """The module to work on: the argument itself, else a pipeline's ``transformer``, else its ``unet``; compiled wrappers removed.

    Raises:
        InvalidArgumentError: It is none of these.
    """
    for candidate in (pipe_or_module, getattr(pipe_or_module, "transformer", None), getattr(pipe_or_module, "unet", None)):
        if isinstance(candidate, nn.Module):
            inner = getattr(candidate, "_orig_mod", candidate)  # what torch.compile(module) wraps
            return inner if isinstance(inner, nn.Module) else candidate
    expected = "an nn.Module or a pipeline with a .transformer or .unet"
    raise InvalidArgumentError(op, "pipe_or_module", type(pipe_or_module).__name__, expected)


_OTHERS = ("transformer_2", "unconditional_transformer")
"""Where pipelines keep a second transformer: those of Wan 2.2 the one for low noise, Ideogram 4's the one that guidance compares with."""


def target_modules(pipe_or_module: object, op: str) -> dict[str, nn.Module]:
    """All modules to work on, by what their layers' names are prefixed with: that of `target_module` (no prefix), and a second transformer.

    Raises:
        InvalidArgumentError: There is none.
    """
    modules = {"": target_module(pipe_or_module, op)}
    for name in () if isinstance(pipe_or_module, nn.Module) else _OTHERS:
        other = getattr(pipe_or_module, name, None)
        if isinstance(other, nn.Module) and (root := target_module(other, op)) not in modules.values():
            modules[f"{name}."] = root
    return modules


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every ``nn.Linear``, sparse ones and subclasses too; a layer used under two names comes once for each."""
    for name, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, nn.Linear):
            yield name, child


def canonical(name: str) -> str:
    """The layer's name without the ``.base_layer`` a peft wrapper adds, so that patterns and files survive adapters."""
    return name.removesuffix(".base_layer")


def sparse_layers(module: nn.Module) -> dict[str, SparseLinear]:
    """Canonical name → every `SparseLinear` of a module, each object once, in the module's order."""
    return {canonical(name): child for name, child in module.named_modules() if isinstance(child, SparseLinear)}


def own_name(name: str) -> str:
    """A layer's name inside its own module, which is what patterns match, from one of `all_sparse_layers`."""
    prefix, _, rest = name.partition(".")
    return rest if prefix in _OTHERS else name


def all_sparse_layers(modules: Mapping[str, nn.Module]) -> dict[str, SparseLinear]:
    """The `sparse_layers` of several modules, by prefixed name."""
    return {f"{prefix}{name}": layer for prefix, module in modules.items() for name, layer in sparse_layers(module).items()}


def candidates(module: nn.Module, config: SparsityConfig) -> Iterator[Candidate]:
    """Judge every linear layer of ``module`` under ``config``."""
    recipe = find_recipe(module)
    include = recipe.include if config.include is None else config.include
    wrapped = {name.removesuffix("base_layer") for name, _ in module.named_modules(remove_duplicate=False) if name.endswith(".base_layer")}
    for full_name, layer in linear_layers(module):
        name = canonical(full_name)
        adapter = full_name == name and any(name.startswith(prefix) for prefix in wrapped)
        chosen = not adapter and first_match(name, include) is not None
        skipped = first_match(name, config.skip) if chosen else None
        wanted = chosen and skipped is None
        reason: str | None
        if adapter:
            reason = "part of a peft adapter"
        elif skipped is not None:
            reason = f"skipped by the pattern {skipped!r}"
        elif not chosen:
            reason = _why_not_included(name, recipe, config)
        else:
            reason = unsupported(layer, config.precision)
        yield Candidate(name, layer, reason, wanted, first_match(name, recipe.per_sample) is not None)


def unsupported(layer: nn.Linear, precision: Precision) -> str | None:
    """Why a layer cannot be sparse in this precision whatever else the configuration says, or None if it can."""
    if type(layer) not in (nn.Linear, SparseLinear):
        return f"is a {type(layer).__qualname__}, and only a plain torch.nn.Linear can be replaced"
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(layer.weight).__qualname__}, not a plain parameter"
    if "forward" in layer.__dict__ and not isinstance(layer, SparseLinear):
        return "its forward is wrapped (by an offloading hook?); call rtlynx.apply before that"
    if layer.in_features % K_MULTIPLE or not layer.in_features:
        return f"in_features = {layer.in_features} is not a positive multiple of {K_MULTIPLE}"
    if layer.out_features % N_MULTIPLE or not layer.out_features:
        return f"out_features = {layer.out_features} is not a positive multiple of {N_MULTIPLE}"
    device = weight.device.type
    dtype = layer.compute_dtype if isinstance(layer, SparseLinear) else weight.dtype
    if device not in SUPPORTED_DTYPES:
        return f"no implementation for device {device}"
    if dtype not in SUPPORTED_DTYPES[device]:
        return f"no implementation for {str(dtype).removeprefix('torch.')} on {device}"
    if not weight.is_contiguous():
        return "its weight is not contiguous"
    return why_no_kernels(weight.device) or (missing_kernels(weight.device) if precision == "fp8" else None)


def _why_not_included(name: str, recipe: Recipe, config: SparsityConfig) -> str:
    if config.include is not None:
        return "not among the included patterns"
    if first_match(name, recipe.per_sample):
        return "sees one row per sample, not one per token: nothing to gain"
    if first_match(name, recipe.ends):
        return "where tokens enter or leave the model: little to gain, much to lose"
    return f"not named by the {recipe.name} recipe"
