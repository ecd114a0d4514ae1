"""Runs the ablations."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import benchmarks.ablations as ablations
from benchmarks.ablations import arms
from benchmarks.ablations.table import record, table
from benchmarks.builds import ROOT
from benchmarks.frontier import running

CONTEST = running.Contest(
    "benchmarks.ablations", str(ablations.__doc__).split("\n", 1)[0],
    ROOT / "benchmarks" / "results" / "ablations.jsonl", ROOT / "runs" / "ablations",
    arms.cells, arms.enter, arms.seeded, lambda store, _: table(store), lambda store, _: record(store),
)  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    """Run what is asked."""
    return running.main(CONTEST, given)


if __name__ == "__main__":
    sys.exit(main())
