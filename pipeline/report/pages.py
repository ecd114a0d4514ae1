"""One way to make a page: a template of this folder, its style inside it, every value escaped, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import numbers
from pipeline.report.escape import printable

FOLDER = Path(__file__).parent


def fill(template: str, charts: Mapping[str, str], **values: Any) -> str:
    """The page. charts: inline SVG by name. Its `n` is `pipeline.report.numbers`, its filter `p` is `printable`."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["n"] = numbers
    environment.filters["p"] = printable
    style = Markup((FOLDER / "page.css").read_text(encoding="utf-8"))
    drawn = {name: Markup(svg) for name, svg in charts.items()}
    return environment.get_template(template).render(style=style, charts=drawn, **values)
