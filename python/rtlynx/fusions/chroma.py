"""Chroma's single-stream block: FLUX.1's, with a mask and without the text apart."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_chroma
from torch import Tensor

from rtlynx.fusions.fusion import Fusion
from rtlynx.fusions.known import known_to_hooks
from rtlynx.fusions.single_stream import clipped, fusion_of

_forward = transformer_chroma.ChromaSingleTransformerBlock.forward  # of the class itself torch.compile would not trace it


class ChromaSingleTransformerBlock(transformer_chroma.ChromaSingleTransformerBlock):
    """With the activation of the feed-forward and its concatenation with the attention in ``proj_out``."""

    unfused = transformer_chroma.ChromaSingleTransformerBlock
    written_for = "torch cat norm act_mlp proj_mlp attn unsqueeze proj_out dtype float16 clip"

    def fusion(self) -> Fusion | None:
        """What ``proj_out`` takes in now; None where nothing."""
        return fusion_of(self)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """As diffusers has it."""
        fusion = ChromaSingleTransformerBlock.fusion(self)
        if fusion is None or not fusion.pays(hidden_states.shape[:-1].numel(), hidden_states.device):
            return _forward(  # type: ignore[no-any-return]
                self, hidden_states, temb, image_rotary_emb, attention_mask, joint_attention_kwargs
            )
        normed, gate = self.norm(hidden_states, emb=temb)
        mlp = self.proj_mlp(normed)
        pairs = None if attention_mask is None else attention_mask[:, None, None, :] * attention_mask[:, None, :, None]
        attended = self.attn(
            hidden_states=normed, image_rotary_emb=image_rotary_emb, attention_mask=pairs, **(joint_attention_kwargs or {})
        )
        return clipped(fusion.layer.select_activated(mlp, fusion.activation, head=attended, residual=hidden_states, residual_gate=gate))


known_to_hooks(ChromaSingleTransformerBlock)
