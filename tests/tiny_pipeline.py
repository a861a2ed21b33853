"""A pipeline of the demo's world around a tiny untrained transformer, and prompts for it."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from rtlynx.demo.model import PRESETS, build_transformer
from rtlynx.demo.pipeline import ScenesPipeline

PROMPTS = ("a red circle at the top left on yellow stripes", "a blue star at the centre on plain cyan")


def tiny_pipeline() -> ScenesPipeline:
    """The same weights every time."""
    transformer = build_transformer(PRESETS["tiny"]).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if not parameter.any():  # a fresh model starts as the identity and predicts zero: give it something to say
            nn.init.normal_(parameter, std=0.05, generator=generator)
    pipe = ScenesPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
