"""FLUX.1's blocks."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_flux
from torch import Tensor, nn

from rtlynx.fusions import feed_forward, norms
from rtlynx.fusions.fusion import Fusion, add_gated
from rtlynx.fusions.known import known_to_hooks
from rtlynx.fusions.single_stream import clipped, fusion_of, joined

_forward = transformer_flux.FluxSingleTransformerBlock.forward  # of the class itself torch.compile would not trace it
_double = transformer_flux.FluxTransformerBlock.forward


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
        both = joined(encoder_hidden_states, hidden_states)
        normed, gate = self.norm(both, emb=temb)
        mlp = self.proj_mlp(normed)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        both = clipped(fusion.layer.select_activated(mlp, fusion.activation, head=attended, residual=both, residual_gate=gate))
        return both[:, :text], both[:, text:]


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """The double-stream block, eager: norms modulated and residuals added in one pass each."""

    unfused = transformer_flux.FluxTransformerBlock
    has_layers = False
    written_for = "norm1 norm1_context attn len unsqueeze norm2 ff norm2_context ff_context dtype torch float16 clip"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers has it."""
        if not norms.one_kernel(hidden_states):
            return _double(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        normed, *modulation = self.norm1(hidden_states, emb=temb)
        text_normed, *text_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        attended, text_attended, *adapted = self.attn(
            hidden_states=normed, encoder_hidden_states=text_normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        image = _after_attention(hidden_states, attended, self.norm2, self.ff, *modulation)
        for each in adapted:  # an IP adapter's
            image = image + each
        text = _after_attention(encoder_hidden_states, text_attended, self.norm2_context, self.ff_context, *text_modulation)
        return clipped(text), image


def _after_attention(
    x: Tensor, attended: Tensor, norm: nn.Module, ff: nn.Module, gate: Tensor, shift_ff: Tensor, scale_ff: Tensor, gate_ff: Tensor
) -> Tensor:
    """What the double-stream block does with the image, and with the text: the rest of attention, and the feed-forward."""
    x = add_gated(x, gate, attended)
    return feed_forward.add_gated_output(x, gate_ff, ff, norms.modulated(x, norm, scale_ff, shift_ff))


known_to_hooks(FluxSingleTransformerBlock)
known_to_hooks(FluxTransformerBlock)
