"""A table of cells whose form is left to the reader: a terminal, GitHub's Markdown, plain lines, a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from pipeline.report.escape import markdown, printable


@dataclass(frozen=True)
class Grid:
    """A table of cells. head: one title a column; note: a sentence below; text: columns of words, not numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text: tuple[int, ...] = (0,)

    def table(self, style: Callable[[int, str], str] = lambda column, cell: "") -> Table:
        """For a terminal, without title and note. style: rich's style of a cell, from its column and its text."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for index, cell in enumerate(self.head):
            table.add_column(Text(printable(cell)), justify="left" if index in self.text else "right")
        for row in self.rows:
            table.add_row(*(Text(printable(cell), style=style(column, cell)) for column, cell in enumerate(row)))
        return table

    def markdown(self) -> str:
        """For GitHub, with title and note."""
        lines = [f"| {' | '.join(markdown(cell) for cell in row)} |" for row in (self.head, *self.rows)]
        lines.insert(1, "|" + "".join(" --- |" if index in self.text else " ---: |" for index in range(len(self.head))))
        note = f"\n\n{markdown(self.note)}" if self.note else ""
        return f"**{markdown(self.title)}**\n\n" + "\n".join(lines) + note

    def lines(self) -> list[str]:
        """Plain lines in columns."""
        rows = [[printable(cell) for cell in row] for row in (self.head, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
