"""Metrics with downloaded weights: those that are there, those that are not, and one's own; their intervals, also in the report."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import rtlynx
from rtlynx.evaluate import Evaluation, Way, write_report
from rtlynx.evaluate.bootstrap import Interval, mean_interval
from rtlynx.evaluate.evaluate import _Comparison
from rtlynx.evaluate.learned import LEARNED, learned
from rtlynx.evaluate.likeness import ssim
from rtlynx.evaluate.report import columns, table_rows
from rtlynx.evaluate.sampling import Sampled
from tiny_pipeline import PROMPTS, tiny_pipeline


def assert_interval(found: Interval | float | None, of_prompts: torch.Tensor) -> None:
    """Of a mean over prompts, each of them one sample, and drawn as those of PSNR are."""
    assert isinstance(found, Interval)
    assert found == pytest.approx(mean_interval(of_prompts.double()), rel=1e-4)
    assert found.low < found.value < found.high


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
    assert isinstance(sparse.learned["distance"], float) and 2 < sparse.learned["distance"] < 3 and sparse.learned["missing"] is None
    assert "missing is not available here (ModuleNotFoundError: No module named 'no_such_package')" in caplog.text


def test_a_metric_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, package in (("clip", "transformers"), ("lpips", "torchmetrics.image.lpip"), ("fid", "torchmetrics.image.fid")):
        monkeypatch.setitem(sys.modules, package, None)  # what makes its import fail
        assert learned(name, torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), PROMPTS) is None
        assert f"{name} is not available here (" in caplog.text


def test_a_package_that_pip_calls_otherwise_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = torch.rand(2, 3, 8, 8)
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    assert learned("image_reward", pictures, pictures, PROMPTS) is None
    said = "image_reward is not available here (ModuleNotFoundError: No module named "
    assert f"{said}'ImageReward': pip install image-reward)" in caplog.text
    monkeypatch.delitem(sys.modules, "ImageReward")
    monkeypatch.setitem(sys.modules, "clip", None)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ImageReward.py").write_text("import clip")
    assert learned("image_reward", pictures, pictures, PROMPTS) is None
    assert f"{said}'clip': pip install git+https://github.com/openai/CLIP.git)" in caplog.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from json import apply_chunking_to_forward", "(ImportError: cannot import name 'apply_chunking_to_forward' from 'json'"),
        ("import no_such_package", "(ModuleNotFoundError: No module named 'no_such_package')"),
    ],
)
def test_an_image_reward_that_does_not_import_says_so_and_leaves_no_trace(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "ImageReward", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    careless = "import logging, warnings; warnings.filterwarnings('ignore'); logging.root.setLevel('INFO')"
    (tmp_path / "ImageReward.py").write_text(f"{careless}\n{line}\n")
    before = logging.root.level, list(warnings.filters)
    assert learned("image_reward", torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), PROMPTS) is None
    assert f"image_reward is not available here {said}" in caplog.text
    assert (logging.root.level, list(warnings.filters)) == before


def test_image_reward_without_its_weights_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def load(name: str, device: torch.device) -> None:
        raise FileNotFoundError(f"{name} is not on this machine\nand there is no network")

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    assert learned("image_reward", torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), PROMPTS) is None
    assert "image_reward is not available here (FileNotFoundError: ImageReward-v1.0 is not on this machine)" in caplog.text


def test_image_reward_is_the_mean_over_pictures_and_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two frames of a video have one prompt."""
    seen: list[tuple[str, torch.Tensor]] = []

    def score(prompt: str, image: Image.Image) -> float:
        assert isinstance(image, Image.Image) and (image.mode, image.size) == ("RGB", (16, 8))
        assert not torch.is_grad_enabled()
        seen.append((prompt, torch.tensor(np.array(image)).permute(2, 0, 1)))
        return [0.5, -1.0, 2.0, -4.0][len(seen) - 1]

    def load(name: str, device: torch.device) -> SimpleNamespace:
        assert (name, device) == ("ImageReward-v1.0", torch.device("cpu"))
        return SimpleNamespace(score=score)

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    pictures = torch.randint(256, (4, 3, 8, 16))
    found = learned("image_reward", pictures / 255, torch.rand(4, 3, 8, 16), ["a cat", "a dog"])
    assert isinstance(found, Interval) and found == (-2.5 / 4, -1.0, -0.25)  # of two prompts the ends are one of them twice
    assert [prompt for prompt, _ in seen] == ["a cat", "a cat", "a dog", "a dog"]
    assert torch.equal(torch.stack([image for _, image in seen]), pictures)


def test_lpips_sees_pairs_of_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance:
        def __init__(self, net_type: str, normalize: bool) -> None:
            assert (net_type, normalize) == ("alex", True)  # pictures are in 0..1

        def __call__(self, pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
            return (pictures - reference).abs().mean()

    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Distance))
    pictures, reference = torch.rand(40, 3, 8, 8), torch.rand(40, 3, 8, 8)
    assert_interval(learned("lpips", pictures, reference, ["a"] * 40), (pictures - reference).abs().mean((1, 2, 3)))


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
    found = learned("fid", pictures, reference, PROMPTS)
    assert isinstance(found, float) and found == pytest.approx(float(pictures.mean() - reference.mean()), rel=1e-4)


def test_frames_of_one_prompt_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten prompts of 50 like frames have an interval that ten pictures have, not one of 500."""
    of_prompts = torch.rand(10, generator=torch.Generator().manual_seed(0))
    frames = of_prompts.repeat_interleave(50)[:, None, None, None].expand(-1, 3, 8, 8)
    monkeypatch.setitem(LEARNED, "brightness", lambda pictures, reference, prompts: pictures.mean((1, 2, 3)))
    assert_interval(learned("brightness", frames, frames, ["a"] * 10), of_prompts)


def test_ssim_of_videos_has_an_interval_over_prompts() -> None:
    pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")
    found, reference = torch.rand(2, 4, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    comparison = _Comparison(None, torch.nn.Identity(), ("a",) * 4, 1, ())
    way = comparison.way("sparse", Sampled(found, 1.0), Sampled(reference, 1.0), None)
    assert_interval(way.ssim, ssim(found.flatten(0, 1), reference.flatten(0, 1)).unflatten(0, (4, 3)).mean(1))


def test_a_metric_gives_a_figure_or_one_for_every_picture(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pictures = torch.rand(4, 3, 8, 8)
    for figure in (0.25, torch.tensor(0.25), torch.tensor(0.25).numpy()):
        monkeypatch.setitem(LEARNED, "mine", lambda pictures, reference, prompts, figure=figure: figure)
        found = learned("mine", pictures, pictures, PROMPTS)
        assert type(found) is float and found == 0.25
    monkeypatch.setitem(LEARNED, "mine", lambda pictures, reference, prompts: torch.tensor([1, 2, 3, 6]))
    assert learned("mine", pictures, pictures, PROMPTS) == Interval(3.0, 1.5, 4.5)
    monkeypatch.setitem(LEARNED, "mine", lambda pictures, reference, prompts: torch.rand(2))  # one for every prompt
    assert learned("mine", pictures, pictures, PROMPTS) is None
    assert "mine is not available here (InvalidArgumentError: evaluate: argument `mine`: got (2,), expected (4,)" in caplog.text


def test_the_report_has_the_intervals_that_there_are(tmp_path: Path) -> None:
    further = {"lpips": Interval(0.25, 0.125, 0.375), "fid": 12.3456, "clip": None}
    ways = Way("dense", torch.rand(1, 3, 8, 8), 2.0), Way("sparse", torch.rand(1, 3, 8, 8), 1.0, velocity_by_step={0: 0.1}, learned=further)
    evaluation = Evaluation(("a",), 4, ways, {"layer": 0.1})
    shown = [[column.text(row) for column in columns(evaluation)[-3:]] for row in table_rows(evaluation)]
    assert [column.title for column in columns(evaluation)[-3:]] == ["lpips", "fid", "clip"]
    assert shown == [["–", "–", "–"], ["0.25 [0.125, 0.375]", "12.35", "–"]]
    write_report(evaluation, tmp_path, {})
    assert (tmp_path / "eval.csv").read_text().splitlines() == [
        "name,figure,value,low,high",
        "dense,seconds,2.0,,",
        "sparse,seconds,1.0,,",
        "sparse,lpips,0.25,0.125,0.375",
        "sparse,fid,12.3456,,",
        "sparse,clip,,,",
    ]
    page = (tmp_path / "eval.html").read_text()
    assert "0.25 [0.125, 0.375]</td><td class=number>12.35</td><td class=number>–</td>" in page


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
        cosines = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
    processor.save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules[learned.__module__], "CLIP", str(tmp_path))
    for sign in (1, -1):  # a cosine on the wrong side of 0 counts 0
        model.text_projection.weight.data.mul_(sign)
        model.save_pretrained(tmp_path)
        want = mean_interval((100 * sign * cosines.double()).clamp_min(0).unflatten(0, (20, 2)).mean(1))
        assert learned("clip", frames, frames, prompts) == pytest.approx(want, abs=1e-3)
