"""What attention of FLUX.1 and FLUX.2 does alike: image and text are projected apart, and attend together."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rtlynx.fusions import rotary

NAMES = (
    # forward
    "set inspect signature processor __call__ parameters keys items len logger warning __class__ __name__"
    # the processor
    " _get_qkv_projections unflatten head_dim norm_q norm_k added_kv_proj_dim norm_added_q norm_added_k torch cat apply_rotary_emb"
    " dispatch_attention_fn _attention_backend _parallel_config flatten to dtype split_with_sizes shape to_out contiguous to_add_out"
    # the rotary embedding
    f" {rotary.NAMES}"
)
"""What diffusers' forward, processor and rotary embedding use: see `known.why_not`."""


def norms(attention: Any) -> tuple[list[nn.Module], list[nn.Module]]:
    """What the queries and the keys go through, those of the text first where it has its own."""
    queries, keys = [attention.norm_q], [attention.norm_k]
    if attention.added_kv_proj_dim is not None:
        queries.insert(0, attention.norm_added_q)
        keys.insert(0, attention.norm_added_k)
    return queries, keys


def rotates(attention: Any, hidden_states: Tensor, embedding: Any) -> bool:
    """Whether a call of it may be `attended`: see `rotary.rotates`."""
    queries, keys = norms(attention)
    return rotary.rotates(hidden_states, embedding, attention.head_dim, *queries, *keys)


def attended(
    attention: nn.Module,
    home: ModuleType,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
    embedding: tuple[Tensor, Tensor],
) -> Tensor:
    """What the processor that diffusers sets does before the output projections, with fewer passes; asked `rotates` before.

    Args:
        attention: ``FluxAttention`` or ``Flux2Attention``, with H heads of D channels.
        home: The module of diffusers that it comes from.
        hidden_states: ``(B, s, C)``.
        encoder_hidden_states: ``(B, t, C)`` or None.
        attention_mask: As diffusers' attention takes it.
        embedding: See `rotary.rotates`.

    Returns:
        ``(B, t + s, H · D)``.
    """
    processor: Any = attention.processor

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attention.head_dim))  # type: ignore[no-any-return]

    query, key, value, *of_text = home._get_qkv_projections(attention, hidden_states, encoder_hidden_states)
    queries, keys, value = [heads(query)], [heads(key)], heads(value)
    if attention.added_kv_proj_dim is not None:  # the text comes first
        text_query, text_key, text_value = (heads(each) for each in of_text)
        queries.insert(0, text_query)
        keys.insert(0, text_key)
        value = torch.cat([text_value, value], 1)
    query_norms, key_norms = norms(attention)
    query, key = rotary.normed_and_rotated([(queries, query_norms), (keys, key_norms)], embedding)
    together = home.dispatch_attention_fn(
        query, key, value, attn_mask=attention_mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return together.flatten(2, 3).to(query.dtype)  # type: ignore[no-any-return]
