"""`WorkFolder`: layers that are solved already, beside the file in the making, so that an interrupted calibration or search goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
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
        if path.is_file() and path.read_text() != text:
            expected = "the settings of the interrupted run, or no such folder: remove it to start anew"
            raise InvalidArgumentError(op, "output", f"{self.folder} of a run with other settings", expected)
        with atomic_path(path) as temporary:
            temporary.write_text(text)

    def load(self) -> dict[str, Tensors]:
        """Layers that were solved, by name."""
        found: dict[str, Tensors] = {}
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {layer: {} for layer in json.loads(file.metadata()[_LAYERS])}
                for key in set(file.keys()) - {_EMPTY}:
                    layer, _, name = key.partition(_OF)
                    found[layer][name] = file.get_tensor(key)
        return found

    def save(self, solved: Mapping[str, Tensors]) -> None:
        """Write layers that were solved together."""
        # Copies, since layers that select together share some, which safetensors refuses.
        tensors = {f"{layer}{_OF}{name}": tensor.clone() for layer, mine in solved.items() for name, tensor in mine.items()}
        with atomic_path(self.folder / f"{next(iter(solved))}.safetensors") as temporary:
            save_file(tensors or {_EMPTY: torch.zeros(0)}, temporary, {_LAYERS: json.dumps(list(solved))})

    def remove(self) -> None:
        """The output is written: nothing of this is needed any more."""
        shutil.rmtree(self.folder)
