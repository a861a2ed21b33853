"""Calibration by two processes with a GPU each, over NCCL."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import rtlynx
from rtlynx import Compensation, SparsityConfig
from rtlynx.demo.captions import caption
from rtlynx.demo.scenes import random_scenes
from rtlynx.evaluate.layers import layer_errors
from tiny_pipeline import tiny_pipeline

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CONFIG = SparsityConfig(rank=16, small_m="sparse")


def pipeline(device: str) -> Any:
    return rtlynx.apply(tiny_pipeline().to(device, torch.bfloat16), CONFIG)


def calibrated(pipe: Any, **options: Any) -> Compensation:
    prompts = caption(random_scenes(8, torch.Generator().manual_seed(0)))
    return rtlynx.calibrate(pipe, prompts, num_inference_steps=4, progress=False, **options)


def _calibrate(rank: int, port: int, folder: Path) -> None:
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in launcher.items()})
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    found = calibrated(pipeline(f"cuda:{rank}"), output=folder / "shared.safetensors")
    found.save(folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_both_get_the_same_and_it_is_as_good_as_one_gpus(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_calibrate, (port, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    files = [Compensation.load(tmp_path / f"{name}.safetensors") for name in ("shared", 0, 1)]
    for other in files[1:]:
        assert other.tensors.keys() == files[0].tensors.keys()
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in files[0].tensors.items())

    def error(pipe: Any) -> float:
        prompts = caption(random_scenes(4, torch.Generator().manual_seed(1)))
        found = layer_errors(pipe, pipe.transformer, prompts, steps=4, seed=9)
        return sum(found.values()) / len(found)

    single, plain, shared = (pipeline("cuda:0") for _ in range(3))
    calibrated(single)
    files[0].apply_to(shared)
    assert error(shared) == pytest.approx(error(single), rel=0.05)
    assert error(shared) < 0.9 * error(plain)
