"""HunyuanVideo, its FramePack and HunyuanImage: FLUX.1's double-stream and single-stream blocks, after a short refiner of the text tokens.
HunyuanVideo 1.5 has double-stream blocks alone."""

from rtlynx.recipes.recipe import ADALN_ZERO, ADALN_ZERO_SINGLE, Recipe

HUNYUAN_VIDEO = Recipe(
    name="hunyuan-video",
    classes=(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanImageTransformer2DModel",
    ),
    include=(
        "transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.0}",
        "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_add_out}",
        "transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}",
        "single_transformer_blocks.*.attn.{to_q,to_k,to_v}",
        "single_transformer_blocks.*.{proj_mlp,proj_out}",
        "context_embedder.token_refiner.refiner_blocks.*.attn.{to_q,to_k,to_v,to_out.0}",
        "context_embedder.token_refiner.refiner_blocks.*.ff.net.{0.proj,2}",
    ),
    per_sample=(
        "transformer_blocks.*.{norm1,norm1_context}.linear",
        "single_transformer_blocks.*.norm.linear",
        "context_embedder.token_refiner.refiner_blocks.*.norm_out.linear",
        "context_embedder.time_text_embed.**",
        "norm_out.linear",
        "{time_text_embed,time_guidance_embed,time_embed}.**",
    ),
    ends=("context_embedder.proj_in", "{context_embedder_2,image_embedder,image_projection}.*", "proj_out"),
    # Unlike in FLUX.1, proj_mlp does not share: attention splits its input and joins it again, so it reads a copy.
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    modulations=(*ADALN_ZERO, ADALN_ZERO_SINGLE),
)
