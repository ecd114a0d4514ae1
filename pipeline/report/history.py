"""The checks of many nights: one line each as text, plain data, and one HTML page with plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.nouns import Change, CheckRecord
from pipeline.report import check_charts, check_rows, numbers
from pipeline.report.check import COLOURS, to_json
from pipeline.report.check_charts import last
from pipeline.report.escape import printable
from pipeline.report.grid import Grid
from pipeline.report.pages import fill
from targets.harness.compare import BASELINE

OUTCOME = 3
"""Column of the outcome."""
Records = Sequence[CheckRecord] | Mapping[int, CheckRecord]
"""Checks, oldest first; with their numbers, or numbered from 1."""


def _numbered(records: Records) -> dict[int, CheckRecord]:
    return dict(records) if isinstance(records, Mapping) else dict(enumerate(records, start=1))


def show_history(records: Records, console: Console, changes: Sequence[Change] = ()) -> None:
    """Print one line a check, in the order given, and a sentence a change point."""
    if not records:
        console.print(Text("no check has been made yet."), soft_wrap=True)
        return
    several = len({record.profile for record in _numbered(records).values()}) > 1
    grid = nights(records, several=several)
    console.print(grid.table(style=_style), highlight=False)
    for sentence in [*([grid.note] if grid.note else []), *(f"Advisory: {check_rows.change(c)}." for c in changes)]:
        console.print(Text(printable(sentence)), soft_wrap=True)


def _style(column: int, cell: str) -> str:
    return next((look for outcome, look in COLOURS.items() if outcome == cell), "") if column == OUTCOME else ""


def nights(records: Records, *, several: bool = False) -> Grid:
    """Cells of the history: number, time, candidate, outcome, ratio, control, smallest slowdown that could be seen.

    several: with the target of each at the end.
    """
    rows = []
    for number, record in _numbered(records).items():
        stage, seen = last(record), check_rows.detectable(record)
        ratios = ["–", "–"] if stage is None else [numbers.interval(stage.ratio), numbers.interval(stage.control)]
        began = numbers.utc(record.started).removesuffix(" UTC")
        name = f"{record.candidate.name} (the same file)" if record.same else record.candidate.name
        cells = (str(number), began, name, record.verdict.outcome, *ratios)
        rows.append((*cells, "–" if seen is None else numbers.share(seen), *([record.profile] if several else [])))
    head = ("", "UTC", "candidate", "outcome", "ratio", "control", "detectable", *(["target"] if several else []))
    same = any(record.same for record in _numbered(records).values())
    return Grid("Checks", head, tuple(rows), f"({check_rows.SAME})" if same else "", text=(1, 2, 3, 7))


def history_json(records: Records, changes: Sequence[Change] = ()) -> dict[str, Any]:
    """Every check as `deploy check --json` gives it, numbered as in the text; outcomes counted; change points."""
    counts: dict[str, int] = {}
    for record in _numbered(records).values():
        counts[record.verdict.outcome] = counts.get(record.verdict.outcome, 0) + 1
    checks = [{"number": number, **to_json(record)} for number, record in _numbered(records).items()]
    told = [dict(numbers.strict(asdict(change))) for change in changes]
    return {"version": 1, "outcomes": counts, "checks": checks, "changes": told}


def history_page(records: Records, changes: Sequence[Change]) -> str:
    """The page: for every target the ratio of each night with bounds and the baseline's times with change points."""
    own = list(_numbered(records).values())
    profiles = list(dict.fromkeys(record.profile for record in own))
    charts: dict[str, str] = {}
    sections = []
    for number, profile in enumerate(profiles, start=1):
        here = [record for record in own if record.profile == profile]
        found = [each for each in changes if len(profiles) == 1 or each.series.endswith(f" on {profile}")]
        charts[f"nights {number}"] = check_charts.nights(here, number)
        if any(BASELINE in record.absolute for record in here):
            charts[f"absolutes {number}"] = check_charts.absolutes(here, found, number)
        told = [check_rows.change(each) for each in found]
        sections.append({"profile": profile, "changes": told, "ledger": check_rows.ledger(here[-1])})
    return fill(
        "history.html",
        charts,
        where=", ".join(profiles) or "no target",
        count=len(own),
        outcomes=history_json(records)["outcomes"],
        nights=nights(records, several=len(profiles) > 1),
        sections=sections,
    )
