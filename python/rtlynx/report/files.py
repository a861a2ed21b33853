"""Result files, each written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from PIL import Image

from rtlynx.io import atomic_path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as JSON every parser reads: infinities and NaN, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_image(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write ``image`` in the format its suffix names."""
    with atomic_path(path) as temporary:
        image.save(temporary)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
