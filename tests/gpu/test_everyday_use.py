"""What users do with a pipeline on a GPU: offloading, casting, CUDA graphs, a second device. On the CPU: tests/integration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor
from torch._dynamo.utils import counters

import rtlynx
from rtlynx import SparseLinear, SparsityConfig, launch
from rtlynx.fp8 import missing_kernels
from sparse_models import with_branches
from tiny_models import TINY, output, relative_error
from tiny_pipelines import flux_lora, flux_pipeline, sample

BF16 = torch.bfloat16
FLUX = TINY["flux"]
# diffusers, peft and torch warn of their own deprecations on these paths
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


def sparse(module_or_pipe: Any) -> Any:
    """With a branch in every layer, never falling back to the dense product although the model is small."""
    return with_branches(module_or_pipe, selection="weight", small_m="sparse")


OFFLOADING: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group, leaves, stream": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=True
    ),
    "group, blocks, stream": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, use_stream=True
    ),
    "group, blocks": lambda pipe: pipe.transformer.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
}


@pytest.mark.parametrize("kind", OFFLOADING)
def test_offloading(kind: str) -> None:
    want = sample(sparse(flux_pipeline("cuda", BF16)), output_type="latent")
    pipe = sparse(flux_pipeline("cpu", BF16))
    OFFLOADING[kind](pipe)
    if kind.startswith("group"):
        pipe.vae.to("cuda")
    for _ in range(2):
        assert relative_error(sample(pipe, output_type="latent").cuda(), want) < 2e-2


def test_moving_shared_tensors_ahead_is_refused() -> None:
    pipe = sparse(flux_pipeline("cpu", BF16))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    apply_group_offloading(pipe.transformer, cuda, cpu, offload_type="leaf_level", use_stream=True)
    pipe.vae.to("cuda")
    with pytest.raises(rtlynx.InvalidArgumentError, match="share_inputs=False"):
        sample(pipe, output_type="latent")


def test_lora_files_on_an_offloaded_pipeline() -> None:
    pipe = sparse(flux_pipeline("cpu", BF16))
    pipe.enable_model_cpu_offload()
    plain = sample(pipe, output_type="latent")
    pipe.load_lora_weights(flux_lora(1), adapter_name="style")
    assert relative_error(sample(pipe, output_type="latent"), plain) > 1e-3
    pipe.unload_lora_weights()
    assert relative_error(sample(pipe, output_type="latent"), plain) < 1e-2


def test_weights_stored_in_fp8() -> None:
    model, inputs = sparse(FLUX.build("cuda", BF16)), FLUX.inputs("cuda", BF16)
    want = output(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    assert 0 < relative_error(output(model, inputs), want) < 0.3


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_transformer(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse(FLUX.build("cuda", BF16)), FLUX.inputs("cuda", BF16)
    want = output(model, inputs)
    launches: list[None] = []
    replays: list[None] = []
    core, replay = launch.core, torch.cuda.CUDAGraph.replay

    def launching() -> Any:
        launches.append(None)
        return core()

    def replaying(graph: torch.cuda.CUDAGraph) -> None:
        replays.append(None)
        replay(graph)

    monkeypatch.setattr(launch, "core", launching)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replaying)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, mode=mode)
    for _ in range(3):  # the third call replays the recorded graphs
        launches.clear()
        replays.clear()
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_error(output(compiled, inputs).clone(), want) < 5e-2
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert (len(replays) > 0, len(launches) > 0) == ((True, False) if mode == "reduce-overhead" else (False, True))


def test_compiled_blocks_serve_every_size() -> None:
    model = sparse(FLUX.build("cuda", BF16))
    sizes = [FLUX.inputs("cuda", BF16, side=side, text=text) for side, text in ((8, 19), (6, 7), (10, 30), (4, 12))]  # type: ignore[call-arg]
    want = [output(model, inputs) for inputs in sizes]
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, dynamic=True)
    for i, inputs in enumerate(sizes):
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            assert relative_error(output(model, inputs), want[i]) < 5e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_pipeline_on_the_second_gpu() -> None:
    want = sample(sparse(flux_pipeline("cuda:0", BF16)), output_type="latent")
    got = sample(sparse(flux_pipeline("cpu", BF16)).to("cuda:1"), output_type="latent")
    assert got.device == torch.device("cuda:1")
    assert relative_error(got.to("cuda:0"), want) < 2e-2


def test_moving_between_devices() -> None:
    model = sparse(FLUX.build("cpu", BF16))
    on_gpu = copy.deepcopy(model).to("cuda")
    inputs = FLUX.inputs("cuda", BF16)
    want = output(on_gpu, inputs)
    for _ in range(2):
        on_gpu.to("cpu").to("cuda")
        assert torch.equal(output(on_gpu, inputs), want)


def test_images_of_a_sparse_pipeline() -> None:
    images: Tensor = sample(sparse(flux_pipeline("cuda", BF16)), batch=2)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    latents = sample(sparse(flux_pipeline("cuda", BF16)), batch=2, output_type="latent").cpu()
    want, dense = (sample(pipe, batch=2, output_type="latent") for pipe in (sparse(flux_pipeline()), flux_pipeline()))
    assert relative_error(latents, want) < min(2e-2, relative_error(latents, dense))  # on the CPU bf16 is 0.6 % off, dense 1.2 %


@pytest.fixture
def fp8_kernels() -> None:
    if reason := missing_kernels(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip(reason)


def sparse_fp8(module_or_pipe: Any, compact: bool) -> Any:
    """`sparse`, multiplying in fp8."""
    sparse(module_or_pipe)
    rtlynx.apply(module_or_pipe, SparsityConfig(rank=16, selection="weight", small_m="sparse", precision="fp8"))
    if compact:
        assert rtlynx.compact(module_or_pipe) > 0
    return module_or_pipe


@pytest.mark.usefixtures("fp8_kernels")
def test_compact_computes_the_same_in_less_memory() -> None:
    model, inputs = sparse_fp8(FLUX.build("cuda", BF16), compact=False), FLUX.inputs("cuda", BF16)
    want, before = output(model, inputs), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    freed = rtlynx.compact(model)
    assert torch.cuda.max_memory_allocated() - before < freed / 4  # never a second copy of the weights
    assert before - torch.cuda.memory_allocated() > 0.9 * freed  # the allocator rounds what it hands out
    assert torch.equal(output(model, inputs), want)


@pytest.mark.usefixtures("fp8_kernels")
@torch.no_grad()
def test_dense_steps_of_compact_layers_multiply_by_the_rounded_weight() -> None:
    model = sparse_fp8(FLUX.build("cuda", BF16), compact=True)
    layer = model.transformer_blocks[0].attn.to_q
    layer.dense = True
    x = torch.randn(300, layer.in_features, device="cuda", dtype=BF16)
    want = x.double() @ (layer.weight.double() * layer.compact_scale.double()[:, None]).T + layer.bias.double()
    assert relative_error(layer(x), want) < 1e-2  # the weight and the output are each rounded to bf16, by 2⁻⁹ at most


@pytest.mark.usefixtures("fp8_kernels")
@pytest.mark.parametrize("kind", [kind for kind in OFFLOADING if "stream" not in kind])
def test_offloading_compact_layers(kind: str) -> None:
    want = sample(sparse_fp8(flux_pipeline("cuda", BF16), compact=False), output_type="latent")
    pipe = sparse_fp8(flux_pipeline("cpu", BF16), compact=True)
    OFFLOADING[kind](pipe)
    if kind.startswith("group"):
        pipe.vae.to("cuda")
    for _ in range(2):
        assert relative_error(sample(pipe, output_type="latent").cuda(), want) < 5e-2  # prepared on the CPU, scales can differ in a bit


@pytest.mark.usefixtures("fp8_kernels")
@pytest.mark.parametrize("dense", [False, True])
def test_compiled_compact_transformer(dense: bool) -> None:
    model, inputs = sparse_fp8(FLUX.build("cuda", BF16), compact=True), FLUX.inputs("cuda", BF16)
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            layer.dense = dense
    want = output(model, inputs)
    torch._dynamo.reset()
    assert relative_error(output(torch.compile(model), inputs), want) < 5e-2
