"""Sana: linear self-attention over the image, cross-attention to the text, and a feed-forward of convolutions, which stay as they are."""

from rtlynx.recipes.recipe import Recipe

SANA = Recipe(
    name="sana",
    classes=("SanaTransformer2DModel", "SanaControlNetModel"),
    include=("transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}",),
    per_sample=("time_embed.**",),
    ends=("caption_projection.*", "proj_out", "{input_block,controlnet_blocks.*}"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
)
