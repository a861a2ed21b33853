"""HunyuanVideo's single-stream block: the text comes last, and attention takes the two apart."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_hunyuan_video
from torch import Tensor

from rtlynx.fusions.fusion import Fusion
from rtlynx.fusions.known import known_to_hooks
from rtlynx.fusions.single_stream import fusion_of, joined

_forward = transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock.forward  # of the class itself torch.compile would not trace it


class HunyuanVideoSingleTransformerBlock(transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock):
    """With the activation of the feed-forward and its concatenation with the attention in ``proj_out``."""

    unfused = transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock
    written_for = "shape torch cat norm act_mlp proj_mlp attn unsqueeze proj_out"

    def fusion(self) -> Fusion | None:
        """What ``proj_out`` takes in now; None where nothing."""
        return fusion_of(self)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers has it."""
        fusion = HunyuanVideoSingleTransformerBlock.fusion(self)
        samples, text = encoder_hidden_states.shape[:2]
        if fusion is None or not fusion.pays(samples * (text + hidden_states.shape[1]), hidden_states.device):
            return _forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, temb, attention_mask, image_rotary_emb, *args, **kwargs
            )
        both = joined(hidden_states, encoder_hidden_states)
        normed, gate = self.norm(both, emb=temb)
        mlp = self.proj_mlp(normed)
        attended = self.attn(
            hidden_states=normed[:, :-text],
            encoder_hidden_states=normed[:, -text:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )
        head = torch.cat(attended, 1)
        both = fusion.layer.select_activated(mlp, fusion.activation, head=head, residual=both, residual_gate=gate)
        return both[:, :-text], both[:, -text:]


known_to_hooks(HunyuanVideoSingleTransformerBlock)
