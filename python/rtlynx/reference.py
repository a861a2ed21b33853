"""The semantics of every rtlynx op in plain torch: the CPU implementation and the oracle of every kernel test.

Notation: ``M`` tokens, ``K`` input channels, ``N`` output channels, ``r`` branch rank, dtype ``T`` in {bfloat16, float16} (and float32 on
the CPU only). A *group* is 4 neighbouring channels of one token. The operands of the sparse product are of dtype T, or both e4m3 (fp8);
everything else is of dtype T either way. docs/format.md draws the bits.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BranchInput = Literal["input", "dropped"]
Activation = Literal["none", "gelu_tanh", "gelu", "silu_gate"]
"""What `sparsify` does to its input before it selects; see `activated`."""

GROUP = 4
"""Channels per 2:4 group; 2 of them are kept."""
TILE_ROWS = 16
"""Rows of one tensor-core tile, the unit of the metadata along M."""
PADDED_ROWS = 64
"""The metadata describes rows up to a multiple of this: 4 tiles, what a warpgroup takes."""
BLOCK_COLS = 256
"""Dense columns of one metadata block: 4 words a lane."""
PIECE = 16
"""Channels of a piece: a unit of 64 gathered channels comes from four, one in each quarter of K."""
K_MULTIPLE = 64
"""K of a sparse layer is a multiple of this: one metadata word covers 64 channels of a quad of lanes."""
N_MULTIPLE = 8
"""N of a sparse layer is a multiple of this: 16-byte stores."""
RANK_MULTIPLE = 16
"""The branch rank is a multiple of this: the depth of one dense tensor-core step."""
MAX_RANK = 128
"""The largest branch rank: what one stage buffer of the kernels holds."""
EPS = 1e-8
"""ε of the norm compensation (RT-Lynx, arXiv 2605.26632)."""
E4M3 = torch.float8_e4m3fn
"""The operand dtype of fp8: 4 bits of exponent, 3 of mantissa, no infinity."""
E4M3_MAX = 448.0
"""The largest finite e4m3 number."""

_GELU = {"gelu_tanh": "tanh", "gelu": "none"}  # activation → what torch calls its approximation
_ZERO_GROUP_NIBBLE = 0b0100  # positions (0, 1): what an all-zero group selects, hence also the padding
_E4M3_NAN = 0x7F  # of either sign, as the GPU's conversion gives it


class Sparsified(NamedTuple):
    """A 2:4-compressed activation, what `sparsify` returns.

    Attributes:
        values: ``(M, K/2)`` of dtype T or e4m3; the two kept values of group c are columns 2c and 2c+1, in channel order.
        metadata: ``(⌈K/256⌉, 4⌈M/64⌉, 32, 4)`` int32; the kept positions, 8 groups a word, ordered as the dtype of the values asks for
            (docs/format.md).
        row_scale: ``(M,)`` float32 norm compensation, or ``(0,)`` when it is off.
        branch: ``(M, r)`` of dtype T, the input of the rank-r branch, or ``(M, 0)`` without one.
    """

    values: Tensor
    metadata: Tensor
    row_scale: Tensor
    branch: Tensor


def metadata_shape(m: int, k: int) -> tuple[int, int, int, int]:
    """Shape of the metadata tensor of an ``(m, k)`` activation: K blocks, 16-row tiles, lanes, words."""
    return (-(-k // BLOCK_COLS), -(-m // PADDED_ROWS) * (PADDED_ROWS // TILE_ROWS), 32, 4)


def activated(x: Tensor, activation: Activation = "none", gate: Tensor | None = None, head: Tensor | None = None) -> Tensor:
    """``X = cat([head, act(x)], -1)``, what `sparsify` selects from; act in float32, rounded once to ``x.dtype``.

    Args:
        x: ``(M, K - K0)`` of dtype T.
        activation: ``"none"``: x as it is. ``"gelu_tanh"``: GELU in its tanh approximation. ``"gelu"``: GELU itself, by erf.
            ``"silu_gate"``: ``x · sigmoid(x) · gate``.
        gate: ``(M, K - K0)`` of dtype T with ``"silu_gate"``, else None.
        head: ``(M, K0)`` of dtype T, channels that come before and are taken as they are; None: K0 is 0.

    Returns:
        ``(M, K)`` of dtype T; ``x`` itself where there is nothing to do.
    """
    if activation == "silu_gate":
        assert gate is not None
        x = (F.silu(x.float()) * gate).to(x.dtype)
    elif activation != "none":
        x = F.gelu(x, approximate=_GELU[activation])  # which torch computes in float32
    return x if head is None else torch.cat([head, x], -1)


def activated_backward(
    grad: Tensor, x: Tensor, activation: Activation, gate: Tensor | None, head: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, gate and head from that of ``activated(x, activation, gate, head)``."""
    grad_head = grad_gate = None
    if head is not None:
        grad_head, grad = grad.split([head.shape[1], x.shape[1]], 1)
    if activation == "none":
        return grad, None, grad_head
    grad, wide = grad.float(), x.float()
    if activation == "silu_gate":
        assert gate is not None
        grad_gate = (grad * F.silu(wide)).to(x.dtype)
        grad = torch.ops.aten.silu_backward(grad * gate.float(), wide)
    else:
        grad = torch.ops.aten.gelu_backward(grad, wide, approximate=_GELU[activation])
    return grad.to(x.dtype), grad_gate, grad_head


def row_stats(h: Tensor, centered: bool = True, eps: float = 1e-6) -> Tensor:
    """Mean and ``1 / sqrt(variance + eps)`` of every row, in float32: ``(M, K)`` → ``(M, 2)``.

    Args:
        h: ``(M, K)`` of dtype T.
        centered: As LayerNorm has it: the variance is the mean of squared deviations. False: as RMSNorm has it: the mean is taken to be 0.
        eps: Added to the variance.
    """
    h = h.float()
    if centered:
        variance, mean = torch.var_mean(h, 1, correction=0)
    else:
        variance = h.square().mean(1)
        mean = torch.zeros_like(variance)
    return torch.stack([mean, (variance + eps).rsqrt()], 1)


def row_stats_backward(grad: Tensor, h: Tensor, stats: Tensor, centered: bool) -> Tensor:
    """The gradient of h from that of ``stats = row_stats(h, centered)``."""
    (grad_mean, grad_rstd), (mean, rstd) = grad.unbind(1), stats.unbind(1)
    grad_h = (h.float() - mean[:, None]) * (-grad_rstd * rstd**3)[:, None]
    if centered:
        grad_h = grad_h + grad_mean[:, None]
    return (grad_h / h.shape[1]).to(h.dtype)


def normed(h: Tensor, stats: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``X = (h - mean) · rstd · weight + bias``, what `sparsify` selects from; every step in float32, rounded once to ``h.dtype``.

    Args:
        h: ``(M, K)`` of dtype T.
        stats: ``(M, 2)`` float32, mean and rstd of each row (`row_stats`); None: X is h.
        weight: ``(B, K)`` of dtype T, B a divisor of M: row r of h takes row ``r // (M / B)``. None: 1.
        bias: ``(B, K)`` of dtype T. None: 0.

    Returns:
        ``(M, K)`` of dtype T; ``h`` itself without `stats`.
    """
    if stats is None:
        return h
    x = (h.float() - stats[:, :1]) * stats[:, 1:]
    if weight is not None:
        x = x * _by_rows(weight, h)
    if bias is not None:
        x = x + _by_rows(bias, h)
    return x.to(h.dtype)


def _by_rows(vectors: Tensor, h: Tensor) -> Tensor:
    """``(B, K)`` → the row that belongs to each row of h, in float32."""
    samples = vectors.shape[0]
    return vectors.float() if samples == 1 else vectors.float().repeat_interleave(h.shape[0] // samples, 0)


def normed_backward(
    grad: Tensor, h: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of h, stats, weight and bias from that of ``normed(h, stats, weight, bias)``."""
    grad, away, rstd = grad.float(), h.float() - stats[:, :1], stats[:, 1:]

    def of_samples(grad: Tensor, vectors: Tensor | None) -> Tensor | None:
        if vectors is None:
            return None
        samples = vectors.shape[0]
        return grad.reshape(samples, grad.shape[0] // samples, grad.shape[1]).sum(1).to(vectors.dtype)

    grad_weight, grad_bias = of_samples(grad * away * rstd, weight), of_samples(grad, bias)
    if weight is not None:
        grad = grad * _by_rows(weight, h)
    grad_stats = torch.stack([-(grad * rstd).sum(1), (grad * away).sum(1)], 1)
    return (grad * rstd).to(h.dtype), grad_stats, grad_weight, grad_bias


def permutation_of(places: Tensor) -> Tensor:
    """``(K,)`` int64: the channel that each gathered channel is, ``X_gathered = X[:, permutation_of(places)]``.

    Gathered channels 64u .. 64u + 63 are those of *window* u in another order: 16 neighbouring channels, a *piece*, of each quarter of K.
    docs/format.md draws it.

    Args:
        places: ``(K,)`` uint8, K a multiple of 64: ``16 · piece + channel of the piece``, of every window all of 0..63.
    """
    k, place = len(places), places.long()
    window = torch.arange(k, device=places.device) // K_MULTIPLE
    return place // PIECE * (k // (K_MULTIPLE // PIECE)) + window * PIECE + place % PIECE


def places_of(permutation: Tensor) -> Tensor | None:
    """Inverse of `permutation_of`: ``(K,)`` uint8, or None where a window has not each of its channels once, K no multiple of 64.

    Args:
        permutation: ``(K,)`` int64.
    """
    k = len(permutation)
    if k % K_MULTIPLE:
        return None
    in_order = permutation_of(torch.arange(K_MULTIPLE, device=permutation.device).repeat(k // K_MULTIPLE))
    if not torch.equal(permutation.view(-1, K_MULTIPLE).sort(1).values.flatten(), in_order):
        return None
    quarter = k // (K_MULTIPLE // PIECE)
    return (permutation // quarter * PIECE + permutation % quarter % PIECE).byte()


def gathered(x: Tensor, places: Tensor | None) -> Tensor:
    """``(M, K)``: the channels of ``x`` in the order of ``places``; ``x`` itself without them."""
    return x if places is None else x.index_select(1, permutation_of(places))


def finished(y: Tensor, activation: Activation = "none", residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """``residual + gate · z`` with ``z = act(y)``, what `sparse_linear` makes of its product; each in float32 and rounded once to T.

    Args:
        y: ``(M, N)`` of dtype T.
        activation: ``"none"`` or ``"gelu_tanh"``: see `activated`.
        residual: ``(M, N)`` of dtype T; None: z is all.
        gate: ``(B, N)`` of dtype T, each row for the next M / B rows of z; None: 1.

    Returns:
        ``(M, N)`` of dtype T; ``y`` itself where there is nothing to do.
    """
    z = activated(y, activation)
    if residual is None:
        return z
    wide = z.float()
    if gate is not None:
        wide = wide * gate.repeat_interleave(z.shape[0] // gate.shape[0], 0).float()
    return (residual.float() + wide).to(z.dtype)


def finished_backward(grad: Tensor, y: Tensor, activation: Activation, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of y and gate from that of ``finished(y, activation, residual, gate)``; that of a residual is ``grad`` itself."""
    grad_gate = None
    if gate is not None:
        samples, n = gate.shape
        by_sample = samples, y.shape[0] // samples, n
        grad, z = grad.reshape(by_sample), activated(y, activation).view(by_sample)
        grad_gate = (grad * z).sum(1)
        grad = (grad * gate.unsqueeze(1)).view(y.shape)
    return activated_backward(grad, y, activation, None, None)[0], grad_gate


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """``x - shift`` computed in float32 and rounded to ``x.dtype``; ``x`` itself without a shift."""
    return x if shift is None else (x.float() - shift).to(x.dtype)


def selection_keys(x: Tensor, score: Tensor | None = None) -> Tensor:
    """What selection compares, as non-negative integers of the same order: the bit pattern of ``|x|``, or of ``float32(|x · score|)``.

    Comparing bit patterns makes the order total: NaN ranks above infinity, so that it is kept and reaches the output.
    """
    if score is not None:
        x = x.float() * score
    if x.dtype is torch.float32:
        return x.view(torch.int32) & 0x7FFFFFFF
    return x.view(torch.int16) & 0x7FFF


def keep_mask(x: Tensor, score: Tensor | None = None) -> Tensor:
    """The 2 of 4 channels kept per group: those with the largest keys, ties to the lower channel.

    Args:
        x: ``(M, K)``, K a multiple of 4.
        score: optional ``(K,)`` float32 factor on the magnitudes.

    Returns:
        ``(M, K)`` bool, exactly two True per group.
    """
    k0, k1, k2, k3 = selection_keys(x, score).unflatten(-1, (-1, GROUP)).unbind(-1)
    # beaten[i] = how many channels of the group rank before channel i; a tie goes to the lower channel.
    gt01, gt02, gt03, gt12, gt13, gt23 = k1 > k0, k2 > k0, k3 > k0, k2 > k1, k3 > k1, k3 > k2
    first = torch.stack([gt01.to(torch.int8) + gt02 + gt03, (~gt01).to(torch.int8) + gt12 + gt13], -1)
    second = torch.stack([(~gt02).to(torch.int8) + ~gt12 + gt23, (~gt03).to(torch.int8) + ~gt13 + ~gt23], -1)
    return (torch.cat([first, second], -1) < 2).flatten(-2)


def kept_positions(mask: Tensor) -> Tensor:
    """``(M, K/4, 2)`` int64: the two kept positions (0..3) of every group of a `keep_mask`, ascending."""
    b0, b1, b2, b3 = mask.unflatten(-1, (-1, GROUP)).unbind(-1)
    low = (~b0).byte() + ~(b0 | b1)  # 0, or 1 without channel 0, or 2 without channels 0 and 1
    high = 3 - ((~b3).byte() + ~(b2 | b3))
    return torch.stack([low, high], -1).long()


def e4m3(x: Tensor) -> Tensor:
    """float32 → e4m3, to nearest, ties to even. What lies beyond ±448, infinity too, becomes ±448; NaN becomes the bits ``0x7F``."""
    bits = x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8)
    return bits.masked_fill(x.isnan(), _E4M3_NAN).view(E4M3)


def pack_metadata(positions: Tensor, values_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Kept positions ``(M, K/4, 2)`` → the metadata words ``(⌈K/256⌉, 4⌈M/64⌉, 32, 4)`` int32 of docs/format.md.

    The dtype of the values says which instruction will read the words: those for 8-bit operands want another order than those for 16.
    """
    m, groups, _ = positions.shape
    blocks, tiles, *_ = metadata_shape(m, groups * GROUP)
    nibbles = torch.full((tiles * TILE_ROWS, blocks * BLOCK_COLS // GROUP), _ZERO_GROUP_NIBBLE, dtype=torch.int64, device=positions.device)
    nibbles[:m, :groups] = positions[..., 0] | positions[..., 1] << 2
    places = torch.tensor([0, 4, 8, 12], device=positions.device)
    halves = (nibbles.unflatten(1, (-1, 4)) << places).sum(-1)  # 16 bits: one row, 16 dense columns
    # rows: tile, half of the tile, g;  columns: block, 64-column step j, then 16 columns as q = 2 · q1 + q0
    halves = _word_order(halves.view(tiles, 2, 8, blocks, 4, 2, 2), values_dtype)
    words = halves[:, 0] | halves[:, 1] << 16  # (tile, g, block, j, lane of the quad)
    words = words.flatten(-2).permute(2, 0, 1, 4, 3).reshape(blocks, tiles, 32, 4)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_metadata(metadata: Tensor, m: int, k: int, values_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Inverse of `pack_metadata`: ``(M, K/4, 2)`` int64 kept positions."""
    blocks, tiles, *_ = metadata.shape
    words = metadata.long().view(blocks, tiles, 8, 2, 2, 4).permute(1, 2, 0, 5, 3, 4)  # (tile, g, block, j, lane of the quad)
    halves = _word_order(torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], 1), values_dtype).reshape(tiles * TILE_ROWS, blocks * 16)
    nibbles = (halves[..., None] >> torch.tensor([0, 4, 8, 12], device=metadata.device) & 0xF).flatten(1)[:m, : k // GROUP]
    return torch.stack([nibbles & 3, nibbles >> 2], -1)


def _word_order(halves: Tensor, values_dtype: torch.dtype) -> Tensor:
    """Halves by (tile, half of the tile, g, block, j, q1, q0) ↔ by (tile, half of the word, g, block, j, lane of the quad as two bits).

    Words for 16-bit operands hold both halves of the tile, lane q for the columns q. Words for 8-bit operands hold twice the columns of
    one row: the half of the tile is the lane's last bit, the last bit of the columns is the half of the word.
    """
    return halves.transpose(1, 6) if values_dtype.itemsize == 1 else halves


def kept_columns(metadata: Tensor, m: int, k: int, values_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """``(M, K/2)`` int64: the dense column every compressed value came from."""
    groups = torch.arange(k // GROUP, device=metadata.device)[:, None] * GROUP
    return (unpack_metadata(metadata, m, k, values_dtype) + groups).flatten(1)


def decompress(values: Tensor, metadata: Tensor) -> Tensor:
    """Compressed values and metadata → ``S(X)``, ``(M, K)``, zeros where channels were dropped (no row scale, no values scale)."""
    m, half = values.shape
    columns = kept_columns(metadata, m, half * 2, values.dtype)
    if values.dtype is E4M3:  # torch does not scatter it; its zero is a zero byte
        return _scattered(values.view(torch.uint8), columns).view(E4M3)
    return _scattered(values, columns)


def _scattered(values: Tensor, columns: Tensor) -> Tensor:
    m, half = values.shape
    return values.new_zeros(m, half * 2).scatter_(1, columns, values)


def sparsify(
    x: Tensor,
    score: Tensor | None = None,
    shift: Tensor | None = None,
    comp_down: Tensor | None = None,
    branch_input: BranchInput = "dropped",
    norm_compensation: bool = True,
    eps: float = EPS,
    values_dtype: torch.dtype | None = None,
    values_scale: float = 1.0,
    activation: Activation = "none",
    gate: Tensor | None = None,
    head: Tensor | None = None,
    norm_stats: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    places: Tensor | None = None,
) -> Sparsified:
    """Select, compress, measure and project: see `rtlynx.ops.sparsify`, whose semantics this defines.

    With ``X`` as in `activated`, its channels `gathered`, or with `norm_stats` as in `normed`, ``X' = X - shift`` and ``S`` the selection::

        row_scale = sqrt(‖X'‖² / (‖S(X')‖² + eps))                      (RT-Lynx norm compensation), s = 1 when it is off
        branch    = X' · comp_down                  for branch_input = "input"    (the paper's branch)
                  = (X' - S(X')) · comp_down        for branch_input = "dropped"  (split: what selection dropped)

    With ``values_dtype = float8_e4m3fn`` the kept values are stored as ``e4m3(float32(x') · values_scale)``; selection, row scale and
    branch are of the unrounded X' all the same.
    """
    x = activated(normed(x, norm_stats, norm_weight, norm_bias), activation, gate, head)
    x = shifted(gathered(x, places), shift)
    k = x.shape[1]
    mask = keep_mask(x, score)
    positions = kept_positions(mask)
    columns = (positions + torch.arange(k // GROUP, device=x.device)[:, None] * GROUP).flatten(1)
    values = x.gather(1, columns)

    row_scale = torch.empty(0, dtype=torch.float32, device=x.device)
    if norm_compensation:
        row_scale = (x.float().square().sum(1) / (values.float().square().sum(1) + eps)).sqrt()

    branch = x.new_empty(x.shape[0], 0)
    if comp_down is not None:
        z = x.float()
        if branch_input == "dropped":
            z = z.masked_fill(mask, 0)
        branch = _product(z, comp_down).to(x.dtype)
    if values_dtype is not None:
        values = e4m3(values.float() * values_scale)
    return Sparsified(values, pack_metadata(positions, values.dtype), row_scale, branch)


def sparse_linear(
    values: Tensor,
    metadata: Tensor,
    weight: Tensor,
    row_scale: Tensor | None = None,
    branch: Tensor | None = None,
    comp_up: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: Activation = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``row_scale · (S(X) · weightᵀ) · weight_scale + branch · comp_upᵀ + bias`` in float32, rounded once, then `finished`.

    See `rtlynx.ops.sparse_linear`.
    """
    out = _product(decompress(values, metadata), weight.T)
    if row_scale is not None and row_scale.numel():
        out = out * row_scale[:, None]
    if weight_scale is not None:
        out = out * weight_scale
    if branch is not None and comp_up is not None:
        out = out + _product(branch, comp_up.T)
    if bias is not None:
        out = out + bias.float()
    return finished(out.to(values.dtype if out_dtype is None else out_dtype), activation, residual, gate)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a · b`` in float32, whatever ``torch.autocast`` is set to."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()
