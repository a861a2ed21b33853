"""The whole bench: load a model, measure the rows that are not measured yet, write files and show a table."""

from __future__ import annotations

import hashlib
import sys
import traceback
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from tqdm.auto import tqdm

from rtlynx.bench.machine import describe, gpu_slug
from rtlynx.bench.quality.layer_time import TIMING
from rtlynx.bench.quality.results import COLUMNS, Results, write_tables
from rtlynx.bench.quality.rows import Row, recipe_row, rows
from rtlynx.bench.quality.run import QualityBench, Settings
from rtlynx.config import SparsityConfig
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS, ScenesPipeline
from rtlynx.demo.place import Place, choose_place
from rtlynx.errors import InvalidArgumentError
from rtlynx.fingerprint import fingerprint
from rtlynx.fp8 import missing_kernels
from rtlynx.recipe_file import read_recipe, write_recipe
from rtlynx.report import Column, terminal_table


@dataclass(frozen=True)
class Wanted:
    """What to measure: see `rtlynx.cli.bench_quality`."""

    model: str
    device: str
    rank: int
    ranks: tuple[int, ...]
    only: frozenset[str]
    recipes: tuple[Path, ...] = ()
    part: tuple[int, int] = (1, 1)


def run_quality(wanted: Wanted, settings: Settings, out: Path, commit: str | None, progress: bool = True) -> list[Path]:
    """Measure and write.

    Returns:
        The tables written.

    Raises:
        InvalidArgumentError: The model's folder is not one, or no row has the name asked for.
        DeviceError: The kernels cannot run on the device asked for.
        RuntimeError: Rows failed; the others are written.
    """
    place = choose_place(wanted.device)
    source = DEFAULT_WEIGHTS if wanted.model == "small" else Path(wanted.model)
    if not (source / FILE_NAME).is_file():
        raise InvalidArgumentError(
            "bench quality", "model", f"{source} without {FILE_NAME}", "small, or a folder that rtlynx.demo.train wrote"
        )
    pipe = ScenesPipeline.from_pretrained(source).to(place.device, place.dtype)
    name = wanted.model if wanted.model == "small" else source.resolve().parent.name if source.name == "pipeline" else source.name
    folder = out / (gpu_slug() if place.on_gpu else "cpu")
    parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    about = {"parameters": parameters, "dtype": str(place.dtype), "fingerprint": _fingerprint(pipe.transformer)}
    results = Results(folder, name, {**asdict(settings), **about})

    every = rows(wanted.rank, wanted.ranks, [recipe_row(path.stem, read_recipe(path)) for path in wanted.recipes])
    todo = [row for row in every if not wanted.only or _names(row) & (wanted.only | {"dense"})]
    if wanted.only - {name for row in todo for name in _names(row)}:  # before this process takes its part of them
        known = ", ".join(sorted({row.method for row in every}))
        raise InvalidArgumentError("bench quality", "only", ", ".join(sorted(wanted.only)), f"some of {known}")
    part, parts = wanted.part
    todo = [row for i, row in enumerate(todo) if row.method == "dense" or i % parts == part - 1]
    ranks = ",".join(map(str, wanted.ranks)) or '""'
    sizes = f"--prompts {settings.prompts} --steps {settings.steps} --rank {wanted.rank} --ranks {ranks}"
    command = f"rtlynx bench quality --model {wanted.model} {sizes}"
    header = (
        describe(command, commit, TIMING)
        if place.on_gpu
        else [f"command: {command}", f"torch: {torch.__version__}, {place.name}, float32 reference"]
    )
    bench = QualityBench(pipe, SceneClassifier.load(source / FILE_NAME, place.device), settings, progress)
    failed: dict[str, Exception] = {}
    for row in tqdm(todo, desc="rows", unit="row", disable=not progress, file=sys.stderr):
        if row.key in results.rows and row.method != "dense":  # the others are compared with the dense pictures
            continue
        if reason := _missing(row, place):
            tqdm.write(f"{row.key} not measured: {reason}", file=sys.stderr)
            continue
        try:
            measured = bench.measure(row)
        except Exception as error:  # whatever it is, the rows that are left can still be measured
            if row.method == "dense":
                raise
            tqdm.write(f"{row.key} failed:\n{traceback.format_exc()}", file=sys.stderr)
            failed[row.key] = error
            continue
        if row.key in results.rows:  # dense, of the run that measured the first rows
            continue
        results.add(row.key, measured, header)
        if measured.get("recipe"):
            made_with = {"model": name, **measured["search"]}
            write_recipe(folder / f"recipe-{name}-{row.method}.json", SparsityConfig.from_dict(measured["recipe"]), made_with)
        if place.on_gpu:
            torch.cuda.empty_cache()
    tables = write_tables(folder)
    _show(results, Console(highlight=False))
    if failed:
        raise RuntimeError(f"bench quality: {len(failed)} rows failed: {', '.join(failed)}") from next(iter(failed.values()))
    return [results.path, *tables]


def _fingerprint(model: nn.Module) -> str:
    """One digest for the weights of all linear layers: a model that was trained again under the same name has another."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return hashlib.sha256("".join(fingerprint(layers).values()).encode()).hexdigest()[:16]


def _names(row: Row) -> set[str]:
    """What ``--only`` may call a row."""
    return {row.method, f"{row.method}/{row.selection}", row.key}


def _missing(row: Row, place: Place) -> str | None:
    """Why a row cannot be measured here."""
    if row.search is not None and find_spec("scipy") is None:
        return "SciPy is not installed (pip install 'rtlynx[search]')"
    if row.search == "time" and not place.on_gpu:
        return "there is no GPU to measure times on"
    return missing_kernels(place.device) if row.precision == "fp8" else None


def _show(results: Results, console: Console) -> None:
    formats = {"velocity_rel_err": "{:.2%}", "psnr_db": "{:.2f}", "frechet": "{:.1f}", "attribute_accuracy": "{:.2%}", "layer_ms": "{:.2f}"}
    columns = [Column(key, key.replace("_", " "), formats.get(key, "{}"), numeric=key in formats or key == "rank") for key in COLUMNS[1:]]
    shown = [{key: value[0] if isinstance(value, (list, tuple)) else value for key, value in row.items()} for row in results.rows.values()]
    console.print(terminal_table(columns, shown, title=f"{results.model}, {results.settings['prompts']} prompts"))
