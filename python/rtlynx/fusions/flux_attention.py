"""FLUX.1's attention, which is Chroma's too."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from rtlynx.fusions.rotary import rotated, rotates, rotation

_forward = transformer_flux.FluxAttention.forward  # of the class itself torch.compile would not trace it


class FluxAttention(transformer_flux.FluxAttention):
    """With fewer passes between the projections and attention, eager.

    Only with the processor that diffusers sets; an IP adapter's, or a user's, is called as ever.
    """

    unfused = transformer_flux.FluxAttention
    has_layers = False
    replaces = (_forward, FluxAttnProcessor.__call__, transformer_flux.apply_rotary_emb)
    written_for = (
        # forward
        "set inspect signature processor __call__ parameters keys items len logger warning __class__ __name__"
        # the processor
        " _get_qkv_projections unflatten head_dim norm_q norm_k added_kv_proj_dim norm_added_q norm_added_k torch cat apply_rotary_emb"
        " dispatch_attention_fn _attention_backend _parallel_config flatten to dtype split_with_sizes shape to_out contiguous to_add_out"
        # the rotary embedding
        " ValueError device reshape unbind stack float view_as_complex unsqueeze view_as_real type_as"
    )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As diffusers has it."""
        processor = self.processor
        if kwargs or type(processor) is not FluxAttnProcessor or not rotates(hidden_states, image_rotary_emb, self.head_dim):
            return _forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.head_dim))  # type: ignore[no-any-return]

        query, key, value, *of_text = transformer_flux._get_qkv_projections(self, hidden_states, encoder_hidden_states)
        queries, keys, value = [self.norm_q(heads(query))], [self.norm_k(heads(key))], heads(value)
        if self.added_kv_proj_dim is not None:  # the text comes first
            text_query, text_key, text_value = map(heads, of_text)
            queries.insert(0, self.norm_added_q(text_query))
            keys.insert(0, self.norm_added_k(text_key))
            value = torch.cat([text_value, value], 1)
        angles = rotation(image_rotary_emb)
        query, key = rotated(queries, angles), rotated(keys, angles)
        attended = transformer_flux.dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        attended = attended.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return attended  # type: ignore[no-any-return]
        length = encoder_hidden_states.shape[1]
        image = self.to_out[1](self.to_out[0](attended[:, length:].contiguous()))
        return image, self.to_add_out(attended[:, :length].contiguous())
