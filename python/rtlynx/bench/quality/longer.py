"""The paper's branch with a generous training: more samples, more steps, and for every input the best of several learning rates.

The other rows are fitted to equal samples. A closed form needs no more of them, a training may: this row shows what it would gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from rtlynx.calibrate.collect import LayerInput
from rtlynx.calibrate.fit import Fit, Tensors, fit_input

PROMPTS = 4
"""Times as many prompts as other rows are fitted from."""
TOKENS_PER_CHANNEL = 64
"""Sampled of each input; the other rows have 4, or 8192 tokens."""
STEPS = 2
"""Times as many as of the other trained rows."""
RATES = (1e-3, 2e-3, 5e-3)


def fit_longer(
    inputs: Iterable[LayerInput], fit: Fit, device: torch.device, errors: Callable[[Mapping[str, Tensors]], Mapping[str, float]]
) -> dict[str, Tensors]:
    """Compensation of every layer.

    Args:
        inputs: With their samples, which are released one after the other.
        fit: What to fit.
        device: Where.
        errors: Of layers with such a compensation, by name. Those the bench reports would do: that favours this row.
    """
    groups: list[list[str]] = []
    by_rate: list[dict[str, Tensors]] = [{} for _ in RATES]
    for input in inputs:
        groups.append(list(input.layers))
        for rate, found in zip(RATES, by_rate, strict=True):
            found.update(fit_input(input, replace(fit, training_steps=STEPS * fit.training_steps, learning_rate=rate), device))
    judged = [errors(found) for found in by_rate]
    # Layers that read one input share a branch, so they share the choice.
    best = {name: min(range(len(RATES)), key=lambda i: sum(judged[i][each] for each in names)) for names in groups for name in names}
    return {name: by_rate[i][name] for name, i in best.items()}
