"""What commands that run a pipeline have in common: loading it, reading prompts, choosing a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rtlynx.errors import InvalidArgumentError

DEMO = "demo"
"""Stands for the model that ships with the package."""


def load_pipeline(model: str, device: str, dtype: str) -> Any:
    """A pipeline from the Hugging Face hub or a folder, on a device.

    Args:
        model: A name on the hub, a folder, or ``"demo"``.
        device: ``"auto"``: the first GPU, else the CPU.
        dtype: ``"auto"``: bfloat16 on a GPU, float32 on the CPU.

    Raises:
        InvalidArgumentError: Not a dtype.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InvalidArgumentError("load", "dtype", dtype, "auto, bfloat16, float16 or float32")
    from rtlynx.demo.pipeline import DEFAULT_WEIGHTS, ScenesPipeline

    folder = DEFAULT_WEIGHTS if model == DEMO else Path(model)
    if _draws_scenes(model):
        return ScenesPipeline.from_pretrained(folder).to(device, getattr(torch, dtype))
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)


def read_prompts(file: Path | None, model: str, count: int, seed: int = 0) -> list[str]:
    """Prompts, one a line, empty lines left out; without a file, captions of the demo's world for a model of it.

    Raises:
        InvalidArgumentError: There are none.
    """
    if file is not None:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise InvalidArgumentError("prompts", "file", f"{file} without a line", "one prompt a line")
        return prompts[:count]
    if not _draws_scenes(model):
        raise InvalidArgumentError("prompts", "--prompts", "nothing", "a file with one prompt a line, typical of the model's use")
    import torch

    from rtlynx.demo.captions import caption
    from rtlynx.demo.scenes import random_scenes

    return caption(random_scenes(count, torch.Generator().manual_seed(seed)))


def _draws_scenes(model: str) -> bool:
    """Whether a model is the demo's, or one that `rtlynx.demo.train` made."""
    index = Path(model) / "model_index.json"
    return model == DEMO or (index.is_file() and json.loads(index.read_text()).get("_class_name") == "ScenesPipeline")
