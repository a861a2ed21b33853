"""One direction of dependency (docs/architecture.md): no module needs itself by way of others; what uses the package stands above it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import rtlynx

ROOT = Path(rtlynx.__file__).parent
MODULES = {
    ".".join(("rtlynx", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")
}
USERS = ("bench", "cli", "demo")
"""Packages that use the rest; nothing else knows of them."""


def imported(path: Path) -> set[str]:
    """Modules of the package that are imported when this one is: not those for types alone, nor within functions."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rtlynx":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= submodules or {node.module}
            found |= {node.module} if len(submodules) < len(node.names) else set()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found & MODULES.keys()


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def test_no_module_needs_itself() -> None:
    # The top module and packages gather what their modules have, for users; those import from each other, not from it.
    graph = {name: imports - {"rtlynx"} for name, imports in IMPORTS.items() if name != "rtlynx"}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(graph) > 150


def test_nothing_below_knows_what_uses_it() -> None:
    above = {name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in USERS}
    assert above
    assert not {name: known for name in MODULES.keys() - above if (known := IMPORTS[name] & above)}
