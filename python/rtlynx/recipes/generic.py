"""Any other diffusion transformer: the names that attention and feed-forward layers go by."""

from rtlynx.recipes.recipe import Recipe

GENERIC = Recipe(
    name="generic",
    classes=(),
    include=(
        # attention
        "**.{to_q,to_k,to_v,to_qkv,to_kv,to_out,to_out.0}",
        "**.{add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}",
        "**.{q_proj,k_proj,v_proj,qkv_proj,o_proj,out_proj}",
        # feed-forward
        "**.{ff,ff_context,ffn,mlp,img_mlp,txt_mlp,feed_forward}.net.{0.proj,2}",
        "**.{ff,ff_context,feed_forward}.{linear_in,linear_out}",
        "**.{ff,ffn,mlp,feed_forward}.{w1,w2,w3,fc1,fc2,gate_proj,up_proj,down_proj}",
        # attention and feed-forward side by side; the `*` before keeps out a model's own output projection
        "**.*.{proj_mlp,proj_out,to_qkv_mlp_proj}",
    ),
    per_sample=("**.norm*.linear", "**.*{adaLN,modulation,_mod}*.**", "**.{time,timestep}*.**", "**.t_embedder.**"),
    ends=("proj_in", "proj_out", "x_embedder", "context_embedder", "patch_embed.**"),
)
