"""``rtlynx info``: what is installed, what would run where, and what is missing."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rtlynx.environment import Environment, Gpu, collect
from rtlynx.usable import EXAMPLE


def info(as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON, e.g. for a bug report.")] = False) -> None:
    """Show versions, GPUs, which kernels would run where, and what is missing."""
    environment = collect()
    if as_json:
        typer.echo(json.dumps(asdict(environment), indent=2))
        return
    console = Console(highlight=False)
    console.print(_facts(environment))
    console.print(_places(environment))
    for item in environment.missing:
        console.print(f"[yellow]missing[/] [bold]{item.what}[/]: {item.consequence}. Get it: {item.remedy}", soft_wrap=True)


def _facts(environment: Environment) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("rtlynx", environment.version)
    code = ", ".join(environment.device_code) or "none"
    table.add_row("device code", code + (f" (nvcc {environment.nvcc})" if environment.nvcc else ""))
    table.add_row("driver", f"CUDA {environment.driver[0]}.{environment.driver[1]}" if environment.driver else "none")
    for package, version in environment.packages.items():
        cuda = f" (CUDA {environment.torch_cuda or 'none'})" if package == "torch" and version else ""
        table.add_row(package, (version or "not installed") + cuda)
    return table


def _places(environment: Environment) -> Table:
    table = Table(title="what runs where", title_justify="left", caption_justify="left")
    if environment.gpus:
        table.caption = (
            f"kernel of a bf16 layer with {EXAMPLE['m']} tokens, {EXAMPLE['k']} to {EXAMPLE['n']} channels, rank {EXAMPLE['rank']}"
        )
    for heading in ("device", "hardware", "a sparse layer runs"):
        table.add_column(heading)
    on_cpu = "CPU reference (correct, not fast)" if environment.packages["torch"] else "nothing: torch is missing"
    table.add_row("cpu", platform.machine(), on_cpu)
    for gpu in environment.gpus:
        table.add_row(f"cuda:{gpu.index}", _describe(gpu), gpu.kernel or f"nothing: {gpu.reason}")
    return table


def _describe(gpu: Gpu) -> str:
    major, minor = gpu.capability
    return f"{gpu.name}, sm_{major}{minor}, {gpu.sms} SMs, {gpu.memory_bytes / 2**30:.0f} GiB"
