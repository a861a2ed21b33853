"""`Compensation`: what calibration fitted for one model, and the file it travels in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rtlynx.apply import applied_config, applied_modules, apply, remember_config
from rtlynx.bias_groups import install_bias_groups
from rtlynx.compacted import refuse_compact
from rtlynx.config import SparsityConfig
from rtlynx.dense_steps import check_time
from rtlynx.derived import only_permuted
from rtlynx.eligibility import all_sparse_layers, candidates, target_modules
from rtlynx.errors import CompensationMismatchError, InvalidArgumentError
from rtlynx.fingerprint import check_fingerprint, fingerprint
from rtlynx.io import atomic_path
from rtlynx.layer_shapes import check_compensation
from rtlynx.layerwise_casting import refuse_stored
from rtlynx.version import __version__

_FORMAT = "rtlynx-compensation"
_FORMAT_VERSION = 2
"""2: comp_down is ``(K, r)`` (1 had its transpose), and every tensor of `SparseLinear.set_compensation` may be there."""
_TENSORS = ("comp_down", "comp_up", "comp_bias", "sparse_weight", "shift", "permutation")
_SCALE = "values_scale"
"""As a tensor of one element, where it is not 1."""


@dataclass(frozen=True)
class Compensation:
    """What calibration found for every sparse layer of one model.

    Attributes:
        tensors: ``"<layer>.<name>"`` (``"transformer_2.<layer>.<name>"`` in a pipeline's second transformer) with the arguments of
            `SparseLinear.set_compensation` that a layer has: ``comp_down`` ``(K, r)``, ``comp_up`` ``(N, r)``, ``comp_bias`` ``(N,)``
            or ``(G, N)``, ``shift`` ``(K,)``, ``permutation`` ``(K,)``, ``sparse_weight`` ``(N, K)``, ``values_scale`` ``(1,)`` float32.
        config: The configuration it was fitted under.
        layers: Name → digest of every layer it was made for (`rtlynx.fingerprint`), also those that got no branch.
        made_with: Settings and versions of the calibration, for the record; empty where they are not known.
    """

    tensors: Mapping[str, Tensor]
    config: SparsityConfig
    layers: Mapping[str, str]
    made_with: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """What fitted it: one of `rtlynx.calibrate.METHODS`. Where that is not known, the one that suits ``config.branch``."""
        return str(self.made_with.get("method") or {"dropped": "split", "input": "paper", "none": "plain"}[self.config.branch])

    @classmethod
    def from_model(cls, pipe_or_module: object) -> Compensation:
        """What a model's sparse layers hold now; tensors are the layers' own, not copies.

        Raises:
            InvalidArgumentError: `rtlynx.apply` was not called on the model, or differently on each of two, or `rtlynx.compact` was: what
                it was made for can no longer be told.
        """
        modules, config = applied_modules(pipe_or_module, "Compensation")
        layers = all_sparse_layers(modules)
        refuse_compact("Compensation", layers, "layers that have their weights: save it before rtlynx.compact")
        held = {f"{name}.{key}": getattr(layer, key) for name, layer in layers.items() for key in _TENSORS}
        for name, layer in layers.items():
            if only_permuted(layer):  # `set_compensation` makes it again
                del held[f"{name}.sparse_weight"]
            if layer.values_scale != 1:
                held[f"{name}.{_SCALE}"] = torch.tensor([layer.values_scale])
        return cls({key: value.detach() for key, value in held.items() if value is not None}, config, fingerprint(layers))

    def apply_to(self, pipe_or_module: object) -> None:
        """Give a model this compensation. A model without sparse layers is first given the configuration too.

        Layers that the model keeps dense on purpose are left alone.

        Raises:
            CompensationMismatchError: The model's sparse layers, their weights or their arithmetic are not those it was made for;
                the model is left unchanged.
            InvalidArgumentError: It has a bias per group of timesteps, and the model is not told the time. Or a layer is compact: its
                weight cannot be compared with the one that this was made for. Or layerwise casting stores its weight in 8 bits, and this
                was made for the one before.
        """
        modules = target_modules(pipe_or_module, "Compensation")
        refuse_compact("Compensation", all_sparse_layers(modules), "layers that have their weights: load it before rtlynx.compact")
        applied = {prefix: (root, config) for prefix, root in modules.items() if (config := applied_config(root)) is not None}
        if not applied:
            modules = {prefix: root for prefix, root in modules.items() if not prefix or any(n.startswith(prefix) for n in self.layers)}
            wanted = {prefix: [c for c in candidates(root, self.config) if c.reason is None] for prefix, root in modules.items()}
            layers = {prefix + c.name: c.module for prefix, found in wanted.items() for c in found}
            check_fingerprint(self.layers, layers)
            self._check_tensors(layers)
            self._check_time(modules)
            for root in modules.values():
                apply(root, self.config)
        else:
            modules = {prefix: root for prefix, (root, _) in applied.items()}
            for _, config in applied.values():
                if not config.same_arithmetic(self.config):
                    message = f"made under {self.config}, but this model was applied with {config}"
                    got, expected = f"a model applied with {config}", f"one applied with {self.config}"
                    raise CompensationMismatchError("Compensation", "pipe_or_module", got, expected, message)
            present = all_sparse_layers(modules)
            try:
                check_fingerprint(self.layers, present)
            except CompensationMismatchError:  # rounded to 8 bits, no weight is the one that it was
                refuse_stored("Compensation", present)
                raise
            self._check_tensors(present)
            self._check_time(modules)
            for root, config in applied.values():
                remember_config(root, replace(config, rank=self.config.rank, ranks=self.config.ranks))
        for name, layer in all_sparse_layers(modules).items():
            layer.set_compensation(**self._of(name))
        for root in modules.values():
            install_bias_groups(root)

    def _of(self, name: str) -> dict[str, Any]:
        """The arguments of `SparseLinear.set_compensation` for one layer."""
        return {key: self.tensors.get(f"{name}.{key}") for key in _TENSORS} | {_SCALE: self.tensors.get(f"{name}.{_SCALE}", 1.0)}

    def _check_tensors(self, layers: Mapping[str, nn.Linear]) -> None:
        for name, layer in layers.items():
            try:
                check_compensation("Compensation", layer, self.config.branch, **self._of(name))
            except InvalidArgumentError as error:
                got = f"{error.got} for {error.argument} of {name}"
                message = f"does not fit layer {name}: {error.argument}: got {error.got}, expected {error.expected}"
                raise CompensationMismatchError("Compensation", "tensors", got, error.expected, message) from error

    def _check_time(self, modules: Mapping[str, nn.Module]) -> None:
        if any(name.endswith(".comp_bias") and tensor.dim() == 2 for name, tensor in self.tensors.items()):
            for root in modules.values():
                check_time(root, "a bias per group of timesteps", "Compensation", "pipe_or_module")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; configuration and digests travel in its metadata. The file is complete or absent."""
        metadata = {
            "format": _FORMAT,
            "format_version": str(_FORMAT_VERSION),
            "rtlynx_version": __version__,
            "method": self.method,
            "made_with": json.dumps(dict(self.made_with)),
            "config": json.dumps(self.config.to_dict()),
            "layers": json.dumps(dict(self.layers)),
        }
        with atomic_path(path) as temporary:
            save_file(_apart(self.tensors), temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Compensation:
        """Read a file that `save` wrote; tensors are on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            CompensationMismatchError: It is not a compensation file, or one of another format version.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise _unreadable(path, "no safetensors file", "a compensation file", f"is not a safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            found = f"{metadata.get('format')!r}"
            why = f"is not a compensation file: its format is {found}, not {_FORMAT!r}"
            raise _unreadable(path, f"format {found}", f"format {_FORMAT!r}", why)
        if (version := metadata.get("format_version")) != str(_FORMAT_VERSION):
            why = f"has format version {version}, this rtlynx reads {_FORMAT_VERSION}: make it again with rtlynx.calibrate"
            raise _unreadable(path, f"format version {version}", f"format version {_FORMAT_VERSION}", why)
        for name, tensor in tensors.items():
            if name.endswith(".comp_bias") and (tensor.dim() not in (1, 2) or not len(tensor)):
                got, shapes = f"{name} has shape {tuple(tensor.shape)}", "(N,) or (groups, N)"
                message = f"{path}: {got}, expected {shapes}"
                raise CompensationMismatchError("Compensation", "path", got, shapes, message)
        try:
            config, layers, made_with = (json.loads({"made_with": "{}", **metadata}[key]) for key in ("config", "layers", "made_with"))
        except (KeyError, json.JSONDecodeError) as error:
            why = (
                f"is damaged: its metadata has no {error}"
                if isinstance(error, KeyError)
                else f"is damaged: its metadata is no JSON: {error}"
            )
            raise _unreadable(path, "damaged metadata", "that of a compensation file", why) from error
        return cls(tensors, SparsityConfig.from_dict(config), layers, made_with)


def _unreadable(path: str | os.PathLike[str], got: str, expected: str, why: str) -> CompensationMismatchError:
    return CompensationMismatchError("Compensation", "path", got, expected, f"{path} {why}")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each in memory of its own: layers that select together share some, which safetensors refuses."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.contiguous() if tensor.data_ptr() not in seen else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.data_ptr())
    return apart


def save_compensation(pipe_or_module: object, path: str | os.PathLike[str]) -> None:
    """Save what a model's sparse layers hold now: ``Compensation.from_model(pipe_or_module).save(path)``."""
    Compensation.from_model(pipe_or_module).save(path)


def load_compensation(pipe_or_module: object, path: str | os.PathLike[str]) -> Compensation:
    """Load a file into a model: ``Compensation.load(path).apply_to(pipe_or_module)``.

    Returns:
        The compensation that was loaded.
    """
    compensation = Compensation.load(path)
    compensation.apply_to(pipe_or_module)
    return compensation
