"""Pipelines of diffusers beyond those of `tiny_pipelines`, and what to call them with: editing, filling, more families, Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    LTXPipeline,
    PixArtSigmaPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tiny_models import NEIGHBOURS, TINY
from tiny_pipelines import autoencoder, picture


@dataclass(frozen=True)
class Whole:
    """One pipeline with random weights: its parts put together, what a call of it takes, and what comes of that.

    Attributes:
        make: Makes the pipeline, the same weights every time.
        arguments: Makes the keyword arguments of a call, but for the generator.
        sparse_layers: How many layers of its transformer are eligible.
        selections: How many selections a call takes, of 3 steps: layers that read one tensor share one.
        shape: That of the pictures or of the video.
    """

    make: Callable[[], Any]
    arguments: Callable[[], dict[str, Any]]
    sparse_layers: int
    selections: int
    shape: tuple[int, ...]


def draw(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    """Pixels of three steps with fixed noise."""
    settings = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(7), "return_dict": False}
    pixels: Tensor = pipe(**{**settings, **arguments})[0]
    return pixels


def noise(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pil_picture(seed: int = 8) -> Image.Image:
    """Of 64×64 pixels."""
    values = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return make().eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()


def _guided_flux(**config: Any) -> nn.Module:
    """The small FLUX.1, told the guidance as the released editing models are."""
    small = {key: value for key, value in TINY["flux"].build("meta", torch.float32).config.items() if not key.startswith("_")}
    model: nn.Module = _seeded(lambda: FluxTransformer2DModel(**{**small, "guidance_embeds": True, **config}))
    return model


def _kontext() -> Any:
    return _quiet(FluxKontextPipeline(_scheduler(), autoencoder(), None, None, None, None, _guided_flux()))


def _flux_arguments(**more: Any) -> dict[str, Any]:
    prompt = {"prompt_embeds": noise(1, 11, 64), "pooled_prompt_embeds": noise(1, 32)}
    return {**prompt, "image": picture(), "height": 32, "width": 32, **more}


def _fill() -> Any:
    """The transformer reads what is made, what is given and, of every pixel, whether it is to be filled: 16 channels each."""
    return _quiet(FluxFillPipeline(_scheduler(), autoencoder(), None, None, None, None, _guided_flux(in_channels=48, out_channels=16)))


def right_half() -> Tensor:
    """The mask of it."""
    return torch.cat([torch.zeros(1, 1, 32, 16), torch.ones(1, 1, 32, 16)], 3)


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_processor() -> Any:
    """Every byte is a token, and every special word of the template."""
    words = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], extra_special_tokens=list(SPECIAL[1:]))
    pictures = Qwen2VLImageProcessor(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56)
    return Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor())


def _qwen_text_encoder(token: Callable[[str], int]) -> Any:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return _seeded(lambda: Qwen2_5_VLForConditionalGeneration(config))


def _qwen_image_edit(kind: Any = QwenImageEditPipeline, **config: Any) -> Any:
    """With a text encoder that reads the prompt and the pictures."""

    def vae() -> nn.Module:
        return AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )

    processor = _qwen_processor()
    tokenizer = processor.tokenizer
    small = TINY["qwen_image"].build("cpu", torch.float32)
    transformer = _seeded(lambda: type(small).from_config({**small.config, **config})) if config else small
    encoder = _qwen_text_encoder(tokenizer.convert_tokens_to_ids)
    return _quiet(kind(_scheduler(), _seeded(vae), encoder, tokenizer, processor, transformer))


def _qwen_image_edit_arguments(image: Any) -> dict[str, Any]:
    return {"image": image, "prompt": "paint it red", "negative_prompt": " ", "height": 64, "width": 64}


def _pixart_sigma() -> Any:
    transformer = NEIGHBOURS["pixart"].build("cpu", torch.float32)
    return _quiet(PixArtSigmaPipeline(None, None, autoencoder(), transformer, DPMSolverMultistepScheduler()))


def _masked(**more: Any) -> dict[str, Any]:
    """A prompt against another; the last words of the second are padding."""
    masks = {"prompt_attention_mask": torch.ones(1, 11).long(), "negative_prompt_attention_mask": (torch.arange(11) < 6).long()[None]}
    return {"prompt_embeds": noise(1, 11, 64), "negative_prompt_embeds": noise(1, 11, 64, seed=5), **masks, **more}


def _ltx() -> Any:
    def vae() -> nn.Module:
        return AutoencoderKLLTXVideo(
            latent_channels=16,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        )

    return _quiet(LTXPipeline(_scheduler(), _seeded(vae), None, None, NEIGHBOURS["ltx"].build("cpu", torch.float32)))


def _hunyuan_video() -> Any:
    def vae() -> nn.Module:
        return AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4)

    transformer = NEIGHBOURS["hunyuan_video"].build("cpu", torch.float32)
    return _quiet(HunyuanVideoPipeline(None, None, transformer, _seeded(vae), _scheduler(), None, None))


def _hunyuan_video_arguments() -> dict[str, Any]:
    prompt = {"prompt_embeds": noise(1, 11, 64), "pooled_prompt_embeds": noise(1, 32)}
    mask = (torch.arange(11) < 8).long()[None]  # the last words are padding
    return {**prompt, "prompt_attention_mask": mask, "height": 64, "width": 64, "num_frames": 9}


def _flux2() -> Any:
    def vae() -> nn.Module:
        return AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )

    return _quiet(Flux2Pipeline(_scheduler(), _seeded(vae), None, None, NEIGHBOURS["flux2"].build("cpu", torch.float32)))


def _flux2_arguments(**more: Any) -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 11, 64), "height": 32, "width": 32, **more}


FLUX, QWEN_IMAGE, FLUX2 = TINY["flux"].sparse_layers, TINY["qwen_image"].sparse_layers, NEIGHBOURS["flux2"].sparse_layers
PIPELINES: dict[str, Whole] = {
    "flux_kontext": Whole(_kontext, lambda: _flux_arguments(max_area=32 * 32, _auto_resize=False), FLUX, 3 * (8 + 2 * 2), (1, 3, 32, 32)),
    "flux_fill": Whole(_fill, lambda: _flux_arguments(mask_image=right_half()), FLUX, 3 * (8 + 2 * 2), (1, 3, 32, 32)),
    "qwen_image_edit": Whole(
        _qwen_image_edit,
        lambda: _qwen_image_edit_arguments(pil_picture()),
        QWEN_IMAGE,
        3 * 2 * (2 * 8),  # two forwards a step
        (1, 3, 64, 64),
    ),
    "qwen_image_edit_2509": Whole(
        lambda: _qwen_image_edit(QwenImageEditPlusPipeline),
        lambda: _qwen_image_edit_arguments([pil_picture(), pil_picture(9)]),
        QWEN_IMAGE,
        3 * 2 * (2 * 8),
        (1, 3, 64, 64),
    ),
    "qwen_image_edit_2511": Whole(
        lambda: _qwen_image_edit(QwenImageEditPlusPipeline, zero_cond_t=True),
        lambda: _qwen_image_edit_arguments([pil_picture(), pil_picture(9)]),
        QWEN_IMAGE,
        3 * 2 * (2 * 8),
        (1, 3, 64, 64),
    ),
    "pixart_sigma": Whole(
        _pixart_sigma,
        lambda: _masked(negative_prompt=None, height=32, width=32, use_resolution_binning=False),
        NEIGHBOURS["pixart"].sparse_layers,
        3 * (2 * 7),
        (1, 3, 32, 32),
    ),
    "ltx": Whole(_ltx, lambda: _masked(height=32, width=32, num_frames=9), NEIGHBOURS["ltx"].sparse_layers, 3 * (2 * 7), (1, 9, 3, 32, 32)),
    "hunyuan_video": Whole(
        _hunyuan_video,
        _hunyuan_video_arguments,
        NEIGHBOURS["hunyuan_video"].sparse_layers,
        3 * (8 + 2 * 3 + 4),
        (1, 9, 3, 64, 64),
    ),
    "flux2": Whole(_flux2, _flux2_arguments, FLUX2, 3 * (8 + 2 * 2), (1, 3, 32, 32)),
    "flux2_edit": Whole(_flux2, lambda: _flux2_arguments(image=pil_picture()), FLUX2, 3 * (8 + 2 * 2), (1, 3, 32, 32)),
}
"""By name; those that are given a picture as well as a prompt are called with ``image``."""
