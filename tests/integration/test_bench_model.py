"""The bench of whole models, on small ones: what is built, what is timed, what is written."""

from __future__ import annotations

import csv
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import rtlynx
from rtlynx import InvalidArgumentError, SparseLinear
from rtlynx.bench.breakdown import KINDS, apart, kind, milliseconds_by_kind
from rtlynx.bench.calibration import CalibrationTimes, measure_calibration
from rtlynx.bench.models import MODELS, BenchModel
from rtlynx.bench.random_model import build, random_compensation, variant
from rtlynx.bench.step import StepTimes, measure_step
from rtlynx.bench.step_results import draw_steps, read_steps, save_picture, write_steps
from rtlynx.cli import bench_calibrate
from rtlynx.eligibility import sparse_layers

CPU = torch.device("cpu")
SMALL_FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
SMALL: dict[str, dict[str, Any]] = {
    "flux.1-dev": SMALL_FLUX,
    "flux.1-schnell": SMALL_FLUX,
    "qwen-image": {
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "axes_dims_rope": (8, 12, 12),
    },
    "z-image": {
        "dim": 192,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 6,
        "n_kv_heads": 6,
        "cap_feat_dim": 64,
        "axes_dims": [8, 12, 12],
    },
    "wan-2.1-14b": {"num_attention_heads": 4, "attention_head_dim": 32, "text_dim": 64, "freq_dim": 32, "ffn_dim": 256, "num_layers": 1},
    "flux.2-dev-part": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
    },
    "chroma-part": {
        **{key: value for key, value in SMALL_FLUX.items() if key != "pooled_projection_dim"},
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 64,
        "approximator_layers": 1,
    },
    "hunyuan-video-part": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "num_refiner_layers": 1,
        "text_embed_dim": 64,
        "pooled_projection_dim": 32,
        "rope_axes_dim": (8, 12, 12),
    },
    "sd3.5-large": {
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "caption_projection_dim": 128,
        "pooled_projection_dim": 32,
    },
    "pixart-sigma": {
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "cross_attention_dim": 128,
        "caption_channels": 64,
    },
    "ltx-video-13b-part": {
        "num_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "cross_attention_dim": 128,
        "caption_channels": 64,
    },
}


def small(name: str) -> BenchModel:
    model = MODELS[name]
    return dataclasses.replace(model, config={**model.config, **SMALL[name]}, size=(64, 64))


def test_every_model_has_a_small_one() -> None:
    assert set(SMALL) == set(MODELS)


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")  # diffusers' own, in Chroma
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_every_model(name: str) -> None:
    seen: list[int] = []
    modes = ("naive", "compensated")
    rows, notes = measure_step(
        small(name), CPU, rank=16, repeats=2, compiled=False, modes=modes, after_row=lambda rows, notes: seen.append(len(rows))
    )
    assert seen == [1, 2, 3]
    assert [(row.mode, row.compiled) for row in rows] == [("dense", False), ("naive", False), ("rank 16", False)]
    for row in rows:
        assert (row.model, row.height, row.width) == (name, 64, 64)
        assert row.step_ms > 0 and row.gemm_ms > 0 and row.attention_ms > 0 and row.memory_gb > 0
        assert row.gemm_ms + row.attention_ms + row.select_ms + row.other_ms == pytest.approx(row.step_ms)
        assert (row.select_ms > 0) is (row.mode != "dense")
        assert row.gap_ms < row.other_ms
        assert math.isnan(row.graph_ms)  # there is no GPU
    assert rows[0].speedup == 1 and rows[2].speedup == pytest.approx(rows[0].step_ms / rows[2].step_ms)
    assert rows[2].memory_gb > rows[0].memory_gb == rows[1].memory_gb
    assert any(note.startswith("apply, rank 16 in every layer: ") for note in notes)
    assert not any("not finite" in note for note in notes)


def test_compiled_steps() -> None:
    options = {"backend": "aot_eager"}
    rows, notes = measure_step(
        small("flux.1-dev"), CPU, rank=16, repeats=1, eager=False, modes=("compensated", "fp8"), compile_options=options
    )
    assert [(row.mode, row.compiled) for row in rows] == [("dense", True), ("rank 16", True)]
    assert any(note.startswith("fp8 not measured: ") for note in notes)


@pytest.mark.parametrize("name", ["sd3.5-large", "pixart-sigma"])
def test_a_model_without_repeated_blocks_is_compiled_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[measure_step.__module__], "milliseconds_by_kind", operations_by_kind)
    counters.clear()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    rows, notes = measure_step(small(name), CPU, rank=16, repeats=1, modes=("compensated",), compile_options={"backend": keep})
    modes = [(mode, compiled) for mode in ("dense", "rank 16") for compiled in (False, True)]
    assert [(row.mode, row.compiled) for row in rows] == modes  # the eager variants beside the compiled ones, in turns
    assert len(graphs) == 2 and not counters["graph_break"]
    assert sum("sparse_linear" in graph.code for graph in graphs) == 1
    write_steps(tmp_path / "model.csv", notes, rows)
    line = f"# {name} 64x64: compiled whole: diffusers names no repeated blocks"
    assert (tmp_path / "model.csv").read_text().splitlines().count(line) == 1
    _, notes = measure_step(small(name), CPU, repeats=1, compiled=False, modes=())
    assert not any("compiled whole" in note for note in notes)


def operations_by_kind(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """In the place of their times, which depend on what else the machine does."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    counted = Counter(kind(event.name) for event in profiler.events() or ())
    return {name: float(counted[name]) for name in (*KINDS, "other")}


def test_modes_with_hooks_around_layers_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[measure_step.__module__], "milliseconds_by_kind", operations_by_kind)
    modes = ("compensated", "fp8-storage", "first-block-cache", "dense fp8-storage", "dense first-block-cache")
    rows, notes = measure_step(small("flux.1-dev"), CPU, rank=16, repeats=1, modes=modes, compile_options={"backend": "aot_eager"})
    found = {(row.mode, row.compiled): row for row in rows}
    assert set(found) == {
        *((mode, compiled) for mode in ("dense", "rank 16") for compiled in (False, True)),
        ("rank 16, fp8-storage", False),
        ("rank 16, first-block-cache", False),
        ("dense fp8-storage", False),
        ("dense first-block-cache", False),
    }
    sparse, stored, cached = (found[mode, False] for mode in ("rank 16", "rank 16, fp8-storage", "rank 16, first-block-cache"))
    assert stored.memory_gb < 0.75 * sparse.memory_gb
    dense, dense_stored, dense_cached = (found[mode, False] for mode in ("dense", "dense fp8-storage", "dense first-block-cache"))
    assert dense_stored.memory_gb < 0.75 * dense.memory_gb and dense_cached.gemm_ms < dense.gemm_ms
    assert dense_stored.select_ms == dense_cached.select_ms == 0
    assert cached.gemm_ms < sparse.gemm_ms and cached.attention_ms < sparse.attention_ms  # one of two blocks runs
    assert not any("not finite" in note for note in notes)
    _, notes = measure_step(small("z-image"), CPU, rank=16, repeats=1, compiled=False, modes=("first-block-cache",))
    assert "first-block-cache not measured: ZImageTransformer2DModel has no caches" in notes


def test_blocks_of_one_class_left_as_they_were() -> None:
    modes = ("compensated", "compensated without FluxAttention", "compensated without Attention")
    rows, notes = measure_step(small("flux.1-dev"), CPU, rank=16, repeats=1, compiled=False, modes=modes)
    assert [row.mode for row in rows] == ["dense", "rank 16", "rank 16 without FluxAttention"]
    (note,) = [note for note in notes if "not measured" in note]
    assert note.startswith("compensated without Attention not measured: no Attention among the fused blocks: AdaLayerNormZero")


def test_compact_holds_one_weight_and_changes_no_other_mode() -> None:
    modes = ("sparse fp8", "sparse fp8 compact")
    rows, notes = measure_step(small("flux.1-dev"), CPU, rank=16, repeats=1, compiled=False, modes=modes)
    dense, copied, compact = rows
    assert [row.mode for row in rows] == ["dense", "rank 16, sparse fp8", "rank 16, sparse fp8 compact"]
    assert compact.memory_gb < dense.memory_gb < copied.memory_gb
    assert not any("not finite" in note for note in notes)


def test_variants_share_every_weight() -> None:
    model = build(small("flux.1-dev"), CPU)
    other = variant(model)
    assert other is not model
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    random_compensation(rtlynx.apply(other), 32)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    block = other.single_transformer_blocks[0]
    assert block.attn.to_q.comp_down is block.proj_mlp.comp_down
    assert block.attn.to_q.sharing == 4
    assert all(layer.rank == 32 for layer in sparse_layers(other).values())


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_bias_TNN", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("spmm_sm90_bf16", "gemm"),
        ("sparsify_sm90_bf16", "select"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "gemm"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31", "attention"),
        ("triton_poi_fused_add_gelu_mul_3", "other"),
        ("triton_red_fused__scaled_dot_product_flash_attention_addmm_mul_7", "other"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel: str, expected: str) -> None:
    assert kind(kernel) == expected


def test_breakdown_counts_each_op_once() -> None:
    a = torch.randn(256, 256)
    times = milliseconds_by_kind(lambda: torch.mm(a, a).relu(), CPU)
    assert times["gemm"] > 0 and times["other"] > 0 and times["select"] == times["attention"] == 0


def test_kernels_that_overlap_count_once() -> None:
    kernels = [("gemm", 5.0, 9.0), ("select", 0.0, 6.0), ("inside", 6.5, 8.0), ("late", 20.0, 21.0)]
    assert apart(kernels) == [("select", 6.0), ("gemm", 3.0), ("inside", 0.0), ("late", 1.0)]


def row(model: str, mode: str, step_ms: float) -> StepTimes:
    return StepTimes(model, 1024, 1024, mode, True, step_ms, 60.0, 20.0, 0.0, step_ms - 80, 24.5, 130 / step_ms, 5.0, step_ms - 5)


def test_results_of_a_model_replace_its_earlier_ones_only(tmp_path: Path) -> None:
    path = tmp_path / "model.csv"
    write_steps(path, ["commit a"], [row("flux.1-dev", "dense", 130), row("flux.1-dev", "naive", 90)])
    write_steps(path, ["commit b"], [row("z-image", "dense", 100)])
    write_steps(path, ["commit c"], [row("flux.1-dev", "dense", 125)])
    notes, rows = read_steps(path)
    assert notes == ["z-image 1024x1024: commit b", "flux.1-dev 1024x1024: commit c"]
    assert rows == [row("z-image", "dense", 100), row("flux.1-dev", "dense", 125)]
    header = next(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert header == "model,height,width,mode,compiled,step_ms,gemm_ms,attention_ms,select_ms,other_ms,memory_gb,speedup,gap_ms,graph_ms"


def test_files_of_older_versions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.csv"
    write_steps(path, [], [row("z-image", "dense", 100)])
    path.write_text("\n".join(line.rsplit(",", 2)[0] for line in path.read_text().splitlines()))
    (old,) = read_steps(path)[1]
    assert math.isnan(old.gap_ms) and math.isnan(old.graph_ms)
    assert old == dataclasses.replace(row("z-image", "dense", 100), gap_ms=old.gap_ms, graph_ms=old.graph_ms)


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("flux.1-dev", "dense", 130), row("flux.1-dev", "rank 64", 90), row("z-image", "dense", 100)]
    figure = draw_steps(rows)
    assert [axes.get_title() for axes in figure.axes] == ["flux.1-dev 1024x1024", "z-image 1024x1024"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00×", "1.44×"]
    write_steps(tmp_path / "model.csv", [], rows)
    first = save_picture(tmp_path / "model.csv").read_text()
    assert save_picture(tmp_path / "model.csv").read_text() == first


@pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")  # diffusers' own, in Chroma
@pytest.mark.parametrize("name", MODELS)
def test_calibration_of_every_model(name: str) -> None:
    times = measure_calibration(small(name), CPU, rank=16, prompts=2, steps=2, progress=False)
    assert (times.model, times.method, times.selection, times.rank) == (name, "split", "shift", 16)
    assert times.layers > 0 and times.passes == 1 and times.peak_gb == 0
    few = measure_calibration(small(name), CPU, rank=16, prompts=2, steps=2, memory=1 << 20, progress=False)
    assert few.passes > 1 and few.layers == times.layers
    assert times.total_s > times.model_s > 0 and times.solving_s == pytest.approx(times.total_s - times.model_s)


def test_an_interrupted_calibration_bench_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(
        model: BenchModel,
        device: torch.device,
        *,
        method: str,
        selection: tuple[str, ...],
        rank: int,
        prompts: int,
        steps: int,
        memory: int | None,
    ) -> CalibrationTimes:
        assert memory == 3 << 29 and selection == ("shift", "permutation")
        if method == "joint":
            raise KeyboardInterrupt
        return CalibrationTimes(model.name, 1024, 1024, method, "+".join(selection), rank, 304, prompts, steps, 1, 10.0, 6.0, 4.0, 50.0)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("rtlynx.cli.bench_calibrate.require_gpu", lambda: None)
    monkeypatch.setattr("rtlynx.bench.machine.gpu_slug", lambda: "a-gpu")
    monkeypatch.setattr("rtlynx.bench.machine.describe", lambda command, *_: [f"command: {command}"])
    monkeypatch.setattr("rtlynx.bench.calibration.measure_calibration", measure)
    wanted: dict[str, Any] = {"random_weights": True, "method": ["split", "paper", "joint"], "memory": 1.5, "out": tmp_path}
    with pytest.raises(InvalidArgumentError, match="shifts"):
        bench_calibrate.calibrate("z-image", selection="shifts", **wanted)
    with pytest.raises(KeyboardInterrupt):
        bench_calibrate.calibrate("z-image", selection="shift,permutation", **wanted)
    header, *lines = (tmp_path / "a-gpu" / "calibration.csv").read_text().splitlines()
    assert (
        header.startswith("# command: rtlynx bench calibrate --model z-image")
        and "--method joint --rank 64 --selection shift,permutation --prompts 32" in header
        and header.endswith("--memory 1.5")
    )
    assert [row["method"] for row in csv.DictReader(lines)] == ["split", "paper"]
