"""Wan's attention, over the video and to the text, and in image-to-video models to an image as well."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from rtlynx.fusions import fusion, rotary

_forward = transformer_wan.WanAttention.forward  # of the class itself torch.compile would not trace it


class WanAttention(transformer_wan.WanAttention):
    """With fewer passes between the projections and attention, eager.

    Only with the processor that diffusers sets; a user's is called as ever, and so is one whose tokens are on several devices.
    """

    unfused = transformer_wan.WanAttention
    has_layers = False
    replaces = (_forward, WanAttnProcessor.__call__)
    written_for = (
        # forward
        "processor"
        # the processor
        " add_k_proj shape _get_qkv_projections norm_q norm_k unflatten heads _get_added_kv_projections norm_added_k dispatch_attention_fn"
        " _attention_backend _parallel_config flatten type_as to_out"
        # the rotary embedding
        " torch Tensor unbind empty_like"
    )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As diffusers has it."""
        if kwargs or rotary_emb is None or not is_written_here(self, hidden_states, rotary_emb):
            return _forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
            )
        x = attended(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        return self.to_out[1](self.to_out[0](x))  # type: ignore[no-any-return]


def is_written_here(attention: Any, x: Tensor, embedding: Any) -> bool:
    """Whether a call of it may be `attended` and the output layers: eager, without gradients, by the processor it comes with.

    Args:
        attention: ``WanAttention``.
        x: ``(B, S, C)``.
        embedding: Wan's is ``(cos, sin)``, each ``(1, S, 1, D)``, every angle twice in a row; None where nothing is rotated.
    """
    processor = attention.processor
    if type(processor) is not WanAttnProcessor or getattr(processor, "_parallel_config", None) is not None:
        return False
    if torch.is_grad_enabled() or not fusion.eager(x):
        return False
    if embedding is None:
        return True
    if not isinstance(embedding, tuple) or len(embedding) != 2:
        return False
    wanted = (1, x.shape[1], 1, attention.inner_dim // attention.heads)
    return all(
        isinstance(each, Tensor) and (each.shape, each.device) == (wanted, x.device) and each.dtype in (torch.float32, x.dtype)
        for each in embedding
    )


def attended(attention: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, embedding: tuple[Tensor, Tensor] | None) -> Tensor:
    """What the processor does before the output layers; asked `is_written_here` before.

    Args:
        attention: With H heads of D channels.
        x, embedding: See `is_written_here`.
        text: ``(B, t, C)``; where the attention has projections for an image, that comes before the 512 of the text. None: x.
        mask: As diffusers' attention takes it.

    Returns:
        ``(B, S, H · D)``.
    """
    image = None
    if attention.add_k_proj is not None:
        image, text = text.tensor_split([text.shape[1] - 512], 1)  # type: ignore[union-attr]  # as many as diffusers takes for the text

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(2, (attention.heads, -1))  # type: ignore[no-any-return]

    def attend(key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        backend = attention.processor._attention_backend
        together = transformer_wan.dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
        return together.flatten(2, 3).type_as(query)  # type: ignore[no-any-return]

    query, key, value = transformer_wan._get_qkv_projections(attention, x, text)
    query, key, value = heads(attention.norm_q(query)), heads(attention.norm_k(key)), heads(value)
    if embedding is not None:
        rotation = _rotation(*embedding)
        query, key = rotary.rotated([query], rotation), rotary.rotated([key], rotation)
    if image is None:
        return attend(key, value, mask)
    image_key, image_value = transformer_wan._get_added_kv_projections(attention, image)
    of_image = attend(heads(attention.norm_added_k(image_key)), heads(image_value))
    return attend(key, value, mask) + of_image


def _rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """Wan's embedding as `rotary.rotated` takes it."""
    return torch.complex(cos[0, ..., ::2].float(), sin[0, ..., 1::2].float())
