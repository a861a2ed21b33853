"""`Compensation`: what calibration fitted for one model, and the file it travels in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rtlynx.apply import applied_config, apply, remember_config
from rtlynx.config import SparsityConfig
from rtlynx.eligibility import candidates, sparse_layers, target_module
from rtlynx.errors import CompensationMismatchError, InvalidArgumentError
from rtlynx.fingerprint import check_fingerprint, fingerprint
from rtlynx.io import atomic_path
from rtlynx.version import __version__

_FORMAT = "rtlynx-compensation"
_FORMAT_VERSION = 1
_TENSORS = ("comp_down", "comp_up", "shift")


@dataclass(frozen=True)
class Compensation:
    """The branch (and shift) of every sparse layer of one model.

    Attributes:
        tensors: ``"<layer>.comp_down"`` ``(r, K)``, ``"<layer>.comp_up"`` ``(N, r)`` and, where there is one, ``"<layer>.shift"`` ``(K,)``.
        config: The configuration it was fitted under.
        layers: Name → digest of every layer it was made for (`rtlynx.fingerprint`), also those that got no branch.
    """

    tensors: Mapping[str, Tensor]
    config: SparsityConfig
    layers: Mapping[str, str]

    @property
    def method(self) -> str:
        """``"split"``, ``"paper"`` or ``"none"``: the name of ``config.branch`` in calibration."""
        return {"dropped": "split", "input": "paper", "none": "none"}[self.config.branch]

    @classmethod
    def from_model(cls, pipe_or_module: object) -> Compensation:
        """What a model's sparse layers hold now; tensors are the layers' own, not copies.

        Raises:
            InvalidArgumentError: `rtlynx.apply` was not called on the model.
        """
        root = target_module(pipe_or_module, "Compensation")
        config = applied_config(root)
        if config is None:
            raise InvalidArgumentError("Compensation", "pipe_or_module", "a model without sparse layers", "one given to rtlynx.apply")
        layers = sparse_layers(root)
        held = {f"{name}.{key}": getattr(layer, key) for name, layer in layers.items() for key in _TENSORS}
        return cls({key: value.detach() for key, value in held.items() if value is not None}, config, fingerprint(layers))

    def apply_to(self, pipe_or_module: object) -> None:
        """Give a model this compensation. A model without sparse layers is first given the configuration too.

        Layers that the model keeps dense on purpose are left alone.

        Raises:
            CompensationMismatchError: The model's sparse layers, their weights or their arithmetic are not those it was made for;
                the model is left unchanged.
        """
        root = target_module(pipe_or_module, "Compensation")
        config = applied_config(root)
        if config is None:
            check_fingerprint(self.layers, {c.name: c.module for c in candidates(root, self.config) if c.reason is None})
            apply(root, self.config)
        elif not config.same_arithmetic(self.config):
            raise CompensationMismatchError(f"made under {self.config}, but this model was applied with {config}")
        else:
            check_fingerprint(self.layers, sparse_layers(root))
            remember_config(root, replace(config, rank=self.config.rank))
        for name, layer in sparse_layers(root).items():
            layer.set_compensation(*(self.tensors.get(f"{name}.{key}") for key in _TENSORS))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; configuration and digests travel in its metadata. The file is complete or absent."""
        metadata = {
            "format": _FORMAT,
            "format_version": str(_FORMAT_VERSION),
            "rtlynx_version": __version__,
            "method": self.method,
            "config": json.dumps(self.config.to_dict()),
            "layers": json.dumps(dict(self.layers)),
        }
        with atomic_path(path) as temporary:
            save_file({key: value.contiguous() for key, value in self.tensors.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Compensation:
        """Read a file that `save` wrote; tensors are on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            CompensationMismatchError: It is not a compensation file, or one of a newer format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CompensationMismatchError(f"{path} is not a safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise CompensationMismatchError(f"{path} is not a compensation file: its format is {metadata.get('format')!r}, not {_FORMAT!r}")
        if metadata["format_version"] != str(_FORMAT_VERSION):
            raise CompensationMismatchError(f"{path} has format version {metadata['format_version']}, this rtlynx reads {_FORMAT_VERSION}")
        config: dict[str, Any] = json.loads(metadata["config"])
        return cls(tensors, SparsityConfig.from_dict(config), json.loads(metadata["layers"]))


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
