"""The ``rtlynx`` command: one module per subcommand, registered in `rtlynx.cli.app`."""

from __future__ import annotations

from rtlynx.cli.app import app

__all__ = ["app"]
