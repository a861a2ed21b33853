"""Metrics with downloaded weights: those that are there, those that are not, and one's own."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rtlynx
from rtlynx.evaluate.learned import LEARNED, learned
from tiny_pipeline import PROMPTS, tiny_pipeline


def test_a_metric_of_ones_own_and_one_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")

    def missing(pictures: torch.Tensor, reference: torch.Tensor, prompts: Sequence[str]) -> float:
        return float(importlib.import_module("no_such_package").score(pictures))

    monkeypatch.setitem(LEARNED, "distance", lambda pictures, reference, prompts: float((pictures - reference).abs().mean()) + len(prompts))
    monkeypatch.setitem(LEARNED, "missing", missing)
    pipe = rtlynx.apply(tiny_pipeline())
    options = {"steps": 1, "fewer_steps": 0, "noise_floor": False, "progress": False}
    (dense, sparse) = rtlynx.evaluate(pipe, list(PROMPTS), metrics=["distance", "missing"], **options).ways  # type: ignore[arg-type]
    assert dense.learned == {}
    assert 2 < sparse.learned["distance"] < 3 and sparse.learned["missing"] is None  # type: ignore[operator]
    assert "missing is not available here (ModuleNotFoundError: No module named 'no_such_package')" in caplog.text


def test_a_metric_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, package in (("clip", "transformers"), ("lpips", "torchmetrics.image.lpip"), ("fid", "torchmetrics.image.fid")):
        monkeypatch.setitem(sys.modules, package, None)  # what makes its import fail
        assert learned(name, torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), PROMPTS) is None
        assert f"{name} is not available here (" in caplog.text


def test_lpips_sees_pairs_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance:
        def __init__(self, net_type: str, normalize: bool) -> None:
            assert (net_type, normalize) == ("alex", True)  # pictures are in 0..1
            self.of: list[torch.Tensor] = []

        def update(self, pictures: torch.Tensor, reference: torch.Tensor) -> None:
            self.of.append((pictures - reference).abs().mean((1, 2, 3)))

        def compute(self) -> torch.Tensor:
            return torch.cat(self.of).mean()

    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Distance))
    pictures, reference = torch.rand(40, 3, 8, 8), torch.rand(40, 3, 8, 8)
    assert learned("lpips", pictures, reference, PROMPTS) == pytest.approx(float((pictures - reference).abs().mean()))


def test_fid_takes_the_dense_pictures_for_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance:
        def __init__(self, normalize: bool) -> None:
            assert normalize
            self.seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}

        def update(self, pictures: torch.Tensor, real: bool) -> None:
            self.seen[real].append(pictures)

        def compute(self) -> torch.Tensor:
            real, drawn = (torch.cat(self.seen[kind]) for kind in (True, False))
            return drawn.mean() - real.mean()

    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", SimpleNamespace(FrechetInceptionDistance=Distance))
    pictures, reference = torch.rand(40, 3, 8, 8), torch.rand(40, 3, 8, 8) / 2
    assert learned("fid", pictures, reference, PROMPTS) == pytest.approx(float(pictures.mean() - reference.mean()), rel=1e-4)


def test_the_clip_score_is_the_mean_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a random CLIP that knows two words; two frames of a video have one prompt."""
    transformers = pytest.importorskip("transformers", reason="CLIP is transformers'")
    words = ("<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b")
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=small | text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = transformers.CLIPProcessor(images, tokenizer)
    frames, prompts = torch.rand(40, 3, 32, 32).mul(255).round() / 255, ["a", "b a"] * 10
    texts = [prompt for prompt in prompts for _ in range(2)]
    with torch.no_grad():
        found = model(**processor(text=texts, images=list((frames * 255).round().byte()), return_tensors="pt", padding=True))
        want = 100 * float(torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds).mean())
        model.text_projection.weight.mul_(1 if want > 0 else -1)  # so that the score, which is at least 0, says something
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules[learned.__module__], "CLIP", str(tmp_path))
    assert learned("clip", frames, frames, prompts) == pytest.approx(abs(want), abs=1e-3)
