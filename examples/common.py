"""What the examples have in common: their options, and how a pipeline becomes sparse.

They do it by `rtlynx.apply`. The other way, ``from_pretrained(quantization_config=rtlynx.RTLynxConfig())``, is in
docs/guides/loading.md, LoRA in docs/guides/lora.md, each with lines to copy.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch

import rtlynx

_PROMPT = "a lynx walks through fresh snow at golden hour, every hair of its coat in focus"


def parse(description: str, model: str, *, steps: int, out: str) -> argparse.Namespace:
    """The options of every example; ``model`` is a name on the Hub or a folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=model, help="name on the Hub, or a folder")
    parser.add_argument("--prompt", default=_PROMPT)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--dense", action="store_true", help="leave the model dense, to compare")
    parser.add_argument("--compensation", type=Path, help="file to load, or to write if it does not exist and --calibrate is given")
    parser.add_argument("--calibrate", type=Path, metavar="PROMPTS", help="text file, a prompt a line: fit the compensation to these")
    parser.add_argument("--method", default="split", help="of calibration; joint loses less and takes a second weight per layer")
    parser.add_argument("--fp8", action="store_true", help="multiply in 8 bits, on an H100 or H200")
    parser.add_argument("--compact", action="store_true", help="with --fp8: keep only the 8-bit weights")
    parser.add_argument("--skip", nargs="*", default=[], metavar="PATTERN", help="layers to leave dense, e.g. '**.to_out.0'")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks, or all of the transformer")
    parser.add_argument("--offload", action="store_true", help="keep in GPU memory only the part of the pipeline that runs")
    options = parser.parse_args()
    if options.compact and not options.fp8:
        parser.error("--compact needs --fp8")
    return options


def prepare(pipe: Any, options: argparse.Namespace, **calibration: Any) -> Any:
    """Sparse if wanted, compensated, on the GPU, compiled, in the order in which these must happen."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    load = options.compensation is not None and options.compensation.exists()
    if not options.dense:
        rtlynx.apply(pipe, rtlynx.SparsityConfig(skip=tuple(options.skip), precision="fp8" if options.fp8 else "model"))
        if load:
            rtlynx.load_compensation(pipe, options.compensation)
    if options.offload:
        pipe.enable_model_cpu_offload()
    elif torch.cuda.is_available():
        pipe.to("cuda")
    if options.calibrate is not None and not options.dense and not load:
        prompts = [line.strip() for line in options.calibrate.read_text().splitlines() if line.strip()]
        fit = {"method": options.method, "output": options.compensation, "num_inference_steps": options.steps, **calibration}
        rtlynx.calibrate(pipe, prompts, **fit)
    if options.compact and not options.dense:
        rtlynx.compact(pipe)
    if options.compile:
        for name in ("transformer", "transformer_2"):
            model = getattr(pipe, name, None)
            if model is not None:
                _compile(model)
    print(rtlynx.summary(pipe))
    return pipe


def _compile(model: Any) -> None:
    """The repeated blocks, which is quicker to compile; all of the model where diffusers does not say which they are (SD3, PixArt)."""
    if model._repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True)
    else:
        model.compile()


def sample(pipe: Any, options: argparse.Namespace, **arguments: Any) -> Any:
    """Call the pipeline, twice where the first call compiles, and say how long it took."""

    def call() -> Any:
        generator = torch.Generator().manual_seed(options.seed)
        return pipe(prompt=options.prompt, num_inference_steps=options.steps, generator=generator, **arguments)

    if options.compile:
        call()
    start = time.perf_counter()
    result = call()
    print(f"{time.perf_counter() - start:.2f} s")
    return result


def save_image(result: Any, options: argparse.Namespace) -> None:
    """Write the picture."""
    result.images[0].save(options.out)
    print(f"wrote {options.out}")


def save_video(result: Any, options: argparse.Namespace, fps: int) -> None:
    """Write the video."""
    from diffusers.utils import export_to_video

    export_to_video(result.frames[0], str(options.out), fps=fps)
    print(f"wrote {options.out}")
