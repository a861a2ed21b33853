"""A call's time is the device's, whatever the host does meanwhile."""

from __future__ import annotations

import time

import torch

from rtlynx.timing import time_interleaved


def test_a_slow_host_is_not_in_the_time_of_a_call() -> None:
    x = torch.zeros(1024, device="cuda")
    slept_ms = 1.0

    def call() -> None:
        time.sleep(slept_ms / 1000)
        x.add_(1)

    assert time_interleaved({"call": call}, repeats=5, warm_up=2)["call"] < slept_ms / 2
