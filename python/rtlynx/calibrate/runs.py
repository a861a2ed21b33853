"""What calibration runs the model on: prompts through a pipeline, or the user's own callable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rtlynx.errors import InvalidArgumentError

Run = Callable[[], object]


def pipeline_runs(
    op: str,
    pipe: Any,
    prompts: str | Sequence[str] | None,
    run: Run | None,
    seed: int,
    batch_size: int,
    pipe_kwargs: dict[str, Any],
) -> list[Run]:
    """One callable per batch of prompts, or ``run`` alone; each does the same every time it is called.

    Raises:
        InvalidArgumentError: Not exactly one of ``prompts`` and ``run``, or what is given cannot be run.
    """
    if (prompts is None) == (run is None):
        raise InvalidArgumentError(op, "prompts and run", "both or neither", "one of them")
    if run is not None:
        if pipe_kwargs:
            raise InvalidArgumentError(op, "keyword arguments", ", ".join(pipe_kwargs), "none with `run`")
        return [run]
    if isinstance(pipe, nn.Module) or not callable(pipe):
        raise InvalidArgumentError(op, "prompts", "prompts for a bare module", "a pipeline, or `run`")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not prompts or batch_size < 1:
        raise InvalidArgumentError(op, "prompts", f"{len(prompts)} prompts in batches of {batch_size}", "at least one of each")
    accepted = inspect.signature(pipe.__call__).parameters
    defaults = {key: value for key, value in {"output_type": "latent"}.items() if key in accepted}  # images are not needed

    def one(first: int) -> Run:
        def call() -> object:
            generator = torch.Generator().manual_seed(seed + first)
            return pipe(prompt=prompts[first : first + batch_size], **{"generator": generator, **defaults, **pipe_kwargs})

        return call

    return [one(first) for first in range(0, len(prompts), batch_size)]


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Switch off a diffusers pipeline's own progress bar inside the block: one bar at a time."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
