"""The paper that charts are drawn on: inline SVG whose text stays text, nothing fetched, equal data giving equal bytes.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart; shape and label say the same again.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from pipeline.report.escape import printable

LIMIT, INK, GRID, SOFT = "#d55e00", "#2b333b", "#e3e7eb", "#7a838c"
SERIES = ("#7a838c", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#d55e00")
WIDTH = 5.2
STYLE = {
    "svg.hashsalt": "edge-deploy",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#aab2ba",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}  # fmt: skip


def short(label: str) -> str:
    """A name as a chart can show it: one line of at most 28 characters, and never one that matplotlib leaves out."""
    label = printable(label)
    label = label if len(label) <= 28 else f"{label[:27]}…"
    return f"\u200b{label}" if label.startswith("_") else label


def limit(
    axes: Axes, at: float | None, text: str, *, horizontal: bool, colour: str = LIMIT, lift: float = 2.0,
    align: str = "center",
) -> None:  # fmt: skip
    """A dashed limit with its name at the end of it, or none at None.

    lift, align: where the name stands above an upright one.
    """
    if at is None:
        return
    if horizontal:
        axes.axhline(at, color=colour, linestyle=(0, (5, 3)), linewidth=1.3, zorder=1)
        axes.annotate(text, (1.0, at), xycoords=axes.get_yaxis_transform(), xytext=(-2, -3),
                      textcoords="offset points", ha="right", va="top", color=colour, fontsize=8.5)  # fmt: skip
    else:
        axes.axvline(at, color=colour, linestyle=(0, (5, 3)), linewidth=1.3, zorder=1)
        axes.annotate(text, (at, 1.0), xycoords=axes.get_xaxis_transform(), xytext=(0, lift),
                      textcoords="offset points", ha=align, va="bottom", color=colour, fontsize=8.5)  # fmt: skip


def logarithmic(axes: Axes, which: str) -> None:
    """Make one axis, `x` or `y`, logarithmic, with plain numbers on it."""
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    decades = high / low >= 100.0
    axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 3.0, 5.0, 7.0), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def drawn(title: str, size: tuple[float, float]) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; when the block ends the list holds its SVG element."""
    with stacked(title, size, 1) as (axes, out):
        yield axes[0], out


@contextmanager
def stacked(title: str, size: tuple[float, float], rows: int) -> Iterator[tuple[Sequence[Axes], list[str]]]:
    """Axes below each other that share their x axis; when the block ends the list holds one SVG element."""
    with rc_context(STYLE), warnings.catch_warnings():
        # a letter that this font lacks is drawn by the reader's browser, since text stays text
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for each in axes:
            each.grid(color=GRID, linewidth=0.8)
            each.set_axisbelow(True)
        out: list[str] = []
        yield axes, out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        out.append(_inline(buffer.getvalue(), title))


def _inline(svg: str, title: str) -> str:
    """The bare element: no prologue, no metadata, ids of its own, sized by the page, named for screen readers."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body)
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{title}">{rest}'
