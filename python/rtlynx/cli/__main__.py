"""``python -m rtlynx.cli``: the same command without its entry point."""

from __future__ import annotations

from rtlynx.cli.app import app

app()
