"""Wan 2.1 and 2.2: self-attention over the video, cross-attention to the text and, in 2.1's image-to-video models, to an image.

The 14B pipelines of Wan 2.2 hold two of these models, for high and low noise; `rtlynx.apply(pipe)` serves both.
"""

from rtlynx.recipes.recipe import Recipe

WAN = Recipe(
    name="wan",
    classes=("WanTransformer3DModel",),
    include=(
        "blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_qkv,to_kv,to_out.0}",
        "blocks.*.attn2.{add_k_proj,add_v_proj,to_added_kv}",
        "blocks.*.ffn.net.{0.proj,2}",
    ),
    # Wan 2.2's 5B model gives every token a timestep of its own, but only two different ones: still nothing to gain.
    per_sample=("condition_embedder.{time_embedder.*,time_proj}",),
    ends=("condition_embedder.{text_embedder,image_embedder}.**", "proj_out"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v"), ("attn2.add_k_proj", "attn2.add_v_proj")),
)
