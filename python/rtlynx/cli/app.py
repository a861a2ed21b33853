"""The command line's root: which subcommands there are, and how errors are printed.

Subcommands import torch and diffusers inside their functions, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rtlynx.cli import bench
from rtlynx.cli.bench_quality import quality, quality_docs
from rtlynx.cli.calibrate import calibrate
from rtlynx.cli.demo import demo
from rtlynx.cli.evaluate import evaluate
from rtlynx.cli.info import info
from rtlynx.cli.search import search
from rtlynx.errors import RTLynxError
from rtlynx.version import __version__


class _PlainErrors(TyperGroup):
    """What rtlynx refuses on purpose is one line on stderr and exit code 2, as for a wrong option; anything else is a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RTLynxError as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="rtlynx",
    cls=_PlainErrors,
    help="2:4 activation sparsity for diffusion transformers on sparse tensor cores.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(info)
app.command()(demo)
app.command()(calibrate)
app.command()(search)
app.command("eval")(evaluate)
bench.app.command()(quality)
bench.app.command("quality-docs")(quality_docs)
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rtlynx {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """2:4 activation sparsity for diffusion transformers on sparse tensor cores."""
