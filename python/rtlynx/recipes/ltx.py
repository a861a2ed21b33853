"""LTX-Video: self-attention over the video, cross-attention to the text, one modulation for all blocks."""

from rtlynx.recipes.recipe import Recipe

LTX = Recipe(
    name="ltx",
    classes=("LTXVideoTransformer3DModel",),
    include=(
        "transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}",
        "transformer_blocks.*.ff.net.{0.proj,2}",
    ),
    # Conditioned on frames it gives every token a timestep of its own, but only a few different ones: still nothing to gain.
    per_sample=("time_embed.**",),
    ends=("proj_in", "caption_projection.*", "proj_out"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
)
