"""`Processes`: one calibration by several processes, usually one per GPU.

Each runs the dense model on its share of the prompts, the samples of an input meet where it is solved, and every process ends with all of
the compensation. They find each other through torch.distributed: initialised by the user, or by accelerate in a script that
``accelerate launch`` or ``torchrun`` started. All of them must be given the same model and the same arguments.
"""

from __future__ import annotations

import atexit
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rtlynx.errors import DistributedError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and the others.

    Attributes:
        rank: Its number, from 0 on.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def present(cls) -> Processes:
        """Those that torch.distributed knows; those that a launcher started, if accelerate is there to join them; else this one alone."""
        if not dist.is_available():
            return ALONE
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if launched and not dist.is_initialized() and importlib.util.find_spec("accelerate") is not None:
            from accelerate import PartialState

            state = PartialState()  # joins the others, and makes this process's GPU the current one
            atexit.register(state.destroy_process_group)
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE

    @property
    def main(self) -> bool:
        """Whether it is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `count`-th of the items, beginning with the `rank`-th."""
        return list(items[self.rank :: self.count])

    def exchange(self, mine: T) -> list[T]:
        """What every process gave, by rank; anything that can be pickled."""
        if self.count == 1:
            return [mine]
        everyones: list[Any] = [None] * self.count
        dist.all_gather_object(everyones, mine)
        return everyones

    def all(self, work: Callable[[], T]) -> list[T]:
        """Do ``work`` here and get what it returned in every process, by rank.

        Raises:
            DistributedError: It failed in another process. Where it failed, its own error is raised: nobody waits for one that is gone.
        """
        if self.count == 1:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        outcomes = self.exchange((result, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise DistributedError(f"calibrate: process {rank} of {self.count} failed: {message}")
        return [outcome for outcome, _ in outcomes]  # type: ignore[misc]  # nobody failed

    def gather(self, rows: Tensor, owner: int) -> Tensor | None:
        """The rows of all processes, those of rank 0 first, at ``owner``, on the device they were on; None elsewhere.

        They may be of different number, but must be of one dtype and alike in their other dimensions.
        """
        if self.count == 1:
            return rows
        counts = self.exchange(len(rows))
        device = _device()
        # As bytes: not every backend sends every dtype.
        mine = rows.to(device).contiguous().view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
        mine = F.pad(mine, (0, 0, 0, max(counts) - len(rows)))
        parts = [torch.empty_like(mine) for _ in counts] if self.rank == owner else None
        dist.gather(mine, parts, dst=owner)
        if parts is None:
            return None
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        return whole.view(rows.dtype).view(sum(counts), *rows.shape[1:]).to(rows.device)


ALONE = Processes()
"""A process without others."""


def _device() -> torch.device:
    """Where tensors must be to be sent."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in str(dist.get_backend()) else torch.device("cpu")
