"""The explanation: findings, and the files and the table that people look at."""

from pathlib import Path
from typing import TYPE_CHECKING

from .results import Findings

if TYPE_CHECKING:
    from rich.console import RenderableType


class Explanation(Findings):
    """Findings of :func:`cartl_hub.explain`; its fields are those of :class:`cartl_hub.explanation.results.Findings`."""

    def save(self, folder: str | Path, *, report: str | Path | None = None) -> None:
        """Write explain.html, explain.json, match.csv, and saliency, influence and match as PNG and SVG.

        Args:
            folder: Folder to write to; created if it doesn't exist.
            report: Folder of a report of the first model: its page goes into ``folder`` as report.html, with these sections in
                it. The report's own folder is not changed, unless it is the same.

        Raises:
            ValueError: If there is no report, it is on other weights, or its page can't be extended.
        """
        from .page import save_explanation  # draws with matplotlib, which whoever wants the numbers need not wait for

        save_explanation(self, folder, report)

    def summary(self) -> "RenderableType":
        """Classes of the most influential images for the terminal (``rich.print`` shows it)."""
        from .page import summary

        return summary(self)
