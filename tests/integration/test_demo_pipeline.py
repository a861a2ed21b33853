"""The demo's pipeline as a diffusers user meets it, and the training that makes one, on a tiny model."""

from __future__ import annotations

import inspect
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from safetensors import safe_open
from torch import nn

from rtlynx.demo import train
from rtlynx.demo.classifier import FILE_NAME, SceneClassifier
from rtlynx.demo.evaluation import Setting, held_out_scenes, sample
from rtlynx.demo.flow import FlowTrainer
from rtlynx.demo.metrics import score_pictures
from rtlynx.demo.model import CHANNELS, PRESETS, TOKENS, build_transformer, model_time, pack, position_ids, unpack
from rtlynx.demo.pipeline import DEFAULT_WEIGHTS, ScenesPipeline
from rtlynx.demo.train import TrainingRun, _preset, run_training
from rtlynx.errors import InvalidArgumentError

_PROMPT = "a red circle at the top left and a blue star at the bottom right on yellow stripes"
_OTHER = "a green ring at the centre on plain cyan"
_TINY = PRESETS["tiny"]


def test_older_diffusers_find_the_classes_of_its_components() -> None:
    parameters = inspect.signature(ScenesPipeline.__init__).parameters
    assert parameters["transformer"].annotation is FluxTransformer2DModel
    assert parameters["scheduler"].annotation is FlowMatchEulerDiscreteScheduler


@pytest.fixture(scope="module")
def pipeline() -> ScenesPipeline:
    transformer = build_transformer(_TINY).eval()
    generator = torch.Generator().manual_seed(1)
    for module in transformer.modules():  # a fresh model's blocks and output are zero: give them something to do
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.05, generator=generator)
    pipe = ScenesPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=1.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: ScenesPipeline, prompt: str | list[str] = _PROMPT, seed: int = 0, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(seed)} | options
    images = pipe(prompt, **options).images
    assert isinstance(images, torch.Tensor)
    return images


class TestModel:
    def test_patches_round_trip_and_keep_their_place(self) -> None:
        pictures = torch.randn(2, 3, 64, 64)
        tokens = pack(pictures)
        assert tokens.shape == (2, TOKENS, CHANNELS)
        assert torch.equal(unpack(tokens), pictures)
        token = 5 * 16 + 3  # patch row 5, column 3
        assert torch.equal(tokens[0, token].reshape(3, 4, 4), pictures[0, :, 20:24, 12:16])
        assert position_ids(torch.device("cpu"))[0][token].tolist() == [0, 5, 3]

    def test_every_dtype_reads_the_bfloat16_clock(self) -> None:
        sigma = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        bf16 = model_time(sigma, torch.bfloat16).to(torch.bfloat16) * 1000  # what diffusers computes
        fp32 = model_time(sigma, torch.float32).to(torch.float32) * 1000
        torch.testing.assert_close(fp32, bf16.float(), rtol=0, atol=1e-3)
        assert (bf16.float() - 1000 * sigma).abs().max() > 1, "if bfloat16 were exact there would be nothing to do"

    @pytest.mark.parametrize("name", PRESETS)
    def test_block_linears_can_be_compressed(self, name: str) -> None:
        with torch.device("meta"):
            preset = PRESETS[name]
            transformer = FluxTransformer2DModel(
                num_layers=1, num_single_layers=1, attention_head_dim=preset.head_dim, num_attention_heads=preset.heads
            )
        for path, module in transformer.named_modules():
            if isinstance(module, nn.Linear) and "blocks" in path:
                assert module.in_features % 64 == module.out_features % 64 == 0, path

    def test_the_seed_decides_the_weights(self) -> None:
        first, again, other = (build_transformer(_TINY, seed).x_embedder.weight for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)


class TestSampling:
    def test_seeds_and_prompts_decide_the_picture(self, pipeline: ScenesPipeline) -> None:
        first = _draw(pipeline)
        assert first.shape == (1, 3, 64, 64) and first.min() >= 0 and first.max() <= 1
        assert torch.equal(first, _draw(pipeline))
        assert not torch.equal(first, _draw(pipeline, seed=1))
        assert not torch.equal(first, _draw(pipeline, _OTHER))

    def test_a_prompt_draws_the_same_alone_and_in_a_batch(self, pipeline: ScenesPipeline) -> None:
        noise = torch.randn(2, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
        both = _draw(pipeline, [_PROMPT, _OTHER], latents=noise)
        alone = _draw(pipeline, _OTHER, latents=noise[1:])
        torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)

    def test_output_types(self, pipeline: ScenesPipeline) -> None:
        tensor = _draw(pipeline, [_PROMPT, _OTHER])
        options: dict[str, Any] = {"num_inference_steps": 3}
        array = pipeline([_PROMPT, _OTHER], output_type="np", generator=torch.Generator().manual_seed(0), **options).images
        images = pipeline([_PROMPT, _OTHER], generator=torch.Generator().manual_seed(0), **options).images
        (latent,) = pipeline(
            [_PROMPT, _OTHER], output_type="latent", return_dict=False, generator=torch.Generator().manual_seed(0), **options
        )
        assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        assert all(isinstance(image, Image.Image) and image.size == (64, 64) for image in images)
        assert np.abs(np.asarray(images[1]) / 255 - array[1]).max() <= 0.51 / 255
        torch.testing.assert_close((unpack(latent) / 2 + 0.5).clamp(0, 1), tensor)

    def test_images_per_prompt(self, pipeline: ScenesPipeline) -> None:
        images = _draw(pipeline, [_PROMPT, _OTHER], num_images_per_prompt=2)
        assert len(images) == 4 and not torch.equal(images[0], images[1])

    def test_euler_follows_the_velocity_exactly(self, pipeline: ScenesPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the true constant velocity noise - picture, any number of steps ends at the picture."""
        target, noise = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, TOKENS, CHANNELS)
        monkeypatch.setattr(pipeline.transformer, "forward", lambda **_: (noise - pack(target),))
        for steps in (1, 4, 7):
            torch.testing.assert_close(_draw(pipeline, latents=noise, num_inference_steps=steps), target / 2 + 0.5, rtol=0, atol=1e-5)

    def test_guidance(self, pipeline: ScenesPipeline) -> None:
        plain, guided = _draw(pipeline), _draw(pipeline, guidance_scale=4.0)
        assert not torch.equal(plain, guided)
        barely = _draw(pipeline, guidance_scale=1.0 + 1e-6)
        torch.testing.assert_close(plain, barely, rtol=0, atol=1e-4)

    def test_callback_sees_and_replaces_latents(self, pipeline: ScenesPipeline) -> None:
        seen: list[tuple[int, torch.Size]] = []

        def callback(pipe: ScenesPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            assert pipe is pipeline and set(tensors) == {"latents", "velocity"}
            seen.append((step, tensors["velocity"].shape))
            return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

        images = _draw(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "velocity"])
        assert seen == [(step, torch.Size([1, TOKENS, CHANNELS])) for step in range(3)]
        assert (images == 0.5).all(), "the last step's latents were replaced by zeros"

    @pytest.mark.parametrize(
        ("argument", "options"),
        [
            ("prompt", {"prompt": "a red dog at the centre on plain blue"}),
            ("num_inference_steps", {"num_inference_steps": 0}),
            ("num_images_per_prompt", {"num_images_per_prompt": 0}),
            ("output_type", {"output_type": "jpeg"}),
            ("latents", {"latents": torch.zeros(1, 3, 64, 64)}),
            ("callback_on_step_end_tensor_inputs", {"callback_on_step_end_tensor_inputs": ["noise"]}),
        ],
    )
    def test_bad_arguments_are_named(self, pipeline: ScenesPipeline, argument: str, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            pipeline(**({"prompt": _PROMPT} | options))
        assert caught.value.argument == argument

    def test_bfloat16_draws_the_same_picture(self, pipeline: ScenesPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path)
        narrow = ScenesPipeline.from_pretrained(tmp_path)
        nn.Module.to(narrow.transformer, torch.bfloat16)
        narrow.set_progress_bar_config(disable=True)
        error = (_draw(pipeline) - _draw(narrow)).square().mean()
        assert error < 1e-4, "40 dB"

    def test_saving_and_loading(self, pipeline: ScenesPipeline, tmp_path: Path) -> None:
        pipeline.save_pretrained(tmp_path / "pipe")
        loaded = ScenesPipeline.from_pretrained(tmp_path / "pipe")
        loaded.set_progress_bar_config(disable=True)
        assert isinstance(loaded.transformer, FluxTransformer2DModel)
        assert isinstance(loaded.scheduler, FlowMatchEulerDiscreteScheduler)
        assert torch.equal(_draw(loaded), _draw(pipeline))


class TestTraining:
    def test_the_loss_falls_and_a_resumed_trainer_takes_the_same_steps(self) -> None:
        trainer = FlowTrainer(replace(_TINY, batch=4), torch.device("cpu"), seed=0)
        trainer.step = 1000  # past the warm-up
        losses = [trainer.train_step(progress=0.0).item() for _ in range(30)]
        assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])

        checkpoint = io.BytesIO()
        torch.save(trainer.state_dict(), checkpoint)
        resumed = FlowTrainer(trainer.preset, torch.device("cpu"), seed=1)
        resumed.load_state_dict(torch.load(io.BytesIO(checkpoint.getvalue()), weights_only=True))
        for _ in range(2):
            torch.testing.assert_close(trainer.train_step(0.5), resumed.train_step(0.5))
        for ours, theirs in zip(trainer.average.parameters(), resumed.average.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_learning_rate_warms_up_and_ends_at_zero(self) -> None:
        trainer = FlowTrainer(_TINY, torch.device("cpu"), seed=0)
        assert trainer.learning_rate(0.0) == pytest.approx(_TINY.learning_rate / 200)
        trainer.step = 1000
        assert trainer.learning_rate(0.0) == _TINY.learning_rate
        assert trainer.learning_rate(0.25) == pytest.approx(0.75 * _TINY.learning_rate)
        assert trainer.learning_rate(1.0) == 0

    def test_a_run_leaves_a_pipeline_and_goes_on_where_it_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(train, "_LOG_EVERY", 2)
        options: dict[str, Any] = {"device": "cpu", "classifier_steps": 1, "prompts": 2, "minutes": 30.0}
        preset = replace(_TINY, batch=2)
        run_training(tmp_path, preset, steps=2, **options)
        log = run_training(tmp_path, preset, steps=4, resume=True, **options)

        assert [row["step"] for row in log.curve] == [2, 4]
        assert log.settings["steps"] == 4 and log.settings["seed"] == 0
        assert len(log.evaluations["samples"]) == 5 and 0 <= log.evaluations["samples"][0]["mean"] <= 1
        produced = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert produced - {"loss_curve.png"} == {  # drawn where matplotlib is installed
            "checkpoint.pt",
            "training_log.json",
            "loss_curve.csv",
            "samples/prompts.txt",
            "samples/step-000002.png",
            "samples/step-000004.png",
            "pipeline/model_index.json",
            "pipeline/scheduler/scheduler_config.json",
            "pipeline/transformer/config.json",
            "pipeline/transformer/diffusion_pytorch_model.safetensors",
            f"pipeline/{FILE_NAME}",
        }
        with safe_open(tmp_path / "pipeline/transformer/diffusion_pytorch_model.safetensors", "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118 (not a dict)
        ScenesPipeline.from_pretrained(tmp_path / "pipeline")

    def test_a_given_classifier_is_the_judge_and_is_not_trained(self, tmp_path: Path) -> None:
        run = TrainingRun(tmp_path, replace(_TINY, batch=2), torch.device("cpu"), seed=0, minutes=1.0, steps=None)
        classifier = run.get_classifier(steps=10**9, given=DEFAULT_WEIGHTS / FILE_NAME)
        shipped = SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME)
        assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), shipped.parameters(), strict=True))

    def test_resuming_nothing_or_another_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgumentError, match="wrote a checkpoint"):
            run_training(tmp_path, _TINY, device="cpu", resume=True)
        preset = replace(_TINY, batch=2)
        TrainingRun(tmp_path, preset, torch.device("cpu"), seed=0, minutes=1.0, steps=None).save(SceneClassifier())
        with pytest.raises(InvalidArgumentError, match="seed 1"):
            run_training(tmp_path, preset, seed=1, device="cpu", resume=True)

    def test_options_become_a_preset(self) -> None:
        assert _preset("small", width=256, double=2, single=None, batch=64, rate=1e-4) == replace(
            PRESETS["small"], heads=4, double=2, batch=64, learning_rate=1e-4
        )
        with pytest.raises(InvalidArgumentError, match="multiple of the head's width"):
            _preset("small", width=100, double=None, single=None, batch=None, rate=None)
        with pytest.raises(InvalidArgumentError, match="one of tiny, small"):
            _preset("huge", width=None, double=None, single=None, batch=None, rate=None)


class TestShippedWeights:
    """The model that comes with the package is small and does what its prompts say."""

    def test_size(self) -> None:
        weights = list(DEFAULT_WEIGHTS.rglob("*.safetensors"))
        assert {path.name for path in weights} == {FILE_NAME, "diffusion_pytorch_model.safetensors"}
        assert sum(path.stat().st_size for path in weights) <= 12_000_000

    def test_pictures_show_what_was_asked_for(self) -> None:
        pipe = ScenesPipeline.from_pretrained(DEFAULT_WEIGHTS)
        pipe.set_progress_bar_config(disable=True)
        scenes = held_out_scenes(16, seed=7)
        pictures = sample(pipe, scenes, Setting(dtype=torch.float32, steps=12), seed=7)
        score = score_pictures(SceneClassifier.load(DEFAULT_WEIGHTS / FILE_NAME), pictures, scenes)
        assert score.mean >= 0.9, score
