"""Recipe files: a `SparsityConfig` as JSON, with what it was made for, that `rtlynx.apply` takes in place of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtlynx.config import SparsityConfig
from rtlynx.errors import InvalidArgumentError
from rtlynx.io import atomic_path
from rtlynx.version import __version__

_FORMAT = "rtlynx-recipe"


def write_recipe(path: str | os.PathLike[str], config: SparsityConfig, made_with: Mapping[str, Any] | None = None) -> None:
    """Write a configuration; the file is complete or absent.

    Args:
        path: Where.
        config: What `rtlynx.apply` will be given.
        made_with: How it was found, for the record; JSON-able.
    """
    content = {"format": _FORMAT, "rtlynx_version": __version__, "config": config.to_dict(), "made_with": dict(made_with or {})}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_recipe(path: str | os.PathLike[str]) -> SparsityConfig:
    """The configuration in a file that `write_recipe` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        InvalidArgumentError: It is not a recipe file, or its configuration is not valid.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError("apply", "config", f"{path}, which is not JSON ({error})", "a recipe file of rtlynx.search") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InvalidArgumentError("apply", "config", f"{path}, which is something else", f"a file whose format is {_FORMAT!r}")
    return SparsityConfig.from_dict(content["config"])
