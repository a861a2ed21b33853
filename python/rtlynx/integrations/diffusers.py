"""The second way in: ``from_pretrained(..., quantization_config=rtlynx.RTLynxConfig(...))``, `save_pretrained`, and reloading.

diffusers calls every scheme that replaces layers while a model loads a quantization; nothing is quantized here. Importing this module
tells diffusers about it, so that a saved model loads from its ``config.json`` alone.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

import diffusers
import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from rtlynx.apply import applied_config, apply, remove
from rtlynx.bias_groups import install_bias_groups
from rtlynx.config import SparsityConfig
from rtlynx.derived import Derived
from rtlynx.eligibility import sparse_layers, unsupported
from rtlynx.errors import CompensationMismatchError, InvalidArgumentError
from rtlynx.layer_shapes import bias_shape, branch_problem
from rtlynx.linear import SparseLinear
from rtlynx.reference import E4M3


class _Method(str, Enum):
    """diffusers reads ``quant_method.value``."""

    RTLYNX = "rtlynx"


class RTLynxConfig(QuantizationConfigMixin):
    """What to make sparse while diffusers loads a model: a `SparsityConfig` in the form ``from_pretrained`` takes.

    ``RTLynxConfig(rank=32)`` is short for ``RTLynxConfig(SparsityConfig(rank=32))``.

    Args:
        sparsity: What `rtlynx.apply` would be given; default `SparsityConfig()`.
        options: Fields of `SparsityConfig`, instead of `sparsity`.

    Raises:
        InvalidArgumentError: An unknown option, an invalid value, or both a `sparsity` and options.
    """

    def __init__(self, sparsity: SparsityConfig | None = None, **options: Any) -> None:
        method = options.pop("quant_method", _Method.RTLYNX)  # in every dictionary that diffusers stores
        if method != _Method.RTLYNX:
            raise InvalidArgumentError("RTLynxConfig", "quant_method", repr(method), repr(_Method.RTLYNX.value))
        if sparsity is not None and not isinstance(sparsity, SparsityConfig):
            raise InvalidArgumentError("RTLynxConfig", "sparsity", repr(sparsity), "a SparsityConfig")
        if sparsity is not None and options:
            raise InvalidArgumentError("RTLynxConfig", "options", ", ".join(sorted(options)), "none beside a SparsityConfig")
        self.quant_method = _Method.RTLYNX
        self._sparsity = SparsityConfig.from_dict(options) if sparsity is None else sparsity

    @property
    def sparsity(self) -> SparsityConfig:
        """The configuration for `rtlynx.apply`."""
        return self._sparsity

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` gets under ``quantization_config``."""
        return {"quant_method": self.quant_method.value, **self.sparsity.to_dict()}

    to_diff_dict = to_dict  # diffusers prints and serialises this one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RTLynxConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # like every diffusers config


class AppliedConfig(RTLynxConfig):
    """The entry in a loaded model's own config: what the model computes *now*, so that ``save_pretrained`` writes the truth.

    `rtlynx.calibrate` may change branch and rank, `rtlynx.apply` everything; `rtlynx.remove` takes the entry away (`forget`).
    The model is referenced weakly: a cycle would keep its memory after the last user let go.
    """

    def __init__(self, model: nn.Module, sparsity: SparsityConfig) -> None:
        super().__init__(sparsity)
        self._model = weakref.ref(model)

    @property
    def sparsity(self) -> SparsityConfig:
        model = self._model()
        return (None if model is None else applied_config(model)) or self._sparsity

    def __deepcopy__(self, memo: dict[int, Any]) -> RTLynxConfig:
        # Copied as part of its model it belongs to the copy; copied alone it is a snapshot.
        copied = memo.get(id(self._model()))
        return RTLynxConfig(self.sparsity) if copied is None else AppliedConfig(copied, self.sparsity)

    def __reduce__(self) -> tuple[type[RTLynxConfig], tuple[Any, ...]]:
        model = self._model()
        return (RTLynxConfig, (self.sparsity,)) if model is None else (AppliedConfig, (model, self.sparsity))


def forget(model: nn.Module) -> None:
    """Take such an entry out of a model's own config: null in its place, diffusers would load the model and not save it again."""
    entries: Mapping[str, Any] = getattr(model, "_internal_dict", {})
    if isinstance(entries.get("quantization_config"), RTLynxConfig):
        others = {key: entry for key, entry in entries.items() if key != "quantization_config"}
        model.__dict__["_internal_dict"] = type(entries)(others)  # type: ignore[call-arg]


class RTLynxQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads a model: layers are swapped while the model is still on the meta device.

    Weights then load as into any linear layer. Compensation tensors get room exactly where the checkpoint has them, so that none is
    reported missing from a checkpoint without.
    """

    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: RTLynxConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Only read where a tensor has another shape than its room: then the rank is the checkpoint's, whoever wrote the checkpoint.
        self.pre_quantized = True
        self._checkpoint_keys: frozenset[str] = frozenset()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a diffusers that does not tell which tensors a checkpoint has, and one that cannot load onto the meta device."""
        if not hasattr(DiffusersQuantizer, "maybe_update_loaded_keys"):
            raise InvalidArgumentError("RTLynxConfig", "diffusers", diffusers.__version__, "0.39 or newer (rtlynx.apply takes older ones)")
        if importlib.util.find_spec("accelerate") is None:
            raise InvalidArgumentError("RTLynxConfig", "accelerate", "none installed", "one: diffusers needs it for this way of loading")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember which tensors the checkpoint has."""
        self._checkpoint_keys = frozenset(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        apply(model, self.quantization_config.sparsity)
        layers = sparse_layers(model)
        _check_compact(self._checkpoint_keys, layers, self.quantization_config.sparsity)
        for name, layer in layers.items():
            layer.discard_prepared()  # there is no weight yet to make it from, and nothing in the checkpoint to fill it with
            if name + _COMPACT in self._checkpoint_keys:
                layer.become_compact(f"{name}.compact_fitted" in self._checkpoint_keys)
            for tensor, shape in _shapes(layer, self.quantization_config.sparsity.rank).items():
                if f"{name}.{tensor}" in self._checkpoint_keys and tensor != "weight":
                    _set(layer, tensor, torch.empty(shape, dtype=_BUFFERS.get(tensor, layer.compute_dtype), device="meta"))
        return model

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        """Whether it is a compensation tensor, or the weight of a compact layer; other weights load as in any model."""
        layer, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(layer)
        return isinstance(module, SparseLinear) and tensor in _shapes(module, 0)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str | int,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Set one such tensor in the checkpoint's own shape."""
        layer, _, tensor = param_name.rpartition(".")
        # `param_value` has been cast to the model's dtype, but selection reads a float32 shift and whole numbers.
        value = state_dict[param_name].to(_BUFFERS[tensor]) if tensor in _BUFFERS else param_value
        _set(model.get_submodule(layer), tensor, value.to(target_device))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._checkpoint_keys = frozenset()
        sparsity: SparsityConfig = self.quantization_config.sparsity
        layers = sparse_layers(model)
        for name, layer in layers.items():
            _check_compensation(name, layer)
        if any(unsupported(layer, sparsity.precision) for layer in layers.values()):  # only now are device and dtype what they will be
            apply(model, sparsity)
        for name, layer in sparse_layers(model).items():
            prepared = {'selection="weight"': layer.selection == "weight", 'precision="fp8"': layer.precision == "fp8"}
            if layer.weight.is_meta and any(prepared.values()):
                what = " and ".join(setting for setting, used in prepared.items() if used)
                got = f"one that offloads {name}"
                raise InvalidArgumentError("RTLynxConfig", "device_map", got, f"whole layers on a device, for {what}")
            if layer.is_compact:
                layer.computes_in(model.dtype)
                layer.take_values_scale()
            layer.derived = Derived.of(layer)
            layer.update_prepared()
        install_bias_groups(model)
        model.register_to_config(quantization_config=AppliedConfig(model, sparsity))
        model.is_quantized = False  # its weights are plain: casts and fused projections, which this would refuse, work
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        """For ``model.dequantize()``: `rtlynx.remove`."""
        return remove(model)

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


_BUFFERS = {
    "shift": torch.float32,
    "permutation": torch.int64,
    "score": torch.float32,
    "compact_scale": torch.float32,
    "compact_values_scale": torch.float32,
    "compact_fitted": torch.uint8,
}
"""Tensors that are buffers, with dtypes of their own."""


def _shapes(layer: SparseLinear, rank: int) -> dict[str, tuple[int, ...]]:
    """Compensation tensor → its shape, of those this layer may have."""
    k, n = layer.in_features, layer.out_features
    branch: dict[str, tuple[int, ...]] = {} if layer.branch == "none" else {"comp_down": (k, rank), "comp_up": (n, rank)}
    own = (
        {"weight": (n, k), "compact_scale": (n,), "compact_values_scale": (1,), "compact_fitted": (1,), "score": (k,)}
        if layer.is_compact
        else {"sparse_weight": (n, k)}
    )
    return {**branch, **own, "comp_bias": (n,), "shift": (k,), "permutation": (k,)}


def _set(layer: nn.Module, tensor: str, value: Tensor) -> None:
    setattr(layer, tensor, value if tensor in _BUFFERS else nn.Parameter(value, requires_grad=False))


_COMPACT = ".compact_scale"


def _check_compact(checkpoint: Collection[str], layers: Mapping[str, SparseLinear], config: SparsityConfig) -> None:
    """Refuse a configuration under which layers that are compact in the checkpoint would not be, or have no weight for what it asks.

    Raises:
        InvalidArgumentError: It would leave one dense, multiply in another precision, or have dense steps where its weight was fitted.
    """
    for name in sorted(key.removesuffix(_COMPACT) for key in checkpoint if key.endswith(_COMPACT)):
        precision = layers[name].precision if name in layers else None
        got = None
        if precision != "fp8":
            got = f"{name} {'dense' if precision is None else f'with precision={precision!r}'}"
        elif f"{name}.compact_fitted" in checkpoint and config.multiplies_densely:
            got = f"dense steps or adaln_shift, for which {name} has no weight"
        if got is not None:
            raise InvalidArgumentError("RTLynxConfig", "sparsity", got, "the checkpoint's own configuration: that layer is compact there")


def _check_compensation(name: str, layer: SparseLinear) -> None:
    """Refuse a checkpoint whose compensation tensors do not fit each other or the layer.

    Raises:
        CompensationMismatchError: One of a pair is absent, a shape is wrong, or a tensor was left out while loading.
    """
    problem = branch_problem(layer, layer.branch, layer.comp_down, layer.comp_up)
    if problem is not None:
        got, expected = problem
        raise _mismatch(f"{name}: the checkpoint's comp_down and comp_up: got {got}, expected {expected}", got, expected)
    needed_by = {"shift": "comp_bias"} if layer.is_compact else {"shift": "comp_bias", "permutation": "sparse_weight"}
    if layer.weight.dtype is not E4M3 and layer.is_compact:
        got = "compact_scale without an e4m3 weight"
        raise _mismatch(f"{name}: the checkpoint has {got}", got, "both")
    for needs, needed in needed_by.items():
        if getattr(layer, needs) is not None and getattr(layer, needed) is None:
            raise _mismatch(f"{name}: the checkpoint has {needs} without {needed}", f"{needs} without {needed}", "both")
    for tensor, shape in _shapes(layer, layer.rank).items():
        value: Tensor | None = getattr(layer, tensor)
        if value is None:
            continue
        if tensor == "comp_bias":
            shape = bias_shape(layer, value)
        if value.shape != shape:
            got = f"shape {tuple(value.shape)}"
            raise _mismatch(f"{name}: the checkpoint's {tensor} has {got}, expected {shape}", got, f"shape {shape}")
        if value.is_meta and not layer.weight.is_meta:
            message = f"{name}: the checkpoint's {tensor} was not loaded; do not pass ignore_mismatched_sizes"
            raise _mismatch(message, f"no {tensor}", f"a {tensor} of shape {shape}")


def _mismatch(message: str, got: str, expected: str) -> CompensationMismatchError:
    return CompensationMismatchError("RTLynxConfig", "checkpoint", got, expected, message)


AUTO_QUANTIZER_MAPPING[_Method.RTLYNX.value] = RTLynxQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[_Method.RTLYNX.value] = RTLynxConfig
