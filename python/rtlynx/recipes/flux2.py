"""FLUX.2: double-stream blocks, then many single-stream blocks whose attention and feed-forward are two wide layers."""

from rtlynx.recipes.recipe import Clock, Recipe

FLUX2 = Recipe(
    name="flux2",
    classes=("Flux2Transformer2DModel",),
    include=(
        "transformer_blocks.*.attn.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}",
        "transformer_blocks.*.{ff,ff_context}.{linear_in,linear_out}",
        "single_transformer_blocks.*.attn.{to_qkv_mlp_proj,to_out}",
    ),
    # One modulation for all blocks of a kind.
    per_sample=(
        "{double_stream_modulation_img,double_stream_modulation_txt,single_stream_modulation}.linear",
        "norm_out.linear",
        "time_guidance_embed.**",
    ),
    ends=("x_embedder", "context_embedder", "proj_out"),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    clock=Clock(noise=1.0),
)
