"""A whole pipeline of diffusers with a sparse transformer: LoRA files, image to image, inpainting, batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline

import rtlynx
from rtlynx import SparseLinear, SparsityConfig
from tiny_models import TINY, relative_error
from tiny_pipelines import flux_lora, flux_pipeline, sample


@pytest.fixture(autouse=True)
def others_warnings_are_not_ours() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(diffusers|peft|transformers|torch)\b.*")
        yield


def sparse() -> Any:
    return rtlynx.apply(flux_pipeline(), SparsityConfig(rank=16))


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
    assert sample(pipe, batch=2).shape == (2, 3, 32, 32)
    assert sample(pipe, num_images_per_prompt=3).shape == (3, 3, 32, 32)


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
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    for kind, arguments in ((FluxImg2ImgPipeline, {}), (FluxInpaintPipeline, {"mask_image": mask})):
        other = kind(**parts)
        other.set_progress_bar_config(disable=True)
        got = sample(other, image=image, strength=0.7, **arguments)
        assert got.shape == (1, 3, 32, 32) and got.isfinite().all()
        assert all(row.sparse for row in rtlynx.summary(other) if row.name.endswith("attn.to_q"))


def test_another_pipeline_of_the_same_parts_is_sparse_too() -> None:
    pipe = sparse()
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    assert sum(row.sparse for row in rtlynx.summary(other)) == TINY["flux"].sparse_layers
