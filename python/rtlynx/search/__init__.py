"""Search: which layers to leave dense and which rank to give the others, for a budget of time.

`candidates` fits every option of every unit of layers, `effects` estimates what each does to the model's output, `times` what it costs,
`knapsack` chooses, and `search` measures what was chosen and refines it. The result is a recipe file that `rtlynx.apply` takes.
"""

from __future__ import annotations

from rtlynx.search.plot import plot_pareto
from rtlynx.search.search import Point, Search, search

__all__ = ["Point", "Search", "plot_pareto", "search"]
