"""A whole pipeline of diffusers, sparse: LoRA files of FLUX.1, guidance, ControlNet, image to image, batches, few steps, offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from torch import Tensor

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from rtlynx.eligibility import sparse_layers
from rtlynx.evaluate.trajectory import Trajectory
from tiny_models import TINY, relative_error
from tiny_pipelines import (
    flux_controlnet,
    flux_lora,
    flux_pipeline,
    guided,
    picture,
    qwen_image_pipeline,
    sample,
    sample_guided,
    sd3_pipeline,
    wan_pipeline,
    z_image_pipeline,
    z_image_turbo_pipeline,
)

pytestmark = pytest.mark.usefixtures("others_warnings_are_not_ours")


def sparse() -> Any:
    return rtlynx.apply(flux_pipeline(), SparsityConfig(rank=16))


def with_dense_layers(pipe: Any, draw: Callable[[], Tensor]) -> Tensor:
    layers = sparse_layers(pipe.transformer).values()
    for layer in layers:
        layer.dense = True
    drawn = draw()
    for layer in layers:
        layer.dense = False
    return drawn


def test_sampling_and_removing() -> None:
    pipe = flux_pipeline()
    dense = sample(pipe)
    rtlynx.apply(pipe)
    got = sample(pipe)
    assert got.shape == dense.shape == (1, 3, 32, 32) and got.isfinite().all()
    assert not torch.equal(got, dense)
    assert torch.equal(sample(rtlynx.remove(pipe)), dense)


def test_a_batch_and_several_images_for_a_prompt() -> None:
    pipe = sparse()
    for images, settings in ((2, {"batch": 2}), (3, {"num_images_per_prompt": 3})):
        got, want = sample(pipe, **settings), with_dense_layers(pipe, lambda settings=settings: sample(pipe, **settings))
        assert got.shape == (images, 3, 32, 32)
        # Measured, 0.004; images are 0.4 apart, and one layer that answers nothing makes it 0.006.
        assert all(1e-3 < relative_error(got[i], want[i]) < 5e-3 for i in range(images))


@pytest.mark.parametrize("make", [flux_pipeline, qwen_image_pipeline])
def test_guidance_in_two_forwards(make: Any) -> None:
    dense = guided(make(), 4.0)
    pipe = rtlynx.apply(make(), SparsityConfig(rank=16))
    rtlynx.calibrate(pipe, run=lambda: guided(pipe, 4.0), progress=False)
    alone, seen = guided(pipe, 1.0), Trajectory()
    with seen.recording(pipe.transformer):
        got = guided(pipe, 4.0)
    assert relative_error(got, alone) > 1e-3 and 1e-4 < relative_error(got, dense) < 0.5
    # Each of the forwards is what it is without the others before it: nothing of one prompt is selected for the other.
    assert len(seen.calls) == 2 * 3
    for _, inputs, want in reversed(seen.calls):
        with torch.no_grad():
            assert torch.equal(pipe.transformer(**inputs)[0], want)
    for layer in sparse_layers(pipe.transformer).values():
        layer.dense = True
    torch.testing.assert_close(guided(pipe, 4.0), dense, rtol=1e-4, atol=1e-4)


def test_prompts_of_different_lengths_in_a_batch() -> None:
    """Of Qwen-Image, which masks what is padded: each picture is what its prompt gives alone."""
    pipe = rtlynx.apply(qwen_image_pipeline(), SparsityConfig(rank=16))
    rng = torch.Generator().manual_seed(6)
    embeds, mask = torch.randn(2, 11, 64, generator=rng), torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0

    def latents(embeds: Tensor, mask: Tensor, *seeds: int) -> Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompt = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "generator": noise, "true_cfg_scale": 1.0}
        drawn: Tensor = pipe(**prompt, num_inference_steps=3, height=128, width=128, output_type="latent").images
        return drawn

    both = latents(embeds, mask, 1, 2)
    assert relative_error(both[:1], latents(embeds[:1], mask[:1], 1)) < 1e-5
    assert relative_error(both[1:], latents(embeds[1:, :7], mask[1:, :7], 2)) < 1e-5
    assert relative_error(both[1:], latents(embeds, torch.ones_like(mask), 1, 2)[1:]) > 1e-4  # padding would be seen
    assert relative_error(both, with_dense_layers(pipe, lambda: latents(embeds, mask, 1, 2))) > 1e-3


GUIDED: dict[str, tuple[Callable[[], Any], int]] = {"sd3": (sd3_pipeline, 1), "z_image": (z_image_pipeline, 1), "wan": (wan_pipeline, 2)}
"""Family → its pipeline, and how many forwards a guided step takes."""


@pytest.mark.parametrize("family", GUIDED)
def test_guided_pictures_and_videos(family: str) -> None:
    make, forwards = GUIDED[family]
    pipe, seen = make(), Trajectory()
    dense = sample_guided(pipe)
    rtlynx.apply(pipe, SparsityConfig(rank=16))
    with seen.recording(pipe.transformer):
        got = sample_guided(pipe)
    assert len(seen.calls) == 3 * forwards
    assert got.shape == dense.shape and got.isfinite().all()
    assert 1e-4 < relative_error(got, dense) < 0.3 and relative_error(sample_guided(pipe, 1.0), got) > 1e-3
    assert torch.equal(with_dense_layers(pipe, lambda: sample_guided(pipe)), dense)
    assert torch.equal(sample_guided(rtlynx.remove(pipe)), dense)


def schnell(pipe: Any) -> Tensor:
    return sample(pipe, num_inference_steps=4, guidance_scale=0.0, output_type="latent")


def turbo(pipe: Any) -> Tensor:
    prompt = [torch.randn(11, 64, generator=torch.Generator().manual_seed(6))]
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0, "output_type": "latent", "generator": torch.Generator().manual_seed(7)}
    latents: Tensor = pipe(prompt_embeds=prompt, **settings, height=128, width=128).images
    return latents


@pytest.mark.parametrize(("make", "draw"), [(flux_pipeline, schnell), (z_image_turbo_pipeline, turbo)])
def test_few_steps_of_a_distilled_model(make: Callable[[], Any], draw: Callable[[Any], Tensor]) -> None:
    pipe = rtlynx.apply(make(), SparsityConfig(rank=16))
    forwards: list[int] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    plain = draw(pipe)
    handle.remove()
    assert len(forwards) == 4  # no guidance
    dense = with_dense_layers(pipe, lambda: draw(pipe))
    rtlynx.calibrate(pipe, run=lambda: draw(pipe), progress=False)
    # Measured, 0.010 and 0.085, and 0.006 and 0.059 once calibrated.
    assert 1e-3 < relative_error(draw(pipe), dense) < 0.8 * relative_error(plain, dense) < 0.1


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading_of_a_pipeline(kind: str) -> None:
    pipe = sparse()
    want = sample(pipe)
    cpu = torch.device("cpu")
    pipe.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=1)
    assert hasattr(pipe.transformer.transformer_blocks[0].attn.to_q if kind == "leaf_level" else pipe.transformer, "_diffusers_hook")
    for _ in range(2):
        assert torch.equal(sample(pipe), want)


def check_control(pipe: Any, draw: Callable[..., Tensor]) -> None:
    """The transformer is made sparse, then the ControlNet too, and both dense again; ``draw`` takes how much the ControlNet counts."""
    dense = draw()
    assert relative_error(draw(0.0), dense) > 1e-3
    rtlynx.apply(pipe)
    transformer = draw()
    assert not sparse_layers(pipe.controlnet)
    rtlynx.apply(pipe.controlnet)
    both = draw()
    assert transformer.isfinite().all() and both.isfinite().all()
    assert not torch.equal(transformer, dense) and not torch.equal(both, transformer)
    rtlynx.remove(pipe.controlnet)
    assert torch.equal(draw(), transformer)
    rtlynx.remove(pipe)
    assert torch.equal(draw(), dense)


def test_a_controlnet_pipeline() -> None:
    pipe = flux_pipeline()
    parts = {key: value for key, value in pipe.components.items() if key not in ("image_encoder", "feature_extractor")}
    with_control = FluxControlNetPipeline(**parts, controlnet=flux_controlnet())
    with_control.set_progress_bar_config(disable=True)
    image = picture()

    def draw(scale: float = 1.0) -> Tensor:
        return sample(with_control, control_image=image, controlnet_conditioning_scale=scale)

    check_control(with_control, draw)


def test_lora_files_come_and_go() -> None:
    pipe = sparse()
    plain = sample(pipe)
    pipe.load_lora_weights(flux_lora(1), adapter_name="style")
    style = sample(pipe)
    pipe.load_lora_weights(flux_lora(2), adapter_name="subject")
    pipe.set_adapters(["style", "subject"], [1.0, 0.5])
    both = sample(pipe)
    assert relative_error(style, plain) > 1e-4 and relative_error(both, style) > 1e-4
    pipe.set_adapters("style")
    assert torch.equal(sample(pipe), style)
    pipe.disable_lora()
    assert torch.equal(sample(pipe), plain)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe), plain)
    assert sum(isinstance(m, SparseLinear) for m in pipe.transformer.modules()) == TINY["flux"].sparse_layers


def test_lora_files_of_a_compiled_transformer() -> None:
    """Loaded before compiling, and exchanged after: what is compiled follows."""

    def with_lora(seed: int, compiled: bool) -> Tensor:
        torch._dynamo.reset()
        pipe = sparse()
        pipe.load_lora_weights(flux_lora(1), adapter_name="style")
        if compiled:
            pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
            sample(pipe)
        if seed != 1:
            pipe.load_lora_weights(flux_lora(seed), adapter_name="subject")
            pipe.set_adapters("subject")
        return sample(pipe)

    drawn = {seed: with_lora(seed, compiled=True) for seed in (1, 2)}
    assert relative_error(drawn[1], drawn[2]) > 1e-3
    for seed, got in drawn.items():
        assert relative_error(got, with_lora(seed, compiled=False)) < 1e-4


def test_fusing_a_lora_file(caplog: pytest.LogCaptureFixture) -> None:
    pipe = sparse()
    rtlynx.calibrate(pipe, run=lambda: sample(pipe), progress=False)
    plain = sample(pipe)
    pipe.load_lora_weights(flux_lora(1), adapter_name="style")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q.base_layer
    bias = layer.comp_bias.clone()
    pipe.fuse_lora()
    assert not torch.allclose(layer.comp_bias, bias)  # what makes up for the shift follows the weight
    assert "fitted to other weights" in caplog.text
    assert relative_error(sample(pipe), plain) > 1e-4
    pipe.unfuse_lora()
    torch.testing.assert_close(layer.comp_bias, bias)
    pipe.unload_lora_weights()
    torch.testing.assert_close(sample(pipe), plain, rtol=1e-2, atol=1e-2)


def test_image_to_image_and_inpainting() -> None:
    pipe = sparse()
    parts = {key: value for key, value in pipe.components.items() if key not in ("image_encoder", "feature_extractor")}
    image, mask = picture(), torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    steps = {"num_inference_steps": 7, "strength": 0.85}  # five of them: the first is not from noise alone
    for kind, arguments, most in ((FluxImg2ImgPipeline, steps, 5e-3), (FluxInpaintPipeline, {**steps, "mask_image": mask}, 3.4e-3)):
        other = kind(**parts)
        other.set_progress_bar_config(disable=True)

        def draw(image: Tensor = image, other: Any = other, arguments: dict[str, Any] = arguments) -> Tensor:
            return sample(other, image=image, **arguments)

        got = draw()
        assert got.shape == (1, 3, 32, 32)
        assert 1e-3 < relative_error(got, with_dense_layers(other, draw)) < most  # measured, 0.0044 and 0.0029
        assert relative_error(draw(1 - image), got) > 3e-2
        assert all(row.sparse for row in rtlynx.summary(other) if row.name.endswith("attn.to_q"))


MASK = {"mask_image": torch.cat([torch.zeros(1, 1, 32, 16), torch.ones(1, 1, 32, 16)], 3)}


@pytest.mark.parametrize(
    ("make", "kind", "arguments"),
    [
        (sd3_pipeline, StableDiffusion3Img2ImgPipeline, {}),
        (z_image_pipeline, ZImageImg2ImgPipeline, {}),  # SD3 inpaints in 16 channels only
        (z_image_pipeline, ZImageInpaintPipeline, MASK),
    ],
)
def test_image_to_image_and_inpainting_of_other_families(make: Callable[[], Any], kind: Any, arguments: dict[str, Any]) -> None:
    parts = {key: value for key, value in make().components.items() if key not in ("image_encoder", "feature_extractor")}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    image = picture()

    def draw(image: Tensor = image) -> Tensor:
        return sample_guided(pipe, image=image, strength=0.6, **arguments)  # two steps of three: the first is not from noise alone

    dense = draw()
    assert relative_error(draw(1 - image), dense) > 3e-2
    rtlynx.apply(pipe, SparsityConfig(rank=16))
    got = draw()
    assert got.shape == dense.shape == (1, 3, 32, 32) and 1e-4 < relative_error(got, dense) < 0.3
    assert torch.equal(with_dense_layers(pipe, draw), dense)


def test_a_controlnet_of_sd3() -> None:
    pipe = sd3_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = SD3ControlNetModel.from_transformer(pipe.transformer, num_layers=2, num_extra_conditioning_channels=0).eval()
        for block in controlnet.controlnet_blocks:
            torch.nn.init.normal_(block.weight, std=0.05)
        torch.nn.init.normal_(controlnet.pos_embed_input.proj.weight, std=0.05)
    parts = {key: value for key, value in pipe.components.items() if key not in ("image_encoder", "feature_extractor")}
    with_control = StableDiffusion3ControlNetPipeline(**parts, controlnet=controlnet)
    with_control.set_progress_bar_config(disable=True)
    image = picture()

    def draw(scale: float = 1.0) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)  # the pipeline encodes the condition with noise that its generator does not know
            return sample_guided(with_control, control_image=image, controlnet_conditioning_scale=scale)

    check_control(with_control, draw)


def test_another_pipeline_of_the_same_parts_is_sparse_too() -> None:
    pipe = sparse()
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert sum(row.sparse for row in rtlynx.summary(other)) == TINY["flux"].sparse_layers
