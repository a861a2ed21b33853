"""LoRA, attention backends, ControlNet, image to image, guidance and caches on a GPU, in bf16 and fp8. On the CPU: tests/integration."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, hooks
from torch import Tensor
from torch.nn import functional as F

from rtlynx.eligibility import sparse_layers
from rtlynx.fp8 import missing_kernels
from sparse_models import MODELS, sparse, with_branches
from tiny_models import TINY, output, relative_error
from tiny_pipelines import flux_controlnet, flux_lora, flux_pipeline, guided, picture, qwen_image_pipeline, sample

BF16, F16 = torch.bfloat16, torch.float16
FLUX = TINY["flux"]
ALWAYS = {"selection": "weight", "small_m": "sparse"}  # layers as small as these are faster dense
# diffusers, peft and torch warn of their own deprecations on these paths
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(params=["model", "fp8"])
def precision(request: pytest.FixtureRequest) -> str:
    if request.param == "fp8" and (reason := missing_kernels(torch.device("cuda", torch.cuda.current_device()))):
        pytest.skip(reason)
    return str(request.param)


# ---- adapters ----------------------------------------------------------------------------------------------------------------------------


def with_loras(pipe: Any, weights: dict[str, float]) -> Any:
    for name in weights:
        pipe.load_lora_weights(flux_lora(int(name)), adapter_name=name)
    pipe.set_adapters(list(weights), list(weights.values()))
    return pipe


def deltas(weights: dict[str, float]) -> dict[str, Tensor]:
    """What the adapters of those weights add, by the name of the layer."""
    sums: dict[str, Tensor] = {}
    for seed, weight in weights.items():
        file = flux_lora(int(seed))
        for name in {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in file}:
            up, down = (file[f"transformer.{name}.lora_{part}.weight"].cuda() for part in "BA")
            sums[name] = sums.get(name, 0) + weight * (up @ down)
    return sums


mixtures = pytest.mark.parametrize("weights", [{"1": 1.0}, {"1": 0.5, "2": 2.0}], ids=str)


@mixtures
@torch.no_grad()
def test_unfused_adapters_add_a_dense_product_of_their_own(weights: dict[str, float], precision: str) -> None:
    pipe = with_branches(flux_pipeline("cuda", BF16), precision=precision, **ALWAYS)
    inputs = FLUX.inputs("cuda", BF16)
    layers = sparse_layers(pipe.transformer)
    prepared = {name: layer.weight_fp8.clone() for name, layer in layers.items() if layer.weight_fp8 is not None}
    assert bool(prepared) == (precision == "fp8")
    plain = output(pipe.transformer, inputs)
    with_loras(pipe, weights)
    assert relative_error(output(pipe.transformer, inputs), plain) > 2e-2
    for name, delta in deltas(weights).items():
        wrapper = pipe.transformer.get_submodule(name)
        x = torch.randn(200, wrapper.in_features, device="cuda", dtype=BF16)
        assert wrapper.base_layer is layers[name]
        assert relative_error(wrapper(x).float() - wrapper.base_layer(x).float(), x.float() @ delta.T) < 2e-2
        if prepared:
            assert torch.equal(layers[name].weight_fp8.float(), prepared[name].float())
    pipe.set_adapters(list(weights), [0.0] * len(weights))
    assert relative_error(output(pipe.transformer, inputs), plain) < 2e-2
    pipe.delete_adapters(list(weights))
    assert relative_error(output(pipe.transformer, inputs), plain) < 2e-2
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.transformer, inputs), plain)


@mixtures
def test_fused_adapters_are_in_what_the_sparse_product_multiplies(weights: dict[str, float], precision: str) -> None:
    pipe = with_branches(flux_pipeline("cuda", BF16), precision=precision, **ALWAYS)
    model, inputs = pipe.transformer, FLUX.inputs("cuda", BF16)
    plain = output(model, inputs)
    unfused = output(with_loras(pipe, weights).transformer, inputs)
    pipe.fuse_lora(adapter_names=list(weights))
    fused, layers = output(model, inputs), sparse_layers(model)

    # the same weights, rounded to bf16 as peft did, in a model whose adapters add nothing
    twin = flux_pipeline("cuda", BF16)
    for name, delta in deltas(weights).items():
        linear = twin.transformer.get_submodule(name)
        want = linear.weight.float() + delta
        assert relative_error(layers[name].weight.detach(), want) < 5e-3 < relative_error(linear.weight.detach(), want)
        linear.weight.data.copy_(layers[name].weight)
    with_branches(twin, precision=precision, **ALWAYS)
    with_loras(twin, dict.fromkeys(weights, 0.0))
    for name, layer in sparse_layers(twin.transformer).items():
        for tensor in ("score", "weight_fp8", "weight_scale"):
            a, b = getattr(layers[name], tensor), getattr(layer, tensor)
            assert (a is None) == (b is None) == (precision == "model" and tensor != "score")
            assert a is None or torch.equal(a.float(), b.float())
    assert relative_error(fused, output(twin.transformer, inputs)) < 1e-3
    assert min(relative_error(fused, unfused), relative_error(fused, plain)) > 2e-2

    pipe.unfuse_lora()
    assert relative_error(output(model, inputs), unfused) < 2e-2  # weights come back up to rounding
    pipe.unload_lora_weights()
    assert relative_error(output(model, inputs), plain) < 2e-2
    assert len(sparse_layers(model)) == FLUX.sparse_layers


# ---- attention ---------------------------------------------------------------------------------------------------------------------------

KERNELS: dict[str, Callable[[], bool]] = {
    "_native_cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "_native_efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "_native_flash": torch.backends.cuda.flash_sdp_enabled,
    "_native_math": torch.backends.cuda.math_sdp_enabled,
}
"""diffusers' backends that need torch alone → whether torch may use that kernel."""


@pytest.mark.parametrize("family", ["flux", "wan"])
@pytest.mark.parametrize("backend", KERNELS)
def test_attention_backends(backend: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sparse(family, BF16, "cuda", **ALWAYS), MODELS[family].inputs("cuda", BF16)
    allowed: list[list[str]] = []
    attend = F.scaled_dot_product_attention

    def watching(*args: Any, **kwargs: Any) -> Tensor:
        allowed.append([name for name, enabled in KERNELS.items() if enabled()])
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watching)
    try:
        model.set_attention_backend("native")
        want = output(model, inputs)
        assert len(allowed) > 0 and allowed[-1] != [backend]
        allowed.clear()
        model.set_attention_backend(backend)
        try:
            got = output(model, inputs)
        except RuntimeError as refusal:
            if not re.search("No available kernel|No viable backend|No valid execution plans", str(refusal)):
                raise
            pytest.skip(f"torch has no kernel for {backend} here: {refusal}")
    finally:
        model.set_attention_backend("native")  # diffusers remembers the last one for models to come
    assert len(allowed) > 0 and all(names == [backend] for names in allowed)
    for layer in sparse_layers(model).values():
        layer.dense = True
    assert relative_error(got, want) < min(6e-2, relative_error(output(model, inputs), want) / 2)


# ---- pipelines ---------------------------------------------------------------------------------------------------------------------------


def made(kind: Any, device: str, dtype: torch.dtype, **more: Any) -> Any:
    components = flux_pipeline(device, dtype).components.items()
    pipe = kind(**{name: part for name, part in components if name not in ("image_encoder", "feature_extractor")}, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edited(pipe: Any, **more: Any) -> Tensor:
    return sample(pipe, **{"image": picture(), "strength": 0.6, "output_type": "latent", **more})


def controlled(pipe: Any, scale: float) -> Tensor:
    return sample(pipe, control_image=picture(), controlnet_conditioning_scale=scale, output_type="latent")


MASK = torch.cat([torch.zeros(1, 1, 32, 16), torch.ones(1, 1, 32, 16)], 3)
PIPELINES: dict[str, tuple[Callable[..., Any], Callable[[Any], Tensor], Callable[[Any], Tensor]]] = {
    "ControlNet": (
        lambda *on: made(FluxControlNetPipeline, *on, controlnet=flux_controlnet().to(*on)),
        lambda pipe: controlled(pipe, 1.0),
        lambda pipe: controlled(pipe, 0.0),
    ),
    "image to image": (lambda *on: made(FluxImg2ImgPipeline, *on), edited, lambda pipe: edited(pipe, image=1 - picture())),
    "inpainting": (
        lambda *on: made(FluxInpaintPipeline, *on),
        lambda pipe: edited(pipe, mask_image=MASK),
        lambda pipe: edited(pipe, mask_image=1 - MASK),
    ),
    "guided FLUX.1": (flux_pipeline, lambda pipe: guided(pipe, 4.0), lambda pipe: guided(pipe, 1.0)),
    "guided Qwen-Image": (lambda *on: qwen_image_pipeline().to(*on), lambda pipe: guided(pipe, 4.0), lambda pipe: guided(pipe, 16.0)),
}
"""How a pipeline is made on a device in a dtype, latents that it draws, and others that it draws of something else."""


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_draw_what_they_draw_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    make, draw, draw_another = PIPELINES[name]
    want = draw(with_branches(make("cpu", torch.float32), **ALWAYS))
    pipe = make("cuda", dtype)
    dense = draw(pipe).cpu()
    with_branches(pipe, **ALWAYS)
    got, another = draw(pipe), draw_another(pipe).cpu()
    assert got.is_cuda
    error = relative_error(got.cpu(), want)
    assert error < min(4e-2, relative_error(dense, want))
    if dtype is F16:  # whose rounding is 8 times as fine, far below what sparsity changes, and the other picture or prompt
        assert error < 0.6 * min(relative_error(dense, want), relative_error(another, want))


# ---- caches ------------------------------------------------------------------------------------------------------------------------------


def two_steps(model: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], int]:
    """What each predicts, the second of nearly the same, and how often the last block ran."""
    ran: list[None] = []
    handle = model.single_transformer_blocks[-1].proj_mlp.register_forward_pre_hook(lambda *_: ran.append(None))
    outputs = []
    for i in range(2):
        with model.cache_context("cond"):
            outputs.append(output(model, {**inputs, "hidden_states": (1 - 0.01 * i) * inputs["hidden_states"]}))
    handle.remove()
    return outputs, len(ran)


def test_a_cache_skips_what_it_skips_in_the_dense_model(precision: str) -> None:
    inputs = FLUX.inputs("cuda", BF16)
    dense, model = FLUX.build("cuda", BF16), sparse("flux", BF16, "cuda", precision=precision, **ALWAYS)
    on_cpu = sparse("flux", precision=precision, **ALWAYS)
    without, ran_without = two_steps(model, inputs)
    for each in (dense, model, on_cpu):
        each.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.5))
    want, ran = two_steps(dense, inputs)
    got, ran_sparse = two_steps(model, inputs)
    assert ran_sparse == ran == 1 and ran_without == 2
    assert torch.equal(got[0], without[0])  # nothing to reuse yet
    assert not torch.equal(got[1], without[1])
    for a, b, c in zip(got, two_steps(on_cpu, FLUX.inputs("cpu", torch.float32))[0], want, strict=True):
        assert relative_error(a.cpu(), b) < min(6e-2, relative_error(a, c))
    model.disable_cache()
    assert all(torch.equal(a, b) for a, b in zip(two_steps(model, inputs)[0], without, strict=True))
