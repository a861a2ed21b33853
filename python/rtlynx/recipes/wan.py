"""Wan 2.1 and 2.2: self-attention over the video, cross-attention to the text and, in 2.1's image-to-video models, to an image.

VACE has blocks of its own for what controls the video, Animate a cross-attention to a face; SkyReels-V2 and ChronoEdit have nothing new.
The 14B pipelines of Wan 2.2 hold two of these models, for high and low noise; `rtlynx.apply(pipe)` serves both.
"""

from rtlynx.recipes.recipe import Recipe

WAN = Recipe(
    name="wan",
    classes=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    include=(
        "{blocks,vace_blocks}.*.{attn1,attn2}.{to_q,to_k,to_v,to_qkv,to_kv,to_out.0}",
        "{blocks,vace_blocks}.*.attn2.{add_k_proj,add_v_proj,to_added_kv}",
        "{blocks,vace_blocks}.*.ffn.net.{0.proj,2}",
        "vace_blocks.*.proj_out",
        "face_adapter.*.{to_q,to_out}",  # its keys and values are a handful of tokens per frame
    ),
    # Wan 2.2's 5B model gives every token a timestep of its own, but only two different ones: still nothing to gain.
    per_sample=("condition_embedder.{time_embedder.*,time_proj}",),
    ends=("condition_embedder.{text_embedder,image_embedder}.**", "vace_blocks.*.proj_in", "{motion_encoder,face_encoder}.**", "proj_out"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v"), ("attn2.add_k_proj", "attn2.add_v_proj")),
)
