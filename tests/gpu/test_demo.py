"""`rtlynx demo` on a GPU: sparse layers are sparse, on the kernels, and the demo says which."""

from __future__ import annotations

import torch

from rtlynx.demo.run import Settings, run_demo


def test_every_method_runs_on_the_kernels() -> None:
    result = run_demo(Settings(prompts=2, steps=2, device="cuda"), progress=False)
    sparse = result.outcomes[1:]
    assert result.place.device.type == "cuda" and result.place.dtype is torch.bfloat16
    assert result.kernels and all("spmm" in kernel or "fused" in kernel for kernel in result.kernels)
    for outcome in sparse:
        assert 0 < outcome.velocity_rel_err < 1 and outcome.sparse_flops_share > 0.8
    error = {outcome.method.name: outcome.velocity_rel_err for outcome in sparse}
    assert error["split"] < error["naive"]
