"""Pages of results."""

from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, **content: Any) -> str:
    """Markdown from a template, with one newline at its end."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(**content).rstrip() + "\n"
