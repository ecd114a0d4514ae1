"""Runs the frontier."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import benchmarks.frontier as frontier
from benchmarks.builds import ROOT
from benchmarks.frontier import cells, running
from benchmarks.frontier.cells import Store, Unit
from benchmarks.frontier.table import record, table

if TYPE_CHECKING:
    from benchmarks.frontier.arena import Arena, Entry, Pace

RESULTS = ROOT / "benchmarks" / "results" / "frontier.jsonl"
WORK = ROOT / "runs" / "frontier"


def main(given: Sequence[str] | None = None) -> int:
    """Run what is asked."""
    return running.main(CONTEST, given)


def _enter(arena: Arena, unit: Unit, folder: Path, trials: Path) -> Entry:
    from benchmarks.frontier.contest import enter

    return enter(arena, unit, folder, trials)


def _pace(pace: Pace, _: Unit) -> Pace:
    return pace


def _draw(store: Store, path: Path) -> None:
    from benchmarks.frontier.drawing import draw

    draw(store, path)


CONTEST = running.Contest(
    "benchmarks.frontier", str(frontier.__doc__).split("\n", 1)[0], RESULTS, WORK,
    cells.units, _enter, _pace, table, record, _draw,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
