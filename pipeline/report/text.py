"""A report as text: the closing table of a build, and what a run did so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.nouns import BUILT
from pipeline.report import numbers
from pipeline.report.data import ReportData

VERDICTS = {"met": "green", "missed": "red", "accuracy missed": "red", "undecided": "yellow", BUILT: "yellow"}
PLACES = {"met": "bundle", BUILT: "built"}
"""What the folder is called that a build leaves; else it holds the nearest point."""


def closing_table(data: ReportData) -> Table:
    """Dense beside pruned: accuracy, parameters, MACs, predicted and measured latency with its interval, budget."""
    dense, pruned = data.dense, data.pruned
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("", "dense", "built" if data.verdict == BUILT else "pruned", "change"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    drop = numbers.difference(dense.accuracy, pruned.accuracy)
    table.add_row("accuracy", *(_score(data, figures.accuracy) for figures in (dense, pruned)), drop)
    sizes = (("parameters", dense.parameters, pruned.parameters), ("MACs", dense.macs, pruned.macs))
    for label, before, after in sizes:
        table.add_row(label, numbers.count(before), numbers.count(after), numbers.change(before, after))
    foreseen = ""
    if dense.predicted_ms and pruned.predicted_ms is not None:
        foreseen = numbers.ratio(pruned.predicted_ms / dense.predicted_ms)
    table.add_row("predicted", _ms(dense.predicted_ms), _ms(pruned.predicted_ms), foreseen)
    measured = numbers.ratio(data.ratio) if data.ratio is not None else ""
    table.add_row(f"measured, {data.percentile}", _ms(dense.measured_ms), _ms(pruned.measured_ms), measured)
    ratio_bounds = numbers.bounds(data.ratio_interval, "x") if data.ratio_interval else ""
    table.add_row("  interval", _bounds(dense.interval_ms), _bounds(pruned.interval_ms), ratio_bounds)
    relative = data.budget.partition("@")[0]
    limit = data.budget if data.budget == "none" else numbers.ms(data.budget_ms)
    table.add_row("budget", "", limit, relative if relative.endswith("x") else "")
    return table


def show(data: ReportData, console: Console) -> None:
    """Print the closing table, the verdict with its reason, and where the bundle is."""
    console.print(closing_table(data), highlight=False)
    verdict = Text(data.verdict, style=f"bold {VERDICTS.get(data.verdict, '')}".strip())
    if data.reason:
        verdict.append(f": {data.reason}", style="not bold default")
    console.print(verdict, soft_wrap=True)
    for note in data.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if data.bundle:
        console.print(Text(f"{PLACES.get(data.verdict, 'nearest point')}  {data.bundle}"), soft_wrap=True)


def dry_table(summary: Mapping[str, Any]) -> Table:
    """Every group of a dry run: its channels, how many the plan keeps, and why it was not offered."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("group", no_wrap=True)
    for column in ("width", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for name, row in summary["groups"].items():
        table.add_row(Text(name), str(row["width"]), str(row["kept"]), Text(row["frozen"] or ""))
    return table


def show_dry(summary: Mapping[str, Any], console: Console) -> None:
    """Print what a dry run found: groups, removed blocks, and the predicted latency beside the budget."""
    console.print(dry_table(summary), highlight=False)
    console.print(Text(f"removed blocks: {', '.join(summary['removed_blocks']) or 'none'}"), soft_wrap=True)
    foreseen = f"predicted {numbers.ratio(summary['predicted_ratio'])} of dense"
    budget = f"budget {numbers.ratio(summary['budget_ratio'])}"
    console.print(Text(f"{foreseen}, {budget}, {summary['table_rows']} table rows"), soft_wrap=True)


def stages_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """Finished stages of a run with their detail and seconds."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("stage")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name, record in stages.items():
        table.add_row(name, str(record.get("detail", "")), f"{float(record.get('seconds', 0.0)):.1f}")
    return table


def listing(rows: Iterable[tuple[str, str]]) -> Table:
    """Names with one line about each."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, about in rows:
        table.add_row(Text(name, style="bold"), Text(about))
    return table


def _score(data: ReportData, value: float | None) -> str:
    return "not judged" if data.unjudged else numbers.score(value)


def _ms(value: float | None) -> str:
    return numbers.ms(value) if value is not None else "–"


def _bounds(interval: tuple[float, float] | None) -> str:
    return numbers.bounds(interval) if interval else "–"
