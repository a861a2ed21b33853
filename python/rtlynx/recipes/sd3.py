"""Stable Diffusion 3 and 3.5: double-stream blocks; in 3.5 medium the first ones have a second attention over the image alone."""

from rtlynx.recipes.recipe import ADALN_ZERO, Modulation, Recipe

_TWO_ATTENTIONS = Modulation(
    "norm1.linear",
    9,
    (
        (0, ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_qkv")),
        (3, ("ff.net.0.proj",)),
        (6, ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_qkv")),
    ),
)
"""SD3.5-medium's first blocks: ``SD35AdaLayerNormZeroX``."""

SD3 = Recipe(
    name="sd3",
    classes=("SD3Transformer2DModel", "SD3ControlNetModel"),
    include=(
        "transformer_blocks.*.{attn,attn2}.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}",
        "transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}",
    ),
    per_sample=("transformer_blocks.*.{norm1,norm1_context}.linear", "norm_out.linear", "time_text_embed.**"),
    ends=("context_embedder", "proj_out", "controlnet_blocks.*"),
    shared_inputs=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    ),
    modulations=(*ADALN_ZERO, _TWO_ATTENTIONS),
)
