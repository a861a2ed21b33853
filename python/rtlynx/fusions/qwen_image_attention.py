"""The attention of Qwen-Image's blocks: what its processor does, with fewer passes between the projections and attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from rtlynx.fusions import fusion, rotary
from rtlynx.fusions.fusion import plain

REPLACED = (Attention.forward, QwenDoubleStreamAttnProcessor2_0.__call__, transformer_qwenimage.apply_rotary_emb_qwen)
"""What of diffusers' is written out here."""

NAMES = (
    # forward
    "set inspect signature processor __call__ parameters keys items len logger warning __class__ __name__"
    # the processor
    " shape torch ones bool device cat to_q to_k to_v add_q_proj add_k_proj add_v_proj inner_dim heads unflatten"
    " norm_q norm_k norm_added_q norm_added_k apply_rotary_emb_qwen dispatch_attention_fn _attention_backend _parallel_config"
    " flatten to dtype to_out contiguous to_add_out"
    # the rotary embedding
    f" {rotary.NAMES}"
)
"""What those use: see `known.why_not`."""


def is_written_here(attention: nn.Module, x: Tensor, text: Tensor, embedding: Any) -> bool:
    """Whether a call of it may be `attended` and `fusion.add_projected`: without gradients, nothing about it changed.

    Eager it is on every GPU, compiled where the rotation is `rotary.in_one_pass`.

    Args:
        attention: A block's.
        x: ``(B, s, C)``, the image's.
        text: ``(B, t, C)``.
        embedding: Qwen-Image's is one complex64 number for every token and pair of channels: ``(s, D / 2)`` and ``(t, D / 2)``.
    """
    if not plain(attention, Attention) or type(attention.processor) is not QwenDoubleStreamAttnProcessor2_0:
        return False
    if torch.is_grad_enabled() or not isinstance(embedding, tuple) or len(embedding) != 2:
        return False
    channels: int = attention.inner_dim // attention.heads  # type: ignore[assignment, operator]
    queries, keys = _norms(attention)
    if not fusion.eager(x) and not rotary.in_one_pass(x, channels, *queries, *keys):
        return False
    pairs = channels // 2
    return all(
        isinstance(each, Tensor) and (each.shape, each.dtype, each.device) == ((stream.shape[1], pairs), torch.complex64, x.device)
        for each, stream in zip(embedding, (x, text), strict=True)
    )


def _norms(attention: Any) -> tuple[list[nn.Module | None], list[nn.Module | None]]:
    """What the queries and the keys go through, the text's first."""
    return [attention.norm_added_q, attention.norm_q], [attention.norm_added_k, attention.norm_k]


def attended(attention: Any, x: Tensor, text: Tensor, text_mask: Tensor | None, embedding: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the processor does before the output projections; asked `is_written_here` before.

    Args:
        attention: With H heads of D channels.
        x, text, embedding: See `is_written_here`.
        text_mask: ``(B, t)`` bool: which of the text's tokens there are; None: all.

    Returns:
        The image's ``(B, s, H · D)`` and the text's ``(B, t, H · D)``.
    """

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, attention.inner_dim // attention.heads))  # type: ignore[no-any-return]

    query, key, value = heads(attention.to_q(x)), heads(attention.to_k(x)), heads(attention.to_v(x))
    text_query, text_key = heads(attention.add_q_proj(text)), heads(attention.add_k_proj(text))
    text_value = heads(attention.add_v_proj(text))
    query_norms, key_norms = _norms(attention)
    # The text comes first.
    parts = [([text_query, query], query_norms), ([text_key, key], key_norms)]
    query, key = rotary.normed_and_rotated(parts, torch.cat([torch.view_as_real(each) for each in embedding[::-1]]))
    together = transformer_qwenimage.dispatch_attention_fn(
        query,
        key,
        torch.cat([text_value, value], 1),
        attn_mask=None if text_mask is None else _joint_mask(text_mask, x.shape[1]),
        backend=attention.processor._attention_backend,
        parallel_config=attention.processor._parallel_config,
    )
    of_text, of_image = together.flatten(2, 3).to(query.dtype).split([text.shape[1], x.shape[1]], 1)
    return of_image, of_text


def _joint_mask(text_mask: Tensor, tokens: int) -> Tensor:
    """``(B, 1, 1, t + s)``: every token of the image is there."""
    return torch.cat([text_mask, text_mask.new_ones(len(text_mask), tokens, dtype=torch.bool)], 1)[:, None, None]
