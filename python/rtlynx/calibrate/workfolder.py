"""`WorkFolder`: layers that are solved already, beside the file in the making, so that an interrupted calibration or search goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rtlynx.calibrate.fit import Tensors
from rtlynx.errors import InvalidArgumentError
from rtlynx.io import atomic_path

_SETTINGS = "settings.json"
_EMPTY = "empty"
"""safetensors wants a tensor in a file, also where no layer got one."""
_LAYERS = "layers"
_OF = "/"
"""Between the name of a layer and that of its tensor: names have no slash."""


def described(arguments: Mapping[str, object]) -> list[tuple[str, str]]:
    """Arguments of a pipeline as settings: the same text for the same values, whichever objects hold them."""
    return sorted((key, _described(value)) for key, value in arguments.items())


def _described(value: object) -> str:
    if isinstance(value, torch.Generator):
        return f"generator, seed {value.initial_seed()}"
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if hasattr(value, "tobytes"):  # an array or a picture
        size = getattr(value, "shape", None) or getattr(value, "size", None)
        return f"{size}, {hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    if isinstance(value, (list, tuple)):
        return str([_described(item) for item in value])
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class WorkFolder:
    """One file for all layers that were solved together in ``<output>.work``; every file is complete or absent.

    So layers that read one tensor are solved all or not at all: what is found for them fits together.

    Args:
        output: The file in the making.
        settings: Everything the result depends on, JSON-able.
        op: Who asks, for the message of an error.

    Raises:
        InvalidArgumentError: The folder holds layers that were solved under other settings.
    """

    def __init__(self, output: str | os.PathLike[str], settings: dict[str, Any], op: str = "calibrate") -> None:
        self.folder = Path(f"{os.fspath(output)}.work")
        path = self.folder / _SETTINGS
        text = json.dumps(settings, indent=1, sort_keys=True)
        if self._files() and path.is_file() and path.read_text() != text:
            expected = "the settings of the interrupted run, or no such folder: remove it to start anew"
            raise InvalidArgumentError(op, "output", f"{self.folder} of a run with other settings", expected)
        with atomic_path(path) as temporary:
            temporary.write_text(text)

    def load(self) -> dict[str, Tensors]:
        """Layers that were solved, by name."""
        return {layer: tensors for solved in self.rounds() for layer, tensors in solved.items()}

    def rounds(self) -> Iterator[dict[str, Tensors]]:
        """The same, those together that were solved together."""
        for path in self._files():
            with safe_open(path, framework="pt") as file:
                found: dict[str, Tensors] = {layer: {} for layer in json.loads(file.metadata()[_LAYERS])}
                for key in set(file.keys()) - {_EMPTY}:
                    layer, _, name = key.partition(_OF)
                    found[layer][name] = file.get_tensor(key)
            yield found

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[!.]*.safetensors"))

    def save(self, solved: Mapping[str, Tensors]) -> None:
        """Write layers that were solved together."""
        # Copies, since layers that select together share some, which safetensors refuses.
        tensors = {f"{layer}{_OF}{name}": tensor.clone() for layer, mine in solved.items() for name, tensor in mine.items()}
        with atomic_path(self.folder / f"{next(iter(solved))}.safetensors") as temporary:
            save_file(tensors or {_EMPTY: torch.zeros(0)}, temporary, {_LAYERS: json.dumps(list(solved))})

    def remove(self) -> None:
        """The output is written: nothing of this is needed any more."""
        shutil.rmtree(self.folder)
