"""`LayerStatistics`: the second moments of one layer's input that its branch is fitted from."""

from __future__ import annotations

import torch
from torch import Tensor

from rtlynx import reference
from rtlynx.config import Branch
from rtlynx.linear import SparseLinear


def regressors(layer: SparseLinear, x: Tensor, branch: Branch) -> tuple[Tensor, Tensor]:
    """(Z, E): what the branch reads and what the sparse product misses, ``E = X' - s·S(X')``, both ``(M, K)`` float32.

    ``Z = X'`` for ``branch="input"`` and ``X' - S(X')`` for ``"dropped"``, where without norm compensation Z is E.

    Args:
        layer: Says how to select; its weight is not used.
        x: ``(M, K)`` in the layer's dtype.
        branch: What the branch reads.
    """
    sparse = reference.sparsify(x, layer.score, layer.shift, norm_compensation=layer.norm_compensation)
    kept = reference.decompress(sparse.values, sparse.metadata).float()
    shifted = reference.shifted(x, layer.shift).float()
    dropped = shifted - kept
    missed = shifted - kept * sparse.row_scale[:, None] if layer.norm_compensation else dropped
    return dropped if branch == "dropped" else shifted, missed


class LayerStatistics:
    """Running sums ``Σ zᵀz`` and ``Σ zᵀe`` over the tokens a layer reads, float32, on the device of its input.

    ``z`` is what the branch will read and ``e`` what the sparse product misses; with ``branch="dropped"`` and no norm compensation they
    are one.

    Of every call at most ``max_tokens`` tokens are sampled, without replacement, and weighted so that a call counts with all its tokens.

    Attributes:
        sampled: Tokens that entered the sums.
        zz: ``(K, K)``, the mean of ``zᵀz`` over tokens once `finish` was called.
        ze: ``(K, K)``, likewise; None where e is z.
    """

    zz: Tensor
    ze: Tensor | None = None

    def __init__(self, layer: SparseLinear, branch: Branch, max_tokens: int, seed: int) -> None:
        self.layer = layer
        self.branch: Branch = branch
        self.max_tokens = max_tokens
        self.sampled = 0
        self._tokens = 0
        # A CPU generator whatever the device, so that every device samples the same tokens.
        self._generator = torch.Generator().manual_seed(seed)

    @staticmethod
    def bytes_needed(layer: SparseLinear, branch: Branch) -> int:
        """Memory the sums take."""
        return 4 * layer.in_features**2 * (1 if _one_sum(layer, branch) else 2)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Add the tokens of one call; ``x`` is ``(..., K)``."""
        x = x.detach().reshape(-1, self.layer.in_features)
        tokens = x.shape[0]
        if tokens == 0:
            return
        if tokens > self.max_tokens:
            x = x[torch.randperm(tokens, generator=self._generator)[: self.max_tokens].to(x.device)]
        z, e = regressors(self.layer, x, self.branch)
        weight = tokens / x.shape[0]
        if self.sampled == 0:
            self.zz = z.new_zeros(x.shape[1], x.shape[1])
            self.ze = None if _one_sum(self.layer, self.branch) else torch.zeros_like(self.zz)
        self.zz.addmm_(z.T, z, alpha=weight)
        if self.ze is not None:
            self.ze.addmm_(z.T, e, alpha=weight)
        self.sampled += x.shape[0]
        self._tokens += tokens

    def finite(self) -> bool:
        """Whether everything added so far was finite: a NaN or infinity in channel j stays in the diagonal."""
        return self.sampled == 0 or bool(self.zz.diagonal().sum().isfinite())

    def finish(self) -> None:
        """Turn the sums into means. At least one token must have been added."""
        self.zz /= self._tokens
        if self.ze is not None:
            self.ze /= self._tokens


def _one_sum(layer: SparseLinear, branch: Branch) -> bool:
    """Whether what the branch reads is what the sparse product misses, so that Σze is Σzz."""
    return branch == "dropped" and not layer.norm_compensation
