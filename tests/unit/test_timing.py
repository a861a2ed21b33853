"""How calls are timed, on a device and a clock made up here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtlynx import timing

WRITE_MS, LAUNCH_MS, KERNEL_MS = 0.25, 0.01, 0.03


class Device:
    """A GPU that works through a queue while the host goes on; both have the time."""

    def __init__(self) -> None:
        self.host = self.device = self.held = 0.0
        self.writes = 0

    def enqueue(self, ms: float) -> None:
        self.host += LAUNCH_MS
        self.device = max(self.device, self.host) + ms

    def zero_(self) -> None:
        self.writes += 1
        self.enqueue(WRITE_MS)

    def event(self, enable_timing: bool) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                device.host += device.held
                device.enqueue(0)
                self.at = device.device

            def query(self) -> bool:
                return device.host >= self.at

            def synchronize(self) -> None:
                device.host = max(device.host, self.at)

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        return Event()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: device)
    return device


def call(device: Device, host_ms: float) -> Callable[[], None]:
    def run() -> None:
        device.host += host_ms
        device.enqueue(KERNEL_MS)

    return run


def test_a_call_is_timed_on_the_device_however_slow_its_host(device: Device) -> None:
    for host_ms in (0.0, 0.1, 0.5, 2.5):
        ms = timing.time_interleaved({"call": call(device, host_ms)}, repeats=3, warm_up=1)
        assert ms["call"] == pytest.approx(KERNEL_MS), host_ms


def test_nor_does_it_count_that_the_host_is_held_up_behind_the_call(device: Device) -> None:
    device.held = 0.6
    assert timing.time_interleaved({"call": call(device, 0.0)}, repeats=3, warm_up=1)["call"] == pytest.approx(KERNEL_MS)


def test_writes_before_a_call_are_one_where_its_host_is_early(device: Device) -> None:
    timing.time_interleaved({"a": call(device, 0.05), "b": call(device, 0.1)}, repeats=3, warm_up=1)
    assert device.writes == 2 * 4


def test_a_call_that_waits_for_the_device_is_timed_all_the_same(device: Device) -> None:
    def run() -> None:
        device.host = max(device.host, device.device) + 0.02
        device.enqueue(KERNEL_MS)

    ms = timing.time_interleaved({"call": run}, repeats=1, warm_up=0)
    assert ms["call"] >= KERNEL_MS + 0.02
    assert device.writes == 1 + 2 + 4 + 8 + 16
