"""Any other diffusion transformer: the names that attention and feed-forward layers go by, in blocks that are numbered."""

from rtlynx.recipes.recipe import Recipe

GENERIC = Recipe(
    name="generic",
    classes=(),
    # Behind a number: what embeds time, text and images goes by some of the same names and is there once.
    include=(
        # a block by itself
        "{attn,attn1,attn2}.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out}",
        "{ff,ff_context,ffn,img_mlp,txt_mlp}.net.{0.proj,2}",
        # attention
        "**.#.**.{to_q,to_k,to_v,to_qkv,to_kv,to_gate,to_out,to_out.0}",
        "**.#.**.{to_query,to_key,to_value}",
        "**.#.**.{add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}",
        "**.#.**.{q_proj,k_proj,v_proj,qkv_proj,o_proj,out_proj}",
        "**.#.**.*{attn,attention}*.{q,k,v,o,qkv,proj,q_linear,kv_linear,out_layer}",
        "**.#.**.{img,txt}_{qkv_proj,kv_proj,attn_qkv,attn_proj}",
        # feed-forward
        "**.#.**.{*_,}{ff,ffn,mlp,feed_forward}{_*,}.net.{0.proj,2}",
        "**.#.**.{*_,}{ff,ffn,mlp,feed_forward}{_*,}.{linear_1,linear_2,linear_3,out_projection,linear_in,linear_out,linear_fc1,linear_fc2}",
        "**.#.**.{*_,}{ff,ffn,mlp,feed_forward}{_*,}.{w1,w2,w3,fc1,fc2,gate_proj,up_proj,gate_up_proj,down_proj}",
        "**.#.**.{ff,ffn,feed_forward}.{proj_in,proj_out,in_layer,out_layer}",
        "**.#.**.{ff,ffn,mlp,img_mlp,txt_mlp}.{0,2,3}",
        "**.#.{gate_proj,up_proj,down_proj,ff_in,ff_out}",
        # experts; not what chooses among them
        "**.#.**.{experts.#,shared_expert,shared_experts}.{net.0.proj,net.2,w1,w2,w3,gate_proj,up_proj,down_proj}",
        # attention and feed-forward side by side
        "**.#.{proj_mlp,proj_out,linear1,linear2}",
        "**.#.**.to_qkv_mlp_proj",
    ),
    per_sample=(
        "**.norm*.linear",
        "**.#.**.norm*.{linear_1,linear_2}",
        "**.{*adaln*,*adaLN*,*modulation*,*_mod}.**",
        "**.*time*{emb,proj,_in,mlp,token}*.**",
        "**.{t_embedder,t_embedding,t_block}.**",
    ),
    ends=(
        "{*_,}{proj_in,proj_out}",
        "{x_embedder,patch_embed,pos_embed,img_in,txt_in,caption_projection}.**",
        "context_embedder",
        "condition_embedder.{text_embedder,image_embedder}.**",
        "final_layer.linear",
    ),
)
