"""Qwen-Image: double-stream blocks throughout. Qwen-Image 2.1: single-stream blocks and one modulation for all of them."""

from rtlynx.recipes.recipe import Clock, Modulation, Recipe

QWEN_IMAGE = Recipe(
    name="qwen-image",
    classes=("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
    include=(
        "transformer_blocks.*.attn.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "transformer_blocks.*.attn.{add_q_proj,add_k_proj,add_v_proj,to_added_qkv,to_add_out}",
        "transformer_blocks.*.{img_mlp,txt_mlp}.net.{0.proj,2}",
    ),
    per_sample=("transformer_blocks.*.{img_mod,txt_mod}.1", "norm_out.linear", "time_text_embed.**"),
    ends=("img_in", "txt_in", "proj_out", "controlnet_x_embedder", "controlnet_blocks.*"),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    clock=Clock(noise=1.0),
    modulations=(
        Modulation("img_mod.1", 6, ((0, ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_qkv")), (3, ("img_mlp.net.0.proj",)))),
        Modulation(
            "txt_mod.1",
            6,
            ((0, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_added_qkv")), (3, ("txt_mlp.net.0.proj",))),
        ),
    ),
)

QWEN_IMAGE_21 = Recipe(
    name="qwen-image-2.1",
    classes=("QwenImage21Transformer2DModel",),
    include=(
        "transformer_blocks.*.attn.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "transformer_blocks.*.img_mlp.{gate_layer,proj,out}",
    ),
    per_sample=("modulation.1", "norm_out.linear", "time_text_embed.**"),
    ends=("img_in", "txt_in.*", "proj_out"),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"), ("img_mlp.gate_layer", "img_mlp.proj")),
    clock=Clock(noise=1.0),
)
