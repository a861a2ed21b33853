"""Give the blocks of a model their fused class, or their own again."""

from __future__ import annotations

import logging

from torch import nn

from rtlynx.fusions.fusion import Fusion
from rtlynx.fusions.known import fused_class
from rtlynx.linear import SparseLinear

logger = logging.getLogger("rtlynx")


def install_fusions(root: nn.Module, enabled: bool = True) -> None:
    """Let the blocks in ``root`` that have sparse layers fuse what they can, and no others; norms where there is a sparse layer at all."""
    in_root = enabled and _has_sparse(root)
    for block in root.modules():
        cls = original_class(block)
        wanted = fused_class(cls) if in_root else None  # type: ignore[arg-type]  # classes are hashable
        if wanted is not None and getattr(wanted, "has_layers", True) and not _has_sparse(block):
            wanted = None
        if wanted is not None and type(block) is cls and "forward" in block.__dict__:  # it holds on to the original's
            logger.info("fuse: a %s stays as it is: its forward is wrapped by a hook", cls.__name__)
            continue
        if type(block) is not (wanted or cls):
            block.__class__ = wanted or cls
    if enabled:
        logger.info("%s: %d sparse layers do what comes before them as they select", type(root).__name__, len(fused_layers(root)))


def _has_sparse(root: nn.Module) -> bool:
    return any(isinstance(module, SparseLinear) for module in root.modules())


def original_class(block: nn.Module) -> type[nn.Module]:
    """The block's class as its model made it."""
    unfused = vars(type(block)).get("unfused")
    return unfused if isinstance(unfused, type) and isinstance(block, unfused) else type(block)


def fused_layers(root: nn.Module) -> dict[SparseLinear, Fusion]:
    """Layer → what it takes in, as things are now; layers that take in nothing are not in it."""
    fused = (block for block in root.modules() if original_class(block) is not type(block))
    found = (block.fusion() for block in fused if hasattr(block, "fusion"))  # type: ignore[operator]
    return {fusion.layer: fusion for fusion in found if fusion is not None}
