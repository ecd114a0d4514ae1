"""What the starts of the search are worth: the loss of what it chooses from all of them, and with some left out.

    python -m benchmarks.starts                                       ResNet-20/GTSRB at four budgets
    python -m benchmarks.starts --project mobilenetv1_vww --budgets 0.5
    python -m benchmarks.starts --table                               what there is so far

Each row is the whole search of a `deploy build`, with the table that the device gives and without measuring candidates,
and ends with the plan of least loss that is predicted to keep the budget. What differs is the starts, and with them how
many plans are tried until the search has settled. A loss is the divergence on calibration samples after least squares,
before any training, so the rows say how good a plan is found and not how accurate a network becomes.
benchmarks/results/starts.json keeps them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from benchmarks import builds
from benchmarks.ablations.switches import switched
from pipeline import flow
from pipeline.nouns import LatencyTable, Sensitivity
from pipeline.run import BuildRequest
from pipeline.search import Search
from pipeline.work import Work
from profiles.errors import MissedError

RESULTS = Path(__file__).resolve().parent / "results" / "starts.json"
BUDGETS = (0.7, 0.5, 0.35, 0.25)
STARTS: Mapping[str, tuple[int, ...]] = {
    "all": (0, 1, 2, 3, 4), "without roots": (0, 2, 3), "roots": (1,), "values": (0,),
}  # fmt: skip
"""Places in Search._beliefs: values, roots, alike, values and roots where no block goes."""


class _DoneError(Exception):
    """Ends a build after its search."""


def run(project: str, budgets: Sequence[float], keep: Callable[[str, str, dict[str, Any]], None]) -> None:
    """The rows of one project. keep: is given budget, starts and row, one by one."""
    real, beliefs = flow._search, Search._beliefs

    def some(places: Sequence[int]) -> Callable[[Search], list[Any]]:
        return lambda search: [each for i, each in enumerate(beliefs(search)) if i in places]

    def look(
        work: Work, dense: Any, probe: Any, table: LatencyTable, values: Sensitivity, _: float, known: Any
    ) -> None:
        for budget in budgets:
            for name, places in STARTS.items():
                row: dict[str, Any] = {"loss": None}
                with patch.object(Search, "_beliefs", some(places)), suppress(MissedError):
                    found = real(work, dense, probe, table, values, budget, [])
                    row |= {"tried": len(found.tried), "rounds": len(found.rounds)}
                    row["loss"] = found.chosen.loss if found.chosen else None
                keep(f"{budget:g}x", name, row)
        raise _DoneError

    place = builds.ROOT / "benchmarks" / "projects" / project
    quiet = Console(file=io.StringIO())
    with tempfile.TemporaryDirectory() as root, switched("unmeasured"), patch.object(flow, "_search", look):
        asked = BuildRequest(place, builds.TARGET, f"{budgets[0]:g}x", root=Path(root), console=quiet)
        with suppress(_DoneError):
            flow.build(asked)


def table(results: Mapping[str, Any]) -> str:
    """Losses of each choice, and those without something over that of the whole search."""
    lines = []
    for project, told in results.items():
        lines.append(f"{project}: {told['machine']}")
        for budget, row in told["rows"].items():
            whole = row.get("all", {}).get("loss")
            shares = "  ".join(_against(whole, name, each) for name, each in row.items() if name != "all")
            lines.append(f"  {budget:<6} all {'nothing fits' if whole is None else f'{whole:.4g}'}  {shares}")
    return "\n".join(lines)


def _against(whole: float | None, name: str, row: Mapping[str, Any]) -> str:
    if row["loss"] is None or not whole:
        return f"{name} {row['loss']}"
    return f"{name} {row['loss'] / whole:.2f}x ({row['tried']} plans)"


def main() -> int:
    """Run, keep the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--project", default="resnet20_gtsrb")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}

    def keep(budget: str, name: str, row: dict[str, Any]) -> None:
        told = results.setdefault(asked.project, {"rows": {}})
        told["machine"] = builds.machine(*builds.TOOLS)
        told["rows"].setdefault(budget, {})[name] = row
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(f"{asked.project} {budget} {name:<14} {row}", flush=True)

    if not asked.table:
        run(asked.project, asked.budgets, keep)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
