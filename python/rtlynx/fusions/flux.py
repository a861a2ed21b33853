"""FLUX.1's single-stream block."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor

from rtlynx.fusions.fusion import Fusion
from rtlynx.fusions.known import known_to_hooks
from rtlynx.fusions.single_stream import clipped, fusion_of

_forward = transformer_flux.FluxSingleTransformerBlock.forward  # of the class itself torch.compile would not trace it


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """With the activation of the feed-forward and its concatenation with the attention in ``proj_out``."""

    unfused = transformer_flux.FluxSingleTransformerBlock
    written_for = "shape torch cat norm act_mlp proj_mlp attn unsqueeze proj_out dtype float16 clip"

    def fusion(self) -> Fusion | None:
        """What ``proj_out`` takes in now; None where nothing."""
        return fusion_of(self)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers has it."""
        fusion = FluxSingleTransformerBlock.fusion(self)
        samples, text = encoder_hidden_states.shape[:2]
        if fusion is None or not fusion.pays(samples * (text + hidden_states.shape[1]), hidden_states.device):
            return _forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        both = torch.cat([encoder_hidden_states, hidden_states], 1)
        normed, gate = self.norm(both, emb=temb)
        mlp = self.proj_mlp(normed)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        update = fusion.layer.select_activated(mlp, fusion.activation, head=attended)
        both = clipped(both + gate.unsqueeze(1) * update)
        return both[:, :text], both[:, text:]


known_to_hooks(FluxSingleTransformerBlock)
