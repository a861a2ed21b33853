"""Calibration by two processes: on the CPU over gloo, started as torch.distributed's users start them, and as launchers do."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rtlynx
from rtlynx import Compensation, InvalidArgumentError, SparsityConfig
from rtlynx.calibrate.processes import ALONE, Processes
from rtlynx.demo.captions import caption
from rtlynx.demo.scenes import random_scenes
from rtlynx.errors import DistributedError
from rtlynx.evaluate.layers import layer_errors
from tiny_pipeline import tiny_pipeline

CONFIG = SparsityConfig(rank=16, small_m="sparse")
OPTIONS: dict[str, Any] = {"selection": ("shift",), "bias": 2, "num_inference_steps": 4, "progress": False}


def prompts(count: int, seed: int = 0) -> list[str]:
    return caption(random_scenes(count, torch.Generator().manual_seed(seed)))


def started(work: Any, *args: Any, launched: bool = False) -> None:
    """Run ``work(rank, *args)`` in two processes that are one group; ``launched``: they only have the variables that launchers set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, launched, work, args), nprocs=2)  # type: ignore[no-untyped-call]


def _process(rank: int, port: int, launched: bool, work: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in launcher.items()}, ACCELERATE_USE_CPU="true")
    if not launched:
        dist.init_process_group("gloo")
    work(rank, *args)
    dist.destroy_process_group()


def test_alone_nothing_is_shared() -> None:
    assert Processes.present() is ALONE and ALONE.main
    rows = torch.ones(3, 2)
    assert ALONE.gather(rows, 0) is rows and ALONE.exchange(1) == ALONE.all(lambda: 1) == [1] and ALONE.share([1, 2, 3]) == [1, 2, 3]


def _parts(rank: int) -> None:
    processes = Processes.present()
    assert processes == Processes(rank, 2) and processes.main is (rank == 0)
    assert processes.share(range(5)) == [[0, 2, 4], [1, 3]][rank] and processes.exchange(rank) == [0, 1]
    for dtype in (torch.bfloat16, torch.float32, torch.int32):
        for owner in (0, 1):
            rows = torch.full((3 * rank, 2, 5), rank + 1, dtype=dtype)  # the first has none
            got = processes.gather(rows, owner)
            assert (got is not None) is (rank == owner)
            if got is not None:
                assert torch.equal(got, torch.full((3, 2, 5), 2, dtype=dtype))

    def fail() -> None:
        if rank == 1:
            raise ValueError("out of tea")

    with pytest.raises(ValueError if rank else DistributedError, match="out of tea"):
        processes.all(fail)


def test_what_processes_give_each_other() -> None:
    started(_parts)


def _calibrate(rank: int, folder: Path, launched: bool) -> None:
    pipe = rtlynx.apply(tiny_pipeline(), CONFIG)
    path = folder / "shared.safetensors"
    # So little memory that two passes are needed, and an odd number of runs.
    found = rtlynx.calibrate(pipe, prompts(7), output=path, memory=8192 * 600 * 4 if launched else None, **OPTIONS)
    assert path.exists() and not path.with_name(f"{path.name}.work").exists()
    found.save(folder / f"{rank}.safetensors")


@pytest.mark.parametrize("launched", [False, True])
def test_all_get_the_same_and_it_is_as_good_as_one_processs(launched: bool, tmp_path: Path) -> None:
    started(_calibrate, tmp_path, launched, launched=launched)
    files = [Compensation.load(tmp_path / f"{name}.safetensors") for name in ("shared", 0, 1)]
    for other in files[1:]:
        assert other.tensors.keys() == files[0].tensors.keys()
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in files[0].tensors.items())

    def error(pipe: Any) -> float:
        found = layer_errors(pipe, pipe.transformer, prompts(4, seed=1), steps=4, seed=9)
        return sum(found.values()) / len(found)

    single, plain = (rtlynx.apply(tiny_pipeline(), CONFIG) for _ in range(2))
    rtlynx.calibrate(single, prompts(7), **OPTIONS)
    shared = tiny_pipeline()
    files[0].apply_to(shared)
    assert error(shared) == pytest.approx(error(single), rel=0.02) and error(shared) < 0.9 * error(plain)


class Watched(nn.Module):
    """A model whose second layer may be called or not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.second(self.first(x)) if both else self.first(x)  # type: ignore[no-any-return]


def _fail(rank: int, folder: Path) -> None:
    def fresh() -> nn.Module:
        return rtlynx.apply(Watched(), SparsityConfig(include=("**",), rank=16))

    def refused(error: type[Exception], piece: str, model: nn.Module, **options: Any) -> None:
        with pytest.raises(error, match=piece):
            rtlynx.calibrate(model, **{"progress": False, **options})
        assert model.first.comp_down is None and not model.first.dense and not model.first._forward_pre_hooks

    model = fresh()
    x = torch.randn(300, 64)
    poisoned = x.clone().fill_(torch.nan if rank == 1 else 1)
    refused(InvalidArgumentError if rank else DistributedError, "NaN or infinity", model, run=lambda: model(poisoned))
    refused(InvalidArgumentError, "call different layers", model, run=lambda: model(x, both=rank == 0))
    (folder / "a.safetensors.work").mkdir(exist_ok=True)
    if rank == 0:
        (folder / "a.safetensors.work" / "settings.json").write_text("{}")
        (folder / "a.safetensors.work" / "first.safetensors").touch()  # without layers that are solved nothing is refused
    kinds = (InvalidArgumentError, DistributedError)
    refused(kinds[rank], "other settings", model, run=lambda: model(x), output=folder / "a.safetensors")
    with torch.no_grad():
        model.first.weight += rank  # type: ignore[operator]
    refused(InvalidArgumentError, "other weights in another process", model, run=lambda: model(x))
    pipe = rtlynx.apply(tiny_pipeline(), CONFIG)
    with pytest.raises(InvalidArgumentError, match="1 batches of prompts for 2 processes"):
        rtlynx.calibrate(pipe, ["a red circle"], progress=False)


def test_when_one_fails_all_do_and_none_waits(tmp_path: Path) -> None:
    started(_fail, tmp_path)
