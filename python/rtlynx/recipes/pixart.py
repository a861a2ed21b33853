"""PixArt-α and PixArt-Σ: self-attention over the image, cross-attention to the text, one modulation for all blocks."""

from rtlynx.recipes.recipe import Recipe

PIXART = Recipe(
    name="pixart",
    classes=("PixArtTransformer2DModel",),
    include=(
        "transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_qkv,to_kv,to_out.0}",
        "transformer_blocks.*.ff.net.{0.proj,2}",
    ),
    per_sample=("adaln_single.**",),
    ends=("caption_projection.*", "proj_out"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
)
