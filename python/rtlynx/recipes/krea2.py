"""Krea 2: single-stream blocks with a gated attention, after a short transformer that fuses what several layers say of the text."""

from rtlynx.recipes.recipe import Clock, Recipe

KREA2 = Recipe(
    name="krea2",
    classes=("Krea2Transformer2DModel",),
    include=(
        "{transformer_blocks,text_fusion.layerwise_blocks,text_fusion.refiner_blocks}.*.attn.{to_q,to_k,to_v,to_gate,to_out.0}",
        "{transformer_blocks,text_fusion.layerwise_blocks,text_fusion.refiner_blocks}.*.ff.{gate,up,down}",
    ),
    per_sample=("time_embed.*", "time_mod_proj"),
    ends=("img_in", "txt_in.*", "text_fusion.projector", "final_layer.linear"),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate"), ("ff.gate", "ff.up")),
    clock=Clock(noise=1.0),
)
