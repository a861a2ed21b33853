"""FLUX.1 and its variants (dev, schnell, Kontext, Fill): double-stream blocks (image and text tokens with weights of their own), then
single-stream blocks. Chroma has the same blocks and, in place of their modulation layers, one `distilled_guidance_layer`: it sees a row per
modulation vector (344 of them), neither one per sample nor one per token, and no pattern here names it.
LongCat-Image and Ovis-Image have the blocks of FLUX.1 too."""

from rtlynx.recipes.recipe import ADALN_ZERO, ADALN_ZERO_SINGLE, Clock, Recipe

FLUX = Recipe(
    name="flux",
    classes=(
        "FluxTransformer2DModel",
        "FluxControlNetModel",
        "ChromaTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    include=(
        "transformer_blocks.*.attn.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}",
        "transformer_blocks.*.{ff,ff_context}.net.{0.proj,2}",
        "single_transformer_blocks.*.attn.{to_q,to_k,to_v,to_qkv}",
        "single_transformer_blocks.*.{proj_mlp,proj_out}",
    ),
    per_sample=(
        "transformer_blocks.*.{norm1,norm1_context}.linear",
        "single_transformer_blocks.*.norm.linear",
        "norm_out.linear",
        "{time_text_embed,time_embed,timestep_embedder}.**",
    ),
    ends=("x_embedder", "context_embedder", "proj_out", "controlnet_x_embedder", "{controlnet_blocks,controlnet_single_blocks}.*"),
    # attn.to_out and the MLP down projection of a single-stream block are one layer here: proj_out over their concatenation.
    paper_skip=("single_transformer_blocks.*.proj_out",),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    clock=Clock(noise=1.0),
    modulations=(*ADALN_ZERO, ADALN_ZERO_SINGLE),
)
