"""Z-Image: single-stream blocks after two short refiners, one for image and one for text tokens."""

from rtlynx.recipes.recipe import Clock, Recipe

Z_IMAGE = Recipe(
    name="z-image",
    classes=("ZImageTransformer2DModel", "ZImageControlNetModel"),
    include=(
        "{layers,noise_refiner,context_refiner,siglip_refiner}.*.attention.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "{layers,noise_refiner,context_refiner,siglip_refiner}.*.feed_forward.{w1,w2,w3}",
        "{control_layers,control_noise_refiner}.*.attention.{to_q,to_k,to_v,to_qkv,to_out.0}",
        "{control_layers,control_noise_refiner}.*.feed_forward.{w1,w2,w3}",
    ),
    per_sample=(
        "{layers,noise_refiner,control_layers,control_noise_refiner}.*.adaLN_modulation.0",
        "all_final_layer.*.adaLN_modulation.1",
        "t_embedder.**",
    ),
    ends=(
        "{all_x_embedder,control_all_x_embedder}.*",
        "all_final_layer.*.linear",
        "cap_embedder.1",
        "siglip_embedder.1",
        "{control_layers,control_noise_refiner}.*.{before_proj,after_proj}",
    ),
    paper_skip=("layers.*.attention.to_out.0", "layers.*.feed_forward.w2"),
    shared_inputs=(("attention.to_q", "attention.to_k", "attention.to_v"), ("feed_forward.w1", "feed_forward.w3")),
    clock=Clock("t", noise=0.0, picture=1.0),
)
