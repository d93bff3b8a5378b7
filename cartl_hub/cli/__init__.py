"""The command line, a thin layer over the same functions; modules that need torch are imported when a command runs."""

import logging
import sys
from typing import Annotated

import typer

from . import measurement, tables, transfer, zoo
from .failures import INTERRUPTED, interrupted, place

app = typer.Typer(
    name="cartl-hub",
    help="Robust source models, robust fine-tuning, and a robustness report.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (transfer, measurement, zoo, tables):
    app.add_typer(module.commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: errors that a user can fix are one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo(interrupted(sys.argv[1:]), err=True)
        raise
    except Exception as error:
        where, ours = place(error), type(error).__module__.split(".")[0] in ("cartl_hub", "builtins")
        if not where and not (ours and isinstance(error, (ValueError, RuntimeError, OSError))):
            raise
        typer.echo(f"Error{where}: {error}", err=True)
        raise SystemExit(2) from error
