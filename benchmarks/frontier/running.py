"""Runs the units of a contest in turn, each in a process of its own: one that breaks ends nothing but itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.builds import ROOT
from benchmarks.frontier import cells, dense
from benchmarks.frontier.cells import Store, Unit
from benchmarks.lines import Row

if TYPE_CHECKING:
    from benchmarks.frontier.arena import Arena, Entry, Pace

TRAINED = ROOT / "benchmarks" / "trained"


@dataclass(frozen=True)
class Contest:
    """What is run. module: for `python -m`. results: the file of its rows; work: the folder of what they leave behind.

    units: those of the core, or all, in order. enter: a unit's network before its recovery. pace: how much is spent on
    a unit. table: what there is so far (of the core), as text; record: as plain data; draw: as a picture, or None.
    """

    module: str
    about: str
    results: Path
    work: Path
    units: Callable[[bool], Iterable[Unit]]
    enter: Callable[[Arena, Unit, Path, Path], Entry]
    pace: Callable[[Pace, Unit], Pace]
    table: Callable[[Store, bool], str]
    record: Callable[[Store, bool], dict[str, Any]]
    draw: Callable[[Store, Path], None] | None = None


def main(contest: Contest, given: Sequence[str] | None = None) -> int:
    """Run what is asked, then print the table and draw it."""
    parser = argparse.ArgumentParser(prog=f"python -m {contest.module}", description=contest.about)
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing new after that many")
    parser.add_argument("--only", nargs="+", default=[], metavar="NET/BUDGET/CONTESTANT", help="shell patterns")
    parser.add_argument("--core", action="store_true", help="the core alone")
    parser.add_argument("--again", action="store_true", help="try once more what failed")
    parser.add_argument("--list", action="store_true", help="print the cells and which are done")
    parser.add_argument("--table", action="store_true", help="print what there is, and draw it")
    parser.add_argument("--quick", action="store_true", help="a try-out on few samples, kept apart from the results")
    parser.add_argument("--one", metavar="UNIT", help=argparse.SUPPRESS)
    asked = parser.parse_args(given)
    base, results = place(contest, asked.quick)
    store = Store.load(results)
    chosen = [unit for unit in contest.units(asked.core) if unit.matches(asked.only)]
    if asked.one:
        return _one(contest, next(unit for unit in contest.units(False) if unit.name == asked.one), store, asked, base)
    if asked.list:
        print("\n".join(f"{'-' if store.lacks(unit) else 'done':<5} {unit.name}" for unit in chosen))
        return 0
    if not asked.table:
        run(contest, chosen, results, asked, base)
    _show(contest, Store.load(results), results, asked.core)
    return 0


def place(contest: Contest, quick: bool) -> tuple[Path, Path]:
    """Where the work and the results are kept. A try-out has its own of both, and of trained weights."""
    if not quick:
        dense.trained(TRAINED)
        return contest.work, contest.results
    from benchmarks.frontier.arena import QUICK_LIMIT

    base = contest.work / "quick"
    os.environ["EDGE_TRAINED"] = str(base / "trained")
    os.environ["EDGE_DATA_LIMIT"] = str(QUICK_LIMIT)
    return base, base / contest.results.name


def run(contest: Contest, chosen: Sequence[Unit], results: Path, asked: argparse.Namespace, base: Path) -> None:
    """Units in turn until all are done or the time is up; a network and budget is measured when its last one is."""
    end = time.monotonic() + 60 * asked.minutes
    for index, unit in enumerate(chosen):
        if time.monotonic() > end:
            break
        store = Store.load(results)
        if store.lacks(unit, asked.again):
            print(f"== {unit.name}", flush=True)
            _apart(contest, unit, store, asked)
        last = index + 1 == len(chosen) or chosen[index + 1].group != unit.group
        if last and unit.contestant != cells.DENSE:
            _finals(unit.group, Store.load(results), asked.quick, base)


def _apart(contest: Contest, unit: Unit, store: Store, asked: argparse.Namespace) -> None:
    """One unit in a process of its own. One that dies without a word has failed."""
    flags = [flag for flag, on in (("--quick", asked.quick), ("--again", asked.again)) if on]
    begun = time.monotonic()
    command = [sys.executable, "-m", contest.module, "--one", unit.name, *flags]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    fresh = Store.load(store.path)
    for recovery in fresh.lacks(unit, asked.again) if code else ():
        fresh.add({
            "cell": f"{unit.name}/{recovery}", "recovery": recovery, "net": unit.net, "budget": unit.budget,
            "contestant": unit.contestant, "group": unit.group, "failed": f"its process ended with {code}",
            "seconds": {"all": time.monotonic() - begun},
        })  # fmt: skip
    for cell in unit.cells:
        print(f"   {cell}: {_short(Store.load(store.path).cells.get(cell, {}))}", flush=True)


def _short(row: Row) -> str:
    if "accuracy" not in row:
        return str(row.get("missed") or row.get("failed") or "no result")
    ratio = f"{row['searched']:.3f}x, " if "searched" in row else ""
    return f"{ratio}test {100 * row['accuracy']:.2f} %, {sum(row['seconds'].values()):.0f} s"


def _one(contest: Contest, unit: Unit, store: Store, asked: argparse.Namespace, base: Path) -> int:
    from benchmarks.frontier.arena import FULL, QUICK
    from benchmarks.frontier.contest import contest as work

    pace = contest.pace(QUICK if asked.quick else FULL, unit)
    work(unit, store, pace, base, contest.enter, again=asked.again)
    return 0


def _finals(group: str, store: Store, quick: bool, base: Path) -> None:
    """Measure the finalists together, where one of them is not in the session that there is."""
    from benchmarks.frontier.arena import FULL, QUICK
    from benchmarks.frontier.finals import measure

    if not store.unmeasured(group):
        return
    print(f"== {group}: all finalists in one session", flush=True)
    row = measure(group, store, (QUICK if quick else FULL).overrides, base)
    if row is not None:
        store.add(row)
    if store.unmeasured(group):
        print("   not all could be measured undisturbed; the next run tries again", flush=True)


def _show(contest: Contest, store: Store, results: Path, core: bool) -> None:
    print(contest.table(store, core))
    if store.cells:
        results.with_suffix(".json").write_text(json.dumps(contest.record(store, core), indent=1) + "\n")
        if contest.draw is not None:
            contest.draw(store, results.with_suffix(".png"))
