"""CogVideoX: one attention and one feed-forward over text and video tokens together."""

from rtlynx.recipes.recipe import Recipe

COGVIDEOX = Recipe(
    name="cogvideox",
    classes=("CogVideoXTransformer3DModel",),
    include=(
        "transformer_blocks.*.attn1.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "transformer_blocks.*.ff.net.{0.proj,2}",
    ),
    per_sample=("transformer_blocks.*.{norm1,norm2}.linear", "norm_out.linear", "{time_embedding,ofs_embedding}.*"),
    ends=("patch_embed.*", "proj_out"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"),),
)
