"""FLUX.1's attention, which is Chroma's too."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from rtlynx.fusions import joint_attention

_forward = transformer_flux.FluxAttention.forward  # of the class itself torch.compile would not trace it


class FluxAttention(transformer_flux.FluxAttention):
    """With fewer passes between the projections and attention: one where a kernel does all of it, else eager alone.

    Only with the processor that diffusers sets; an IP adapter's, or a user's, is called as ever.
    """

    unfused = transformer_flux.FluxAttention
    has_layers = False
    replaces = (_forward, FluxAttnProcessor.__call__, transformer_flux.apply_rotary_emb)
    written_for = joint_attention.NAMES

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers has it."""
        ready = not kwargs and type(self.processor) is FluxAttnProcessor
        if not ready or not joint_attention.rotates(self, hidden_states, image_rotary_emb):
            return _forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        attended = joint_attention.attended(self, transformer_flux, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            return attended
        text = encoder_hidden_states.shape[1]
        image = self.to_out[1](self.to_out[0](attended[:, text:].contiguous()))
        return image, self.to_add_out(attended[:, :text].contiguous())
