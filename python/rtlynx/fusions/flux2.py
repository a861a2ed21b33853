"""FLUX.2: the feed-forward of its double-stream blocks, and the attention of its single-stream ones, which has a feed-forward beside it."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_flux2
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttnProcessor, Flux2SwiGLU
from torch import Tensor, nn

from rtlynx.fusions import rotary
from rtlynx.fusions.fusion import Fusion, plain
from rtlynx.linear import SparseLinear

_feed_forward = transformer_flux2.Flux2FeedForward.forward  # of the class itself torch.compile would not trace it


class Flux2FeedForward(transformer_flux2.Flux2FeedForward):
    """With the gated activation in ``linear_out``."""

    unfused = transformer_flux2.Flux2FeedForward

    def fusion(self) -> Fusion | None:
        """What ``linear_out`` takes in now; None where nothing."""
        last = self.linear_out
        return Fusion(last, "silu_gate") if _is_swiglu(self.act_fn) and plain(last, SparseLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        """As diffusers has it."""
        fusion = Flux2FeedForward.fusion(self)
        if fusion is None or not fusion.pays(x.shape[:-1].numel(), x.device):
            return _feed_forward(self, x)  # type: ignore[no-any-return]
        x, gate = self.linear_in(x).chunk(2, dim=-1)
        return fusion.layer.select_activated(x, "silu_gate", gate)


_attention_forward = transformer_flux2.Flux2ParallelSelfAttention.forward  # of the class itself torch.compile would not trace it


class Flux2ParallelSelfAttention(transformer_flux2.Flux2ParallelSelfAttention):
    """With the gated activation and its concatenation with the attention in ``to_out``.

    Only with the processor that diffusers sets; one with a cache, or a user's, is called as ever.
    """

    unfused = transformer_flux2.Flux2ParallelSelfAttention
    replaces = (Flux2ParallelSelfAttnProcessor.__call__, transformer_flux2.apply_rotary_emb)
    written_for = (
        "to_qkv_mlp_proj inner_dim mlp_hidden_dim mlp_mult_factor shape torch split chunk unflatten head_dim norm_q norm_k apply_rotary_emb"
        " dispatch_attention_fn _attention_backend _parallel_config flatten to dtype mlp_act_fn cat to_out"
        f" {rotary.NAMES}"
    )

    def fusion(self) -> Fusion | None:
        """What ``to_out`` takes in now; None where nothing."""
        last = self.to_out
        ready = type(self.processor) is Flux2ParallelSelfAttnProcessor and _is_swiglu(self.mlp_act_fn) and plain(last, SparseLinear)
        ready = ready and self.mlp_mult_factor == 2
        return Fusion(last, "silu_gate", head=True) if ready else None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, image_rotary_emb: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """As diffusers has it."""
        fusion = None if kwargs else Flux2ParallelSelfAttention.fusion(self)
        if fusion is None or not fusion.pays(hidden_states.shape[:-1].numel(), hidden_states.device):
            return _attention_forward(self, hidden_states, attention_mask, image_rotary_emb, **kwargs)  # type: ignore[no-any-return]
        query, key, value, x, gate = self.to_qkv_mlp_proj(hidden_states).split([self.inner_dim] * 3 + [self.mlp_hidden_dim] * 2, -1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
        if rotary.rotates(hidden_states, image_rotary_emb, self.head_dim, self.norm_q, self.norm_k):
            query, key = rotary.normed_and_rotated([([query], [self.norm_q]), ([key], [self.norm_k])], image_rotary_emb)  # type: ignore[arg-type]
        else:
            query, key = self.norm_q(query), self.norm_k(key)
            if image_rotary_emb is not None:
                query = transformer_flux2.apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
                key = transformer_flux2.apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        attended = transformer_flux2.dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        return fusion.layer.select_activated(x, "silu_gate", gate, attended.flatten(2, 3).to(query.dtype))


def _is_swiglu(module: nn.Module) -> bool:
    return plain(module, Flux2SwiGLU) and plain(module.gate_fn, nn.SiLU)  # type: ignore[arg-type]
