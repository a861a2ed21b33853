"""AuraFlow: a few double-stream blocks, then many single-stream blocks, all with a gated feed-forward."""

from rtlynx.recipes.recipe import Clock, Recipe

AURA_FLOW = Recipe(
    name="aura-flow",
    classes=("AuraFlowTransformer2DModel",),
    include=(
        "{joint_transformer_blocks,single_transformer_blocks}.*.attn.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "joint_transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}",
        "{joint_transformer_blocks,single_transformer_blocks}.*.{ff,ff_context}.{linear_1,linear_2,out_projection}",
    ),
    per_sample=(
        "{joint_transformer_blocks,single_transformer_blocks}.*.{norm1,norm1_context}.linear",
        "norm_out.linear",
        "time_step_proj.*",
    ),
    ends=("pos_embed.proj", "context_embedder", "proj_out"),
    shared_inputs=(
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ("ff.linear_1", "ff.linear_2"),
        ("ff_context.linear_1", "ff_context.linear_2"),
    ),
    clock=Clock(noise=1.0),
)
