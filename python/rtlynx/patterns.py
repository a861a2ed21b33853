"""Globs over dotted module names: how recipes and configurations name layers.

| piece    | matches                                                                              |
|----------|--------------------------------------------------------------------------------------|
| ``*``    | any characters of one component (a component that is only ``*`` is never empty)      |
| ``**``   | any number of whole components, also none                                            |
| ``#``    | one component that is a number: the index of a block                                 |
| ``{a,b}``| either alternative; alternatives may contain dots and nested braces                  |

So ``blocks.*.attn.{to_q,to_out.0}`` matches ``blocks.3.attn.to_out.0`` and not ``blocks.3.extra.attn.to_q``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

from rtlynx.errors import InvalidArgumentError


def expand_braces(pattern: str) -> list[str]:
    """``"a.{b,c.d}"`` → ``["a.b", "a.c.d"]``, outermost braces first.

    Raises:
        InvalidArgumentError: The braces do not balance.
    """
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise InvalidArgumentError("pattern", "braces", repr(pattern), "balanced braces")
        return [pattern]
    depth, cuts = 0, [start]
    for i in range(start, len(pattern)):
        depth += (pattern[i] == "{") - (pattern[i] == "}")
        if depth == 0 or (depth == 1 and pattern[i] == ","):
            cuts.append(i)
        if depth == 0:
            alternatives = [pattern[a + 1 : b] for a, b in pairwise(cuts)]
            return [name for middle in alternatives for name in expand_braces(pattern[:start] + middle + pattern[i + 1 :])]
    raise InvalidArgumentError("pattern", "braces", repr(pattern), "balanced braces")


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob, to be used with ``fullmatch`` on the name followed by a dot.

    Every component is written with the dot that follows it, so that ``**`` can stand for none at all.

    Raises:
        InvalidArgumentError: The pattern is empty, has an empty component, or its braces do not balance.
    """
    return re.compile("|".join(_expression(p) for p in expand_braces(pattern)))


def _expression(pattern: str) -> str:
    components = pattern.split(".")
    if not all(components):
        raise InvalidArgumentError("pattern", "components", repr(pattern), "non-empty components between dots")
    parts = []
    for component in components:
        if component == "**":
            parts.append(r"(?:[^.]+\.)*")
        elif component == "*":
            parts.append(r"[^.]+\.")
        elif component == "#":
            parts.append(r"[0-9]+\.")
        else:
            parts.append("[^.]*".join(re.escape(piece) for piece in component.split("*")) + r"\.")
    return "".join(parts)


def first_match(name: str, patterns: Iterable[str]) -> str | None:
    """The first of ``patterns`` that matches the full dotted ``name``, or None."""
    return next((p for p in patterns if compile_pattern(p).fullmatch(name + ".")), None)
