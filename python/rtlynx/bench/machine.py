"""What a figure must name: the GPU and its state, the software, the commit."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch

from rtlynx import __version__, _core


def gpu_slug() -> str:
    """The current GPU's name as a folder: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


BURSTS = "medians of CUDA-event times in ms, cold L2, random data, candidates interleaved"
"""How `rtlynx.timing` measures."""


def describe(command: str, commit: str | None = None, method: str = BURSTS) -> list[str]:
    """Header lines of a result file: what was run where, and how it was measured.

    `commit` overrides what git says, for a copy of the sources without its history.
    """
    code = _core.device_code()
    smi = _output(
        "nvidia-smi",
        f"--id={torch.cuda.current_device()}",
        "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    )
    return [
        f"command: {command}",
        f"gpu: {torch.cuda.get_device_name()}",
        f"driver, SM clock now, at most, power limit: {smi or 'unknown'}",
        f"torch: {torch.__version__}, nvcc of the kernels: {code['nvcc']}",
        f"rtlynx: {__version__}, commit {commit or _commit()}",
        method,
    ]


def _commit() -> str:
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return commit + ("+changes" if _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str:
    """What a program prints, or nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
