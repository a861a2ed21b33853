"""FLUX.3: blocks for each kind of tokens (text, image, given images), then blocks for all of them; attention beside feed-forward."""

from rtlynx.recipes.recipe import Clock, Recipe

FLUX3 = Recipe(
    name="flux3",
    classes=("Flux3Transformer2DModel",),
    include=(
        "{mode_blocks.*,txt_mode_blocks,single_transformer_blocks}.*.attn.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "{mode_blocks.*,txt_mode_blocks,single_transformer_blocks}.*.ff.{linear_in,linear_out}",
    ),
    # Modulation comes in one row per token, all of a kind alike: still nothing to gain.
    per_sample=(
        "{early_stream_modulations,single_stream_modulations}.*.linear",
        "norm_out.linear",
        "{timestep_embedder,target_timestep_embedder}.*",
    ),
    ends=("x_embedders.*", "context_embedder", "proj_out"),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v", "ff.linear_in"),),
    clock=Clock(noise=1.0),
)
