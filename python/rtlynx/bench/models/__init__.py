"""The models whose denoising step is timed, one small file each."""

from __future__ import annotations

from rtlynx.bench.models.bench_model import BenchModel
from rtlynx.bench.models.chroma import CHROMA_PART
from rtlynx.bench.models.flux import FLUX, FLUX_SCHNELL
from rtlynx.bench.models.flux2 import FLUX2_PART
from rtlynx.bench.models.hunyuan_video import HUNYUAN_VIDEO_PART
from rtlynx.bench.models.ltx import LTX_PART
from rtlynx.bench.models.pixart import PIXART
from rtlynx.bench.models.qwen_image import QWEN_IMAGE
from rtlynx.bench.models.sd3 import SD3
from rtlynx.bench.models.wan import WAN
from rtlynx.bench.models.z_image import Z_IMAGE

__all__ = ["MODELS", "BenchModel"]

_ALL = FLUX, FLUX_SCHNELL, QWEN_IMAGE, Z_IMAGE, WAN, FLUX2_PART, CHROMA_PART, HUNYUAN_VIDEO_PART, SD3, PIXART, LTX_PART
MODELS: dict[str, BenchModel] = {model.name: model for model in _ALL}
"""Name → model."""
