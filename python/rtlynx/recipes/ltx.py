"""LTX-Video: self-attention over the video, cross-attention to the text, one modulation for all blocks. LTX-2 has all that for audio too,
and cross-attention between the two."""

from rtlynx.recipes.recipe import Recipe

LTX = Recipe(
    name="ltx",
    classes=("LTXVideoTransformer3DModel",),
    include=(
        "transformer_blocks.*.{attn1,attn2}.{to_q,to_k,to_v,to_out.0}",
        "transformer_blocks.*.ff.net.{0.proj,2}",
    ),
    # Conditioned on frames it gives every token a timestep of its own, but only a few different ones: still nothing to gain.
    per_sample=("time_embed.**",),
    ends=("proj_in", "caption_projection.*", "proj_out"),
    shared_inputs=(("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_k", "attn2.to_v")),
)

LTX2 = Recipe(
    name="ltx2",
    classes=("LTX2VideoTransformer3DModel",),
    include=(
        "transformer_blocks.*.{attn1,attn2,audio_attn1,audio_attn2}.{to_q,to_k,to_v,to_out.0}",
        "transformer_blocks.*.{audio_to_video_attn,video_to_audio_attn}.{to_q,to_k,to_v,to_out.0}",
        "transformer_blocks.*.{ff,audio_ff}.net.{0.proj,2}",
    ),
    # As in LTX-Video, tokens may have timesteps of their own.
    per_sample=("{time_embed,audio_time_embed,prompt_adaln,audio_prompt_adaln,av_cross_attn_*}.**",),
    ends=("{proj_in,audio_proj_in,proj_out,audio_proj_out}", "{caption_projection,audio_caption_projection}.*"),
    shared_inputs=(
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        ("attn2.to_k", "attn2.to_v"),
        ("audio_attn1.to_q", "audio_attn1.to_k", "audio_attn1.to_v"),
        ("audio_attn2.to_k", "audio_attn2.to_v"),
        ("audio_to_video_attn.to_k", "audio_to_video_attn.to_v"),
        ("video_to_audio_attn.to_k", "video_to_audio_attn.to_v"),
    ),
)
