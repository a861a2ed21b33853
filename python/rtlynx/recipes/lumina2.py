"""Lumina-Image 2.0: single-stream blocks after two short refiners, one for image and one for text tokens."""

from rtlynx.recipes.recipe import Clock, Recipe

LUMINA2 = Recipe(
    name="lumina2",
    classes=("Lumina2Transformer2DModel",),
    include=(
        "{layers,noise_refiner,context_refiner}.*.attn.{to_q,to_k,to_v,to_out.0}",
        "{layers,noise_refiner,context_refiner}.*.feed_forward.{linear_1,linear_2,linear_3}",
    ),
    per_sample=("{layers,noise_refiner}.*.norm1.linear", "norm_out.linear_1", "time_caption_embed.timestep_embedder.*"),
    ends=("x_embedder", "time_caption_embed.caption_embedder.1", "norm_out.linear_2"),
    shared_inputs=(("attn.to_q", "attn.to_k", "attn.to_v"), ("feed_forward.linear_1", "feed_forward.linear_3")),
    clock=Clock(noise=0.0, picture=1.0),
)
