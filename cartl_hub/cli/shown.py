"""Output of commands."""

import shlex
import sys
from pathlib import Path
from typing import Any


def show(renderable: Any) -> None:
    """Print a rich renderable, as wide as the terminal, or 140 columns if there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(renderable)


def command() -> str:
    """Command as typed, for cards and reports, without this machine's folders, which are of no use to anybody."""
    return shlex.join(["cartl-hub", *map(without_folder, sys.argv[1:])])


def without_folder(argument: str) -> str:
    """The last part of an absolute path, also after ``--option=``; anything else as it is."""
    option, separator, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return option + separator + (Path(value).name if Path(value).is_absolute() else value)
