"""How results are shown and stored: terminal tables, picture grids, self-contained HTML pages and JSON.

Nothing here knows what was measured, so that the demo, benches and the search show their results alike.
"""

from __future__ import annotations

from rtlynx.report.files import write_image, write_json, write_text
from rtlynx.report.grid import picture_grid
from rtlynx.report.page import Page
from rtlynx.report.table import Column, terminal_table

__all__ = ["Column", "Page", "picture_grid", "terminal_table", "write_image", "write_json", "write_text"]
