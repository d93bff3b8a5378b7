"""The robustness report: results, and the files and the table that people look at."""

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from .results import Results

if TYPE_CHECKING:
    from rich.console import RenderableType


class Report(Results):
    """Report of :func:`cartl_hub.evaluation.evaluate`; its fields are those of :class:`cartl_hub.report.results.Results`."""

    def save(self, folder: str | Path) -> None:
        """Write report.json, report.html, plots as PNG and SVG, curve.csv and per_image.csv.

        Each file is replaced atomically and report.json comes last: whenever the process dies, it is the old or the new one.
        """
        from .page import save_report  # draws with matplotlib, which whoever only reads reports need not wait for

        save_report(self, folder)

    def summary(self) -> "RenderableType":
        """The figures for the terminal (``rich.print`` shows them)."""
        from .page import summary

        return summary(self)

    def __str__(self) -> str:
        """The summary without colours, as wide as the terminal."""
        from rich.console import Console

        file = io.StringIO()
        width = shutil.get_terminal_size((140, 24)).columns
        Console(file=file, width=width, force_terminal=False, color_system=None).print(self.summary())
        return file.getvalue().rstrip()

    def __rich__(self) -> "RenderableType":
        return self.summary()
