"""HiDream-I1: double-stream, then single-stream blocks, in which experts share the image's feed-forward among them.

An expert sees the tokens that were sent to it: with few of them it computes densely, as any layer does.
"""

from rtlynx.recipes.recipe import Clock, Recipe

HIDREAM = Recipe(
    name="hidream",
    classes=("HiDreamImageTransformer2DModel",),
    include=(
        "{double_stream_blocks,single_stream_blocks}.*.block.attn1.{to_q,to_k,to_v,to_out}",
        "double_stream_blocks.*.block.attn1.{to_q_t,to_k_t,to_v_t,to_out_t}",
        "{double_stream_blocks,single_stream_blocks}.*.block.{ff_t,ff_i.shared_experts,ff_i.experts.*}.{w1,w2,w3}",
    ),
    per_sample=(
        "{double_stream_blocks,single_stream_blocks}.*.block.adaLN_modulation.1",
        "final_layer.adaLN_modulation.1",
        "{t_embedder,p_embedder}.**",
    ),
    ends=("x_embedder.proj", "caption_projection.*.linear", "final_layer.linear"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn1.to_q_t", "attn1.to_k_t", "attn1.to_v_t"), ("w1", "w3")),
    clock=Clock("timesteps"),
)
