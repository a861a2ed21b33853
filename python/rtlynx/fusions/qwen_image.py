"""Qwen-Image's block."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor

from rtlynx.fusions import feed_forward, norms, qwen_image_attention
from rtlynx.fusions.fusion import add_gated, add_projected
from rtlynx.fusions.known import known_to_hooks
from rtlynx.fusions.single_stream import clipped

_forward = transformer_qwenimage.QwenImageTransformerBlock.forward  # of the class itself torch.compile would not trace it
_modulate = transformer_qwenimage.QwenImageTransformerBlock._modulate


class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """Norms modulated, residuals added, and queries and keys normed and rotated, in fewer passes: compiled these last alone.

    Its attention is written out here, and no class of its own, because the ``Attention`` that it is of is that of many other models too.
    Where tokens of one sample have different modulations (``zero_cond_t``) the block is diffusers' own.
    """

    unfused = transformer_qwenimage.QwenImageTransformerBlock
    has_layers = False
    replaces = (_forward, _modulate, *qwen_image_attention.REPLACED)
    written_for = (
        "img_mod zero_cond_t torch chunk txt_mod img_norm1 _modulate txt_norm1 attn img_norm2 img_mlp txt_norm2 txt_mlp dtype float16 clip"
        " size unsqueeze where"
        f" {qwen_image_attention.NAMES}"
    )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """As diffusers has it."""
        streams = hidden_states, encoder_hidden_states
        attends = not joint_attention_kwargs and qwen_image_attention.is_written_here(self.attn, *streams, image_rotary_emb)
        ready = (attends or norms.one_kernel(hidden_states)) and not self.zero_cond_t and modulate_index is None
        if not ready or temb.shape[0] != hidden_states.shape[0]:
            return _forward(  # type: ignore[no-any-return]
                self,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.img_mod(temb).chunk(6, -1)
        text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = self.txt_mod(temb).chunk(6, -1)
        normed = norms.modulated(hidden_states, self.img_norm1, scale, shift)
        text_normed = norms.modulated(encoder_hidden_states, self.txt_norm1, text_scale, text_shift)

        if attends:
            attended, text_attended = qwen_image_attention.attended(
                self.attn,
                normed,
                text_normed,
                encoder_hidden_states_mask,
                image_rotary_emb,  # type: ignore[arg-type]
            )
            image = add_projected(hidden_states, gate, attended, *self.attn.to_out)
            text = add_projected(encoder_hidden_states, text_gate, text_attended, self.attn.to_add_out)
        else:
            update, text_update = self.attn(
                hidden_states=normed,
                encoder_hidden_states=text_normed,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                image_rotary_emb=image_rotary_emb,
                **(joint_attention_kwargs or {}),
            )
            image, text = add_gated(hidden_states, gate, update), add_gated(encoder_hidden_states, text_gate, text_update)

        normed = norms.modulated(image, self.img_norm2, scale_ff, shift_ff)
        image = feed_forward.add_gated_output(image, gate_ff, self.img_mlp, normed)
        text_normed = norms.modulated(text, self.txt_norm2, text_scale_ff, text_shift_ff)
        text = feed_forward.add_gated_output(text, text_gate_ff, self.txt_mlp, text_normed)
        return clipped(text), clipped(image)


known_to_hooks(QwenImageTransformerBlock)
