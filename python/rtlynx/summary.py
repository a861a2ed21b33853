"""`summary`: for every linear layer of a model, whether it is sparse, why not, its shape, and the kernel that will run it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from rtlynx import launch
from rtlynx.apply import applied_config
from rtlynx.compact import kept_weights
from rtlynx.config import SparsityConfig
from rtlynx.eligibility import Candidate, candidates, sparse_layers, target_modules
from rtlynx.errors import RTLynxError
from rtlynx.fp8 import kernel_dtype
from rtlynx.fusions import fused_layers
from rtlynx.fusions.fusion import Fusion
from rtlynx.least_tokens import NEVER
from rtlynx.linear import SparseLinear


@dataclass(frozen=True)
class LayerSummary:
    """One linear layer.

    Attributes:
        name: Full dotted name (without the ``.base_layer`` of a peft wrapper); in a pipeline's second transformer after its name,
            such as ``transformer_2.``.
        sparse: Whether its next forward is sparse.
        reason: Why it is dense; empty for a sparse layer.
        in_features: K.
        out_features: N.
        rank: Rank of the branch; 0 without one.
        kernel: What runs it: a kernel's name, ``"reference (CPU)"``, or ``"torch"`` for a dense layer.
        tokens: Rows it is counted with: the summary's, or 1 where the recipe says it sees one row per sample.
        least_tokens: Called with fewer rows than this it computes densely; 0 if it never does.
        fused: What its selection does of what comes before it (`rtlynx.fusions`): ``"GELU (tanh) and concatenation"``; empty if nothing.
        compact: Whether its weight is the e4m3 copy alone (`rtlynx.compact`).
        not_compact: In a model with compact layers: why this sparse one is none; empty for the others.
    """

    name: str
    sparse: bool
    reason: str
    in_features: int
    out_features: int
    rank: int
    kernel: str
    tokens: int
    least_tokens: int = 0
    fused: str = ""
    compact: bool = False
    not_compact: str = ""

    @property
    def flops(self) -> int:
        """2·M·N·K of the dense product with M = `tokens`."""
        return 2 * self.tokens * self.in_features * self.out_features

    @property
    def remark(self) -> str:
        """Why it is dense, or what runs it, what is fused into it, and from how many tokens on; whether it is compact."""
        held = "; compact" if self.compact else f"; not compact: {self.not_compact}" if self.not_compact else ""
        if not self.sparse:
            return self.reason + held
        fused = f"; fused with {self.fused}" if self.fused else ""
        return f"{self.kernel}{fused}" + (f"; from {self.least_tokens} tokens on" if self.least_tokens else "") + held


@dataclass(frozen=True)
class Summary:
    """What `summary` returns: iterate for the rows, print for a table.

    Attributes:
        model: Class name of the model, or of both.
        tokens: M, the rows that every token-wise layer is counted with.
        rows: One per linear layer, in the model's order.
    """

    model: str
    tokens: int
    rows: tuple[LayerSummary, ...]

    def __iter__(self) -> Iterator[LayerSummary]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sparse_flops_share(self) -> float:
        """Share of the linear layers' FLOPs (2·M·N·K each) that sparse layers do; attention's own products are not counted.

        Every token-wise layer counts with the same M, image and text streams alike; layers that see one row per sample count with M = 1.
        """
        total = sum(row.flops for row in self.rows)
        return sum(row.flops for row in self.rows if row.sparse) / total if total else 0.0

    def __str__(self) -> str:
        table = Table(box=None, pad_edge=False)
        for heading in ("layer", "count", "K → N", "state", "rank", "kernel, or why dense"):
            table.add_column(heading, justify="right" if heading in ("count", "rank") else "left", overflow="fold")
        for row, count in self._grouped():
            state = "sparse" if row.sparse else "dense"
            table.add_row(row.name, str(count), f"{row.in_features} → {row.out_features}", state, str(row.rank or "-"), row.remark)
        text = io.StringIO()
        Console(file=text, width=160, color_system=None).print(table)
        sparse = sum(row.sparse for row in self.rows)
        share = f"{sparse} of {len(self)} linear layers are sparse, {self.sparse_flops_share:.1%} of their FLOPs at {self.tokens} tokens"
        compact = sum(row.compact for row in self.rows)
        share += f", {compact} compact" if compact else ""
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([self.model, *lines, share])

    def _grouped(self) -> list[tuple[LayerSummary, int]]:
        """Rows that differ only in a block's number, as one row with ``*`` in its name, and their count."""
        counts: dict[LayerSummary, int] = {}
        for row in self.rows:
            # a number followed by a dot is a block's index; the last one (net.2, to_out.0) tells layers of a block apart
            key = replace(row, name=re.sub(r"\.\d+\.", ".*.", row.name, count=1))
            counts[key] = counts.get(key, 0) + 1
        return list(counts.items())


def summary(pipe_or_module: object, tokens: int = 4096) -> Summary:
    """Say for every linear layer of a model: sparse or dense, why, its shape and its kernel.

    Args:
        pipe_or_module: A module, or a pipeline with a ``.transformer`` or ``.unet``.
        tokens: M to plan kernels and weigh layers with; 4096 is 1024×1024 pixels in FLUX.1, Qwen-Image and Z-Image.

    Raises:
        InvalidArgumentError: `pipe_or_module` has no module.
    """
    modules = target_modules(pipe_or_module, "summary")
    rows: list[LayerSummary] = []
    for prefix, root in modules.items():
        config = applied_config(root)
        fused = fused_layers(root)
        kept = kept_weights(root) if any(layer.is_compact for layer in sparse_layers(root).values()) else {}
        judged = candidates(root, config or SparsityConfig())
        rows += (_row(prefix, candidate, config is not None, tokens, fused, kept) for candidate in judged)
    return Summary(", ".join(type(root).__name__ for root in modules.values()), tokens, tuple(rows))


def _row(
    prefix: str,
    candidate: Candidate,
    applied: bool,
    tokens: int,
    fused: Mapping[SparseLinear, Fusion],
    kept: Mapping[SparseLinear, str],
) -> LayerSummary:
    layer = candidate.module
    make = partial(
        LayerSummary,
        name=prefix + candidate.name,
        in_features=layer.in_features,
        out_features=layer.out_features,
        tokens=1 if candidate.per_sample else tokens,
    )
    if not isinstance(layer, SparseLinear):
        added = "added or replaced since rtlynx.apply" if applied else "rtlynx.apply was not called on this model"
        return make(sparse=False, reason=candidate.reason or added, rank=0, kernel="torch")
    make = partial(make, compact=layer.is_compact, not_compact=kept.get(layer, ""))
    if layer.dense:
        return make(sparse=False, reason="its `dense` switch is on", rank=layer.rank, kernel="torch")
    least = _least_tokens(layer)
    make = partial(make, rank=layer.rank, least_tokens=least)
    if tokens < least:
        few = "whatever the number of tokens" if least == NEVER else f"with fewer than {least} tokens"
        return make(sparse=False, reason=f"dense is faster {few}", kernel="torch")
    fusion = fused.get(layer)
    taken_in = str(fusion) if fusion is not None and fusion.pays(tokens, layer.weight.device) else ""
    return make(sparse=True, reason="", kernel=planned_kernel(layer, tokens), fused=taken_in)


def _least_tokens(layer: SparseLinear) -> int:
    if layer.small_m == "sparse":
        return 0
    try:
        return layer.least_tokens(layer.weight.device)
    except RTLynxError:  # no kernel runs it: `planned_kernel` says why
        return 0


def planned_kernel(layer: SparseLinear, tokens: int) -> str:
    """What will run ``layer`` on ``tokens`` rows where its weight is now; the error message where nothing can."""
    device = layer.weight.device
    if device.type == "cpu":
        return "reference (CPU)"
    if device.type != "cuda":
        return f"none on device {device.type}"
    try:
        return launch.core().gemm_kernel(  # type: ignore[no-any-return]
            device_index=torch.cuda.current_device() if device.index is None else device.index,
            m=tokens,
            n=layer.out_features,
            k=layer.in_features,
            rank=layer.rank,
            dtype=kernel_dtype(layer.compute_dtype, layer.values_dtype),
        )
    except RTLynxError as error:
        return f"none: {error.message}"
