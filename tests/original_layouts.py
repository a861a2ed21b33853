"""State dicts as the models' own authors save them, made of diffusers' by undoing what its ``from_single_file`` does.

FLUX.1's and HunyuanVideo's go back only if the model is as wide as the released one, whatever its depth: the conversion of their
single-stream blocks splits a layer at 3072 channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_QKV = re.compile(r"(?<=\.)(to_q|add_q_proj)\.(weight|bias)$")
_MLP_EMBEDDER = (("linear_1", "mlp.0"), ("linear_2", "mlp.2"))

RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    "flux": (
        (r"^x_embedder", "img_in"),
        (r"^context_embedder", "txt_in"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
        (r"time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
        (r"time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
        (r"(single_transformer_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
        (r"(single_transformer_blocks\.\d+)\.attn\.to_qkv", r"\1.linear1"),
        (r"(single_transformer_blocks\.\d+)\.proj_out", r"\1.linear2"),
        (r"(single_transformer_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
        (r"(single_transformer_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
        (r"^single_transformer_blocks", "single_blocks"),
        (r"^transformer_blocks", "double_blocks"),
        (r"norm1_context\.linear", "txt_mod.lin"),
        (r"norm1\.linear", "img_mod.lin"),
        (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
        (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
        (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
        (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
        (r"attn\.to_out\.0", "img_attn.proj"),
        (r"attn\.to_add_out", "txt_attn.proj"),
        (r"attn\.to_qkv", "img_attn.qkv"),
        (r"attn\.add_qkv", "txt_attn.qkv"),
        (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
        (r"ff_context\.net\.2", "txt_mlp.2"),
        (r"ff\.net\.0\.proj", "img_mlp.0"),
        (r"ff\.net\.2", "img_mlp.2"),
    ),
    "sd3": (
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj", "x_embedder.proj"),
        *((f"time_text_embed.timestep_embedder.{ours}", f"t_embedder.{theirs}") for ours, theirs in _MLP_EMBEDDER),
        *((f"time_text_embed.text_embedder.{ours}", f"y_embedder.{theirs}") for ours, theirs in _MLP_EMBEDDER),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
        (r"(transformer_blocks\.\d+)\.norm1_context\.linear", r"\1.context_block.adaLN_modulation.1"),
        (r"(transformer_blocks\.\d+)\.norm1\.linear", r"\1.x_block.adaLN_modulation.1"),
        (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
        (r"ff_context\.net\.2", "context_block.mlp.fc2"),
        (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
        (r"ff\.net\.2", "x_block.mlp.fc2"),
        ("attn.to_add_out", "context_block.attn.proj"),
        (r"attn\.norm_added_([qk])", r"context_block.attn.ln_\1"),
        ("attn.add_qkv", "context_block.attn.qkv"),
        (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
        (r"(attn2?)\.norm_([qk])", r"x_block.\1.ln_\2"),
        (r"(attn2?)\.to_qkv", r"x_block.\1.qkv"),
        ("transformer_blocks", "joint_blocks"),
    ),
    "flux2": (
        ("x_embedder", "img_in"),
        ("context_embedder", "txt_in"),
        ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        (r"(stream_modulation\w*)\.linear", r"\1.lin"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
        (r"^single_transformer_blocks", "single_blocks"),
        (r"^transformer_blocks", "double_blocks"),
        ("attn.to_qkv_mlp_proj", "linear1"),
        (r"attn\.to_out\.(?=weight)", "linear2."),
        (r"(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
        (r"(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
        (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
        (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
        (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
        (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
        (r"attn\.to_out\.0", "img_attn.proj"),
        ("attn.to_add_out", "txt_attn.proj"),
        ("attn.to_qkv", "img_attn.qkv"),
        ("attn.add_qkv", "txt_attn.qkv"),
        ("ff_context.linear_in", "txt_mlp.0"),
        ("ff_context.linear_out", "txt_mlp.2"),
        ("ff.linear_in", "img_mlp.0"),
        ("ff.linear_out", "img_mlp.2"),
    ),
    "z_image": (
        ("all_final_layer.2-1", "final_layer"),
        ("all_x_embedder.2-1", "x_embedder"),
        (r"attention\.to_out\.0", "attention.out"),
        (r"attention\.norm_([qk])", r"attention.\1_norm"),
        ("attention.to_qkv", "attention.qkv"),
    ),
    "wan": (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
        ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
        ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
        (r"^scale_shift_table", "head.modulation"),
        (r"^proj_out", "head.head"),
        ("scale_shift_table", "modulation"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        (r"to_out\.0", "o"),
        (r"add_([kv])_proj", r"\1_img"),
        ("norm_added_k", "norm_k_img"),
        (r"to_([qkv])\.", r"\1."),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
    ),
    "qwen_image": (),
    "ltx": (
        ("proj_in", "patchify_proj"),
        ("time_embed", "adaln_single"),
        ("norm_([qk])", r"\1_norm"),
    ),
    "hunyuan_video": (
        *((f"context_embedder.time_text_embed.timestep_embedder.{ours}", f"txt_in.t_embedder.{theirs}") for ours, theirs in _MLP_EMBEDDER),
        ("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
        ("context_embedder.proj_in", "txt_in.input_embedder"),
        ("context_embedder.token_refiner.refiner_blocks", "txt_in.individual_token_refiner.blocks"),
        (r"(txt_in.*)attn\.to_qkv", r"\1self_attn_qkv"),
        (r"(txt_in.*)attn\.to_out\.0", r"\1self_attn_proj"),
        (r"(txt_in.*)norm_out\.linear", r"\1adaLN_modulation.1"),
        (r"(txt_in.*)ff\.net\.0\.proj", r"\1mlp.fc1"),
        (r"(txt_in.*)ff\.net\.2", r"\1mlp.fc2"),
        ("x_embedder", "img_in"),
        *((f"time_text_embed.timestep_embedder.{ours}", f"time_in.{theirs}") for ours, theirs in _MLP_EMBEDDER),
        *((f"time_text_embed.guidance_embedder.{ours}", f"guidance_in.{theirs}") for ours, theirs in _MLP_EMBEDDER),
        ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        ("time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        (r"^proj_out", "final_layer.linear"),
        (r"(single_transformer_blocks\.\d+)\.norm\.linear", r"\1.modulation.linear"),
        (r"(single_transformer_blocks\.\d+)\.attn\.to_qkv", r"\1.linear1"),
        (r"(single_transformer_blocks\.\d+)\.proj_out", r"\1.linear2"),
        (r"(single_transformer_blocks\.\d+)\.attn\.norm_([qk])", r"\1.\2_norm"),
        (r"^single_transformer_blocks", "single_blocks"),
        (r"^transformer_blocks", "double_blocks"),
        (r"norm1_context\.linear", "txt_mod.linear"),
        (r"norm1\.linear", "img_mod.linear"),
        (r"attn\.norm_added_([qk])", r"txt_attn_\1_norm"),
        (r"attn\.norm_([qk])", r"img_attn_\1_norm"),
        (r"attn\.to_out\.0", "img_attn_proj"),
        ("attn.to_add_out", "txt_attn_proj"),
        ("attn.to_qkv", "img_attn_qkv"),
        ("attn.add_qkv", "txt_attn_qkv"),
        (r"ff_context\.net\.0\.proj", "txt_mlp.fc1"),
        (r"ff_context\.net\.2", "txt_mlp.fc2"),
        (r"ff\.net\.0\.proj", "img_mlp.fc1"),
        (r"ff\.net\.2", "img_mlp.fc2"),
    ),
}
"""Family → patterns for parts of diffusers' names and what stands there in the original's, applied in order; Qwen-Image was
released under diffusers'."""
_FUSED = ("flux", "sd3", "flux2", "z_image", "hunyuan_video")
"""Families whose originals have q, k and v in one layer."""


def original_layout(family: str, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict of diffusers under the names, and in the pieces, of the model's original code; ComfyUI's files have a prefix."""
    state = dict(state)
    if family in _FUSED:
        for key in [key for key in state if _QKV.search(key)]:
            keys = [key.replace("_q", f"_{part}") for part in "qkv"]
            fused = re.sub(r"(to|add)_q(_proj)?(?=\.\w+$)", r"\1_qkv", key)
            mlp = key.replace("attn.to_q", "proj_mlp") if family in ("flux", "hunyuan_video") and key.startswith("single") else None
            state[fused] = torch.cat([state.pop(each) for each in (*keys, *([mlp] if mlp else []))])
    original = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in RENAMES[family]:
            name = re.sub(pattern, replacement, name)
        if "adaLN_modulation" in name and _swapped(family, key, state):
            value = torch.cat(value.chunk(2)[::-1])  # scale and shift are the other way round there
        assert prefix + name not in original
        original[prefix + name] = value.contiguous()
    return original


def _swapped(family: str, key: str, state: Mapping[str, Tensor]) -> bool:
    if family == "flux2" or key.startswith("norm_out"):
        return True
    if family != "sd3":
        return False
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    return key.startswith(f"transformer_blocks.{last}.norm1_context")  # whose text goes nowhere: a norm like the final one
