"""`ScenesPipeline`: a diffusers text-to-image pipeline around the demo's transformer.

Its annotations are classes, not strings: diffusers before 0.37 looks up in them what it has to load.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from rtlynx.errors import InvalidArgumentError

from . import captions
from .images import to_pil
from .model import CHANNELS, TOKENS, model_time, position_ids, unpack

DEFAULT_WEIGHTS = Path(__file__).parent / "weights"  # the pipeline folder that ships with the package


@dataclass
class ScenesPipelineOutput(BaseOutput):
    """``images``: PIL images, or a NumPy array (n, 64, 64, 3) or tensor (n, 3, 64, 64) in 0..1."""

    images: list[Image.Image] | np.ndarray | torch.Tensor


class ScenesPipeline(DiffusionPipeline):
    """Draws 64 x 64 pictures from captions such as ``"a red circle at the top left on yellow stripes"`` (see `captions`).

    Rectified flow in pixel space: there is no VAE, and no text encoder. Load it with
    ``ScenesPipeline.from_pretrained(DEFAULT_WEIGHTS)``.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ("latents", "velocity")

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """``encoder_hidden_states`` (n, 16, 96) and ``pooled_projections`` (n, 48) of prompts, in the transformer's dtype.

        Raises:
            InvalidArgumentError: a prompt outside the language of `captions`.
        """
        scenes = captions.parse([prompt] if isinstance(prompt, str) else list(prompt))
        return captions.encode(captions.tokens(scenes).to(self._execution_device), self.transformer.dtype)

    def prepare_latents(
        self, n: int, generator: torch.Generator | list[torch.Generator] | None = None, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Starting noise (n, 256, 48), float32: drawn from the generator(s), or ``latents`` after a check of its shape."""
        shape = (n, TOKENS, CHANNELS)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise InvalidArgumentError("ScenesPipeline", "latents", f"shape {tuple(latents.shape)}", f"shape {shape}")
        return latents.to(self._execution_device, torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ScenesPipelineOutput | tuple[Any]:
        """Sample one picture per prompt (times ``num_images_per_prompt``) by Euler steps from noise to data.

        Args:
            prompt: One caption or several.
            guidance_scale: 1 (default) runs the transformer once per step; above 1, classifier-free guidance runs it on
                twice the batch.
            latents: Starting noise (n, 256, 48) instead of drawing it.
            output_type: "pil", "np" or "pt"; "latent" returns the packed pictures (n, 256, 48) in [-1, 1].
            callback_on_step_end: Called after each step with (pipeline, step, timestep, tensors); may return
                ``{"latents": ...}`` to replace them.
            callback_on_step_end_tensor_inputs: Of "latents" (after the step) and "velocity" (what the step followed).

        Raises:
            InvalidArgumentError: a prompt outside the language, or an argument outside what is described here.
        """
        self._check(num_inference_steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)
        device, dtype = self._execution_device, self.transformer.dtype
        embeds, pooled = (tensor.repeat_interleave(num_images_per_prompt, 0) for tensor in self.encode_prompt(prompt))
        latents = self.prepare_latents(len(embeds), generator, latents)
        guided = guidance_scale > 1
        if guided:
            nothing = torch.full((len(embeds), captions.MAX_TOKENS), captions.PAD, device=device)
            no_embeds, no_pooled = captions.encode(nothing, dtype)
            embeds, pooled = torch.cat([no_embeds, embeds]), torch.cat([no_pooled, pooled])
        image_ids, text_ids = position_ids(device)

        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), device=device)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                batch = torch.cat([latents, latents]) if guided else latents
                velocity = self.transformer(
                    hidden_states=batch.to(dtype),
                    timestep=model_time((timestep / 1000).expand(len(batch)), dtype),
                    encoder_hidden_states=embeds,
                    pooled_projections=pooled,
                    img_ids=image_ids,
                    txt_ids=text_ids,
                    return_dict=False,
                )[0].float()
                if guided:
                    without, with_prompt = velocity.chunk(2)
                    velocity = without + guidance_scale * (with_prompt - without)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "velocity": velocity}
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, step, timestep, asked).pop("latents", latents)
                progress.update()

        self.maybe_free_model_hooks()
        images = latents if output_type == "latent" else _as_output(unpack(latents), output_type)
        return ScenesPipelineOutput(images=images) if return_dict else (images,)

    def _check(self, steps: int, images_per_prompt: int, output_type: str, tensor_inputs: Sequence[str]) -> None:
        def refuse(argument: str, got: object, expected: str) -> None:
            raise InvalidArgumentError("ScenesPipeline", argument, got, expected)

        if steps < 1:
            refuse("num_inference_steps", steps, "at least 1")
        if images_per_prompt < 1:
            refuse("num_images_per_prompt", images_per_prompt, "at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            refuse("output_type", output_type, '"pil", "np", "pt" or "latent"')
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            refuse("callback_on_step_end_tensor_inputs", unknown, f"names among {self._callback_tensor_inputs}")


def _as_output(pictures: torch.Tensor, output_type: str) -> list[Image.Image] | np.ndarray | torch.Tensor:
    if output_type == "pil":
        return to_pil(pictures)
    unit = (pictures * 0.5 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
