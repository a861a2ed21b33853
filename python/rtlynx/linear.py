"""`SparseLinear`: an ``nn.Linear`` whose input is 2:4-sparsified on the fly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtlynx import ops
from rtlynx.config import Branch, Selection, SparsityConfig
from rtlynx.errors import InvalidArgumentError
from rtlynx.reference import MAX_RANK, RANK_MULTIPLE, BranchInput

_COMPENSATION = ("comp_down", "comp_up", "comp_bias", "shift")
"""The tensors calibration adds to a layer; absent from its state dict until then."""


class SparseLinear(nn.Linear):
    """A linear layer that multiplies the 2:4-sparsified input by the dense weight, plus a rank-r branch::

        Y = s · S(X - m) Wᵀ + Z · comp_downᵀ · comp_upᵀ + bias + comp_bias

    with ``S`` the selection, ``s`` the norm compensation of each token, ``m`` the shift (0 without one) and ``Z`` what the
    branch reads: ``X - m`` (``branch="input"``) or what selection dropped, ``X - m - S(X - m)`` (``branch="dropped"``).

    It is an ``nn.Linear``: ``weight`` ``(N, K)`` stays dense, in the standard layout and bit for bit what it was, so that
    adapters, fusing and offloading work as on any linear. Until `set_compensation` there is no branch and the state dict has
    the keys of ``nn.Linear``.

    Args:
        in_features: K, a multiple of 64.
        out_features: N, a multiple of 8.
        bias: Whether there is a bias.
        device: Where to create the parameters.
        dtype: bfloat16 or float16; also float32 on the CPU.
        config: How it computes; its `include`, `skip` and `rank` are not used here.

    Attributes:
        dense: When True the layer is exactly ``F.linear(x, weight, bias)``.
        branch, selection, norm_compensation: As in `SparsityConfig`.
        comp_down: Parameter ``(r, K)`` or None. Compensation parameters do not require gradients unless asked to.
        comp_up: Parameter ``(N, r)`` or None.
        comp_bias: Parameter ``(N,)`` or None: ``m · Wᵀ``, present with `shift`.
        shift: Buffer ``(K,)`` float32 or None.
        score: Buffer ``(K,)`` float32, ``‖W_:j‖``, with ``selection="weight"``, else None. Not saved: see `update_score`.
    """

    comp_down: nn.Parameter | None
    comp_up: nn.Parameter | None
    comp_bias: nn.Parameter | None
    shift: Tensor | None
    score: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: SparsityConfig | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.dense = False
        self.comp_down = self.comp_up = self.comp_bias = None
        self.register_buffer("shift", None)
        self.register_buffer("score", None, persistent=False)
        self.configure(config or SparsityConfig())

    def configure(self, config: SparsityConfig) -> None:
        """Compute as ``config`` says from now on; a compensation fitted for other arithmetic must be cleared by the caller."""
        self.branch: Branch = config.branch
        self.selection: Selection = config.selection
        self.norm_compensation = config.norm_compensation
        self.update_score()

    @property
    def rank(self) -> int:
        """Rank of the branch; 0 without one."""
        return 0 if self.comp_down is None else self.comp_down.shape[0]

    # ---- to and from nn.Linear ----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: SparsityConfig | None = None) -> SparseLinear:
        """A sparse layer that shares ``linear``'s Parameter objects, hooks and other attributes; nothing is copied."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        _take_over(layer, linear)
        layer.configure(config or SparsityConfig())
        return layer

    def to_linear(self) -> nn.Linear:
        """The plain ``nn.Linear`` again: the same Parameter objects and hooks, without the compensation."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        _take_over(linear, self)
        return linear

    # ---- compensation -------------------------------------------------------------------------------------------------------------------

    def set_compensation(self, comp_down: Tensor | None = None, comp_up: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Replace the compensation. Tensors are copied to the weight's dtype and device (`shift`: float32).

        Args:
            comp_down: ``(r, K)``, r a multiple of 16 up to 128; None for no branch.
            comp_up: ``(N, r)``, given exactly if `comp_down` is.
            shift: ``(K,)``; ``shift · Wᵀ`` goes to `comp_bias`.

        Raises:
            InvalidArgumentError: A shape does not fit, or a branch is given to a layer with ``branch="none"``.
        """
        problem = self.branch_problem(comp_down, comp_up)
        if problem:
            raise InvalidArgumentError("SparseLinear.set_compensation", "comp_down and comp_up", *problem)
        if shift is not None and shift.shape != (self.in_features,):
            raise InvalidArgumentError("SparseLinear.set_compensation", "shift", f"shape {tuple(shift.shape)}", f"({self.in_features},)")

        def parameter(value: Tensor | None) -> nn.Parameter | None:
            return None if value is None else nn.Parameter(value.detach().to(self.weight, copy=True).contiguous(), requires_grad=False)

        self.comp_down, self.comp_up = parameter(comp_down), parameter(comp_up)
        self.shift = None if shift is None else shift.detach().to(self.weight.device, torch.float32, copy=True)
        self.comp_bias = None if self.shift is None else parameter(self.weight.detach().float() @ self.shift)

    def update_score(self) -> None:
        """Recompute `score` from the weight. Call it after changing the weight in place, e.g. after fusing a LoRA.

        The score only ranks channels: a stale one costs a little accuracy, never correctness. ``load_state_dict`` calls this.
        """
        if self.selection == "weight":
            self.score = torch.linalg.vector_norm(self.weight.detach(), dim=0, dtype=torch.float32)
        else:
            self.score = None

    def branch_problem(self, comp_down: Tensor | None, comp_up: Tensor | None) -> tuple[str, str] | None:
        """(got, expected) when the two factors cannot be this layer's branch."""
        if comp_down is None and comp_up is None:
            return None
        if self.branch == "none":
            return "a branch", 'none, since the layer has branch="none"'
        if comp_down is None or comp_up is None:
            return "one of them", "both or neither"
        rank = comp_down.shape[0]
        shapes = tuple(comp_down.shape), tuple(comp_up.shape)
        if shapes != ((rank, self.in_features), (self.out_features, rank)) or rank % RANK_MULTIPLE or not 0 < rank <= MAX_RANK:
            expected = f"(r, {self.in_features}) and ({self.out_features}, r), r a multiple of {RANK_MULTIPLE} up to {MAX_RANK}"
            return f"shapes {shapes[0]} and {shapes[1]}", expected
        return None

    # ---- nn.Module ----------------------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """``(..., K)`` → ``(..., N)``, same dtype."""
        if self.dense:
            return F.linear(input, self.weight, self.bias)
        x = input.reshape(-1, self.in_features)
        branch_input: BranchInput = "input" if self.branch == "input" else "dropped"
        sparse = ops.sparsify(x, self.score, self.shift, self.comp_down, branch_input, self.norm_compensation)
        bias: Tensor | None = self.bias
        if self.comp_bias is not None:
            bias = self.comp_bias if bias is None else bias + self.comp_bias
        output = ops.sparse_linear(
            sparse.values,
            sparse.metadata,
            self.weight,
            sparse.row_scale if self.norm_compensation else None,
            sparse.branch if self.comp_down is not None else None,
            self.comp_up,
            bias,
        )
        return output.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        compensation = f"rank={self.rank}, branch={self.branch}, norm_compensation={self.norm_compensation}"
        shift = ", shift=True" if self.shift is not None else ""
        return f"{super().extra_repr()}, {compensation}, selection={self.selection}{shift}, dense={self.dense}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        # `.to(bfloat16)` casts every floating-point buffer, but selection reads float32: redo those moves without the cast.
        before = {name: getattr(self, name) for name in ("shift", "score")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new is not None and new.dtype != torch.float32:
                setattr(self, name, old.to(new.device))
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint saved with a compensation loads into a layer that has none yet, or one of another rank: make room for it.
        found = {name: state_dict.get(prefix + name) for name in _COMPENSATION}
        if found["comp_down"] is not None and self.branch_problem(found["comp_down"], found["comp_up"]) is None:
            self.comp_down, self.comp_up = self._room_for(found["comp_down"]), self._room_for(found["comp_up"])
        if found["shift"] is not None and self.shift is None:
            self.shift = self.weight.new_zeros(self.in_features, dtype=torch.float32)
            self.comp_bias = self._room_for(found["comp_bias"])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.update_score()

    def _room_for(self, value: Tensor | None) -> nn.Parameter | None:
        return None if value is None else nn.Parameter(self.weight.new_zeros(value.shape), requires_grad=False)


def _take_over(new: nn.Linear, old: nn.Linear) -> None:
    """Give ``new`` everything of ``old`` that is not sparsity: parameters, training flag, hooks, attributes set from outside.

    Hook dictionaries are shared as objects, so that the handles users hold still remove their hooks.

    Raises:
        InvalidArgumentError: The old layer's forward is wrapped; the wrapper is bound to the old layer and cannot move.
    """
    if "forward" in old.__dict__:
        got, expected = "a layer whose forward is wrapped by a hook", "one without: remove the hook first"
        raise InvalidArgumentError(type(new).__name__, "layer", got, expected)
    own = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl"}
    own |= {"dense", "branch", "selection", "norm_compensation"}
    new.__dict__.update({key: value for key, value in old.__dict__.items() if key not in own})
    new.weight, new.bias = old.weight, old.bias
