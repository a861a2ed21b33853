"""FLUX.1's checkpoints as its authors publish them. Here for its size: diffusers converts them at the released width only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

import rtlynx
from original_layouts import original_layout
from rtlynx import SparsityConfig
from rtlynx.eligibility import sparse_layers
from rtlynx.integrations.diffusers import RTLynxConfig
from tiny_models import output


@pytest.mark.large
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux1_in_its_original_layout(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        dense = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).to(torch.bfloat16)
    dense.save_config(tmp_path)
    save_file(original_layout("flux", dense.state_dict(), prefix), tmp_path / "flux1.safetensors")
    config = SparsityConfig(rank=16, small_m="sparse")
    again = FluxTransformer2DModel.from_single_file(
        str(tmp_path / "flux1.safetensors"), config=str(tmp_path), quantization_config=RTLynxConfig(config), torch_dtype=torch.bfloat16
    ).to("cuda")
    ids = torch.zeros(1, 3, device="cuda")
    inputs = {
        "hidden_states": torch.randn(1, 512, 64, device="cuda", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 64, 4096, device="cuda", dtype=torch.bfloat16),
        "pooled_projections": torch.randn(1, 768, device="cuda", dtype=torch.bfloat16),
        "timestep": torch.full((1,), 0.5, device="cuda", dtype=torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device="cuda"),
        "img_ids": ids.repeat(512, 1),
        "txt_ids": ids.repeat(64, 1),
    }
    rtlynx.apply(dense, config)
    assert torch.equal(output(again, inputs), output(dense, inputs))
    assert len(sparse_layers(again)) == 12 + 5
