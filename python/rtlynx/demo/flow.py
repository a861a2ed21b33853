"""Rectified-flow training of the demo's transformer: the loss, one step, the moving average, what a checkpoint holds.

Flow: x_s = (1 - s) picture + s noise with noise level s from 0 to 1; the model predicts the velocity noise - picture. X. Liu et al.,
"Flow Straight and Fast", https://arxiv.org/abs/2209.03003; logit-normal levels from P. Esser et al., https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

from .captions import PAD, encode, tokens
from .drawing import draw
from .model import Preset, build_transformer, model_time, pack, position_ids
from .scenes import random_scenes

_LOG = logging.getLogger("rtlynx.demo.train")

_DROPPED_CAPTIONS = 0.1  # share trained without a caption, so that guidance is possible
_WARMUP_STEPS = 200
_AVERAGE_DECAY = 0.998  # the average reaches back about 500 steps; the falling learning rate does the rest
_MAX_GRADIENT_NORM = 1.0


class FlowTrainer:
    """The model in training, its moving average, optimiser and random state. Data are drawn on the device as they are needed."""

    def __init__(self, preset: Preset, device: torch.device, seed: int) -> None:
        self.preset = preset
        self.device = device
        self.step = 0
        self.transformer = build_transformer(preset, seed).to(device).train()
        self.average: FluxTransformer2DModel = copy.deepcopy(self.transformer).eval().requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            self.transformer.parameters(), lr=preset.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
        )
        self.generator = torch.Generator(device).manual_seed(seed)
        self._image_ids, self._text_ids = position_ids(device)

    def compile(self) -> None:
        """Compile the blocks and run them once; carry on uncompiled, with a warning, where the compiler fails.

        Whatever this run draws is not taken from the training data's random numbers.
        """
        state = self.generator.get_state()
        try:
            self.transformer.compile_repeated_blocks(dynamic=False)
            self._loss().backward()
        except Exception as error:  # the compiler's failures have no common type
            _LOG.warning("torch.compile failed, training uncompiled: %s", error)
            for module in self.transformer.modules():
                module._compiled_call_impl = None
        self.transformer.zero_grad(set_to_none=True)
        self.generator.set_state(state)

    def train_step(self, progress: float) -> torch.Tensor:
        """One optimiser step at ``progress`` in 0..1 of the whole training; returns the loss without waiting for the device."""
        rate = self.learning_rate(progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self._loss()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), _MAX_GRADIENT_NORM)
        self.optimiser.step()
        self.step += 1
        self._update_average()
        return loss.detach()

    def learning_rate(self, progress: float) -> float:
        """Linear warm-up over the first steps, then linearly down to zero at the end of the training."""
        return self.preset.learning_rate * min(1.0, (self.step + 1) / _WARMUP_STEPS) * max(0.0, 1.0 - progress)

    def _loss(self) -> torch.Tensor:
        n, generator, device = self.preset.batch, self.generator, self.device
        scenes = random_scenes(n, generator)
        words = tokens(scenes)
        words = words.masked_fill(torch.rand(n, 1, generator=generator, device=device) < _DROPPED_CAPTIONS, PAD)
        embeds, pooled = encode(words)

        pictures = pack(draw(scenes, generator))
        noise = torch.randn(pictures.shape, generator=generator, device=device)
        sigma = torch.randn(n, generator=generator, device=device).sigmoid()
        level = sigma[:, None, None]
        on_gpu = device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            velocity = self.transformer(
                hidden_states=(1 - level) * pictures + level * noise,
                timestep=model_time(sigma, torch.bfloat16 if on_gpu else torch.float32),
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                img_ids=self._image_ids,
                txt_ids=self._text_ids,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - pictures)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(_AVERAGE_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.transformer.parameters()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "transformer": self.transformer.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.transformer.load_state_dict(state["transformer"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"].cpu())
