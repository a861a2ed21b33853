"""`WorkFolder`: layers that are solved already, beside the file in the making, so that an interrupted calibration goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rtlynx.calibrate.fit import Tensors
from rtlynx.errors import InvalidArgumentError
from rtlynx.io import atomic_path

_SETTINGS = "settings.json"
_EMPTY = "empty"
"""A layer without compensation still leaves a file, and safetensors wants a tensor in it."""


class WorkFolder:
    """One file per solved layer in ``<output>.work``; every file is complete or absent.

    Args:
        output: The file in the making.
        settings: Everything the result depends on, JSON-able.

    Raises:
        InvalidArgumentError: The folder holds layers that were solved under other settings.
    """

    def __init__(self, output: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.folder = Path(f"{os.fspath(output)}.work")
        path = self.folder / _SETTINGS
        text = json.dumps(settings, indent=1, sort_keys=True)
        if path.is_file() and path.read_text() != text:
            expected = "the settings of the interrupted run, or no such folder: remove it to start anew"
            raise InvalidArgumentError("calibrate", "output", f"{self.folder} of a run with other settings", expected)
        with atomic_path(path) as temporary:
            temporary.write_text(text)

    def load(self) -> dict[str, Tensors]:
        """Layers that were solved, by name."""
        found = {path.stem: load_file(path) for path in sorted(self.folder.glob("[!.]*.safetensors"))}
        return {name: {key: value for key, value in tensors.items() if key != _EMPTY} for name, tensors in found.items()}

    def save(self, name: str, tensors: Tensors) -> None:
        """Write one solved layer."""
        with atomic_path(self.folder / f"{name}.safetensors") as temporary:
            save_file(tensors or {_EMPTY: torch.zeros(0)}, temporary)

    def remove(self) -> None:
        """The output is written: nothing of this is needed any more."""
        shutil.rmtree(self.folder)
