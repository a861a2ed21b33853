"""Dense steps: the start and the end of sampling can be left to the dense model (`SparsityConfig.dense_first` and ``dense_last``).

A step is told by what the transformer is told: its timestep, which the recipe's `Clock` reads as the share of noise in the picture, 1 at
the start and 0 at the end. With evenly spaced noise levels ``dense_last=0.1`` is the last tenth of the steps. Schedules that are shifted
towards noise, as FLUX.1's are at high resolution, spend more steps near 1: with a shift of s a share u of the steps is over when the noise
level is s(1 - u) / (1 + (s - 1)(1 - u)).

A hook decides before the transformer runs. Compiled models keep it outside their graphs and have two versions of each, dense and sparse.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.config import SparsityConfig
from rtlynx.eligibility import sparse_layers
from rtlynx.errors import InvalidArgumentError
from rtlynx.recipes import GENERIC, find_recipe

logger = logging.getLogger("rtlynx")

_HOOK, _NOW = "rtlynx_dense_steps", "rtlynx_dense_now"
"""Attributes of the transformer: its hook's handle, and whether the last step was dense."""
_ROUNDING = 2.0**-9
"""What bfloat16 may move a noise level by."""


def install_dense_steps(root: nn.Module, config: SparsityConfig | None) -> None:
    """Let the sparse layers of ``root`` compute densely at the steps ``config`` says, at none with None.

    Raises:
        InvalidArgumentError: The model's forward does not take the argument that its recipe reads the time from.
    """
    handle = root.__dict__.pop(_HOOK, None)
    if handle is not None:
        handle.remove()
        _switch(root, False)
    root.__dict__.pop(_NOW, None)
    if config is not None and (config.dense_first or config.dense_last):
        check_clock(root, config)
        warn_of_a_guess(root, "dense steps")
        hook = functools.partial(_before_step, first=config.dense_first, last=config.dense_last)
        root.__dict__[_HOOK] = root.register_forward_pre_hook(hook, with_kwargs=True)


def check_clock(root: nn.Module, config: SparsityConfig) -> None:
    """Refuse dense steps for a model that is not told the time.

    Raises:
        InvalidArgumentError: Its forward does not take the argument that its recipe reads the time from.
    """
    if config.dense_first or config.dense_last:
        check_time(root, "dense steps")


def check_time(root: nn.Module, wanted: str, op: str = "apply", argument: str = "config") -> None:
    """Refuse what depends on the time for a model that is not told it.

    Args:
        root: The model.
        wanted: What is asked for.
        op: For the message: who was asked, and in which argument.
        argument: Likewise.

    Raises:
        InvalidArgumentError: Its forward does not take the argument that its recipe reads the time from.
    """
    time = find_recipe(root).clock.argument
    if time not in inspect.signature(root.forward).parameters:
        raise InvalidArgumentError(op, argument, f"{wanted} for {type(root).__name__}", f"a model whose forward takes {time!r}")


def warn_of_a_guess(root: nn.Module, what: str) -> None:
    """Log a warning where no recipe says how ``root`` is told the time, which ``what`` depends on."""
    if find_recipe(root) is GENERIC:
        message = "%s: no recipe says how %s is told the time; its timestep is taken to go from %g (noise) to %g (picture)"
        logger.warning(message, what, type(root).__name__, GENERIC.clock.noise, GENERIC.clock.picture)


def is_dense(noise_level: float, first: float, last: float) -> bool:
    """Whether the step that starts at a noise level is among the first or the last share of the way."""
    return noise_level > 1 - first + _ROUNDING or noise_level < last + _ROUNDING * (last > 0)


# Reading the time waits for the device, which no graph can do.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_step(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: float, last: float) -> None:
    level = noise_level(root, args, kwargs)
    if level is None:
        return
    now = is_dense(level, first, last)
    if now != root.__dict__.get(_NOW, False):
        root.__dict__[_NOW] = now
        _switch(root, now)


def noise_level(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The highest noise level in a call of ``root``; None where it cannot be read: on the meta device, while a CUDA graph is captured.

    Video models may give every token a time of its own: what is generated has the highest, what is given has none.
    """
    levels = noise_levels(root, args, kwargs)
    if levels is None or levels.is_meta or (levels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return float(levels.max())


def noise_levels(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """All noise levels in a call of ``root``, float32, where its timestep is; None where it was given none."""
    clock = find_recipe(root).clock
    time = kwargs[clock.argument] if clock.argument in kwargs else _positional(root, args, clock.argument)
    if time is None:
        return None
    return (torch.as_tensor(time).detach().float() - clock.picture) / (clock.noise - clock.picture)


def _positional(root: nn.Module, args: tuple[Any, ...], argument: str) -> Any:
    position = list(inspect.signature(root.forward).parameters).index(argument)
    return args[position] if position < len(args) else None


def _switch(root: nn.Module, dense: bool) -> None:
    for layer in sparse_layers(root).values():
        layer.dense_step = dense
