"""Grow-Push-Prune on a network of concatenations, against plain training and magnitude at the same measured latency.

    python -m benchmarks.gpp                      all cells that have no result yet (hours)
    python -m benchmarks.gpp --minutes 60         for at most that long
    python -m benchmarks.gpp --epochs 10          other training before pruning (cells of their own)
    python -m benchmarks.gpp --only "push, lda-deconv"    one arm; may be given several times
    python -m benchmarks.gpp --table              what there is so far

A cell is a whole `deploy build` of an arm at a budget, so its latency is the accepted one and its accuracy that of the
bundle. Every arm is trained for as many epochs altogether, all of them with the learning rate and the share of
distillation of a preparation (TRAINING). What differs: the arm that prepares nothing spends all epochs behind the cut,
in one cycle of the learning rate instead of two, and a preparation keeps its latest weights within `max_drop`, a
recovery its best. The schedules are short ones (5 epochs before pruning and 2 after it), and the table says so. Cells
are kept one by one in benchmarks/results/gpp.json. The network is benchmarks/projects/inception_gtsrb; --project takes
another.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import builds
from profiles.schema import PrepareSpec

RESULTS = Path(__file__).resolve().parent / "results" / "gpp.json"
BUDGETS = ("0.5x", "1x")
"""Of the given network's latency. At 1x only what grew has anything to give."""
EPOCHS, AFTER = 5, 2
MINUTES = 240.0
"""Cap of each training: none of the epochs that are compared may be cut short."""
TRAINING = PrepareSpec().model_dump(include={"learning_rate", "momentum", "weight_decay", "temperature", "alpha"})
"""How every arm is trained, before and after pruning."""
PUSH, MAGNITUDE = ("--criterion", "lda-deconv"), ("--criterion", "magnitude")
HOOKS = '=["push"]'


@dataclass(frozen=True)
class Arm:
    """A way of pruning. prepared: trained before pruning. push: with the hook, before and after. grow: grown first."""

    name: str
    criterion: tuple[str, ...]
    prepared: bool = True
    push: bool = False
    grow: bool = False

    def flags(self, epochs: int, seed: int) -> tuple[str, ...]:
        """What it asks of `deploy build`."""
        settings = {
            "prepare.epochs": epochs if self.prepared else 0,
            "recover.epochs": AFTER if self.prepared else epochs + AFTER,
            "prepare.grow": str(self.grow).lower(),
            **{f"{table}.{key}": value for table in ("prepare", "recover") for key, value in _training(seed).items()},
        }
        pairs = [f"{key}={value}" for key, value in settings.items()]
        pairs += [f"{table}.hooks{HOOKS}" for table in ("prepare", "recover") if self.push]
        return (*self.criterion, *(part for pair in pairs for part in ("--set", pair)))


ARMS = (
    Arm("magnitude", MAGNITUDE, prepared=False),
    Arm("train, magnitude", MAGNITUDE),
    Arm("train, fisher", ("--criterion", "fisher")),
    Arm("push, magnitude", MAGNITUDE, push=True),
    Arm("push, lda-deconv", PUSH, push=True),
    Arm("grow, train, magnitude", MAGNITUDE, grow=True),
    Arm("grow, push, lda-deconv", PUSH, push=True, grow=True),
)


def _training(seed: int) -> dict[str, Any]:
    """What all trainings share; a patience longer than any schedule, so that every arm has all of its epochs."""
    return {**TRAINING, "max_minutes": MINUTES, "patience": 1000, "seed": seed}


def cells(epochs: int, seeds: int, arms: Sequence[str] = ()) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Name, budget and flags of every cell. arms: names of those that are asked for; empty: all."""
    for budget in BUDGETS:
        for arm in (arm for arm in ARMS if not arms or arm.name in arms):
            for seed in range(seeds):
                yield f"{budget}/{arm.name}/{epochs}+{AFTER}/{seed}", budget, arm.flags(epochs, seed)


def run(project: str, minutes: float, epochs: int, seeds: int, arms: Sequence[str]) -> None:
    """Cells in turn, until all are done or the time is up."""
    end, results = time.monotonic() + 60 * minutes, read()
    kept = results.setdefault(project, {})
    for name, budget, flags in cells(epochs, seeds, arms):
        if name in kept:
            continue
        if time.monotonic() > end:
            return
        print(f"== {project} {name}", flush=True)
        kept[name] = {**builds.build(project, budget, flags), "flags": list(flags)}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(line(name, kept[name]), flush=True)


def read() -> dict[str, dict[str, Any]]:
    """What there is so far: project -> cell -> row."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return found


def line(name: str, row: dict[str, Any]) -> str:
    """One cell: measured latency, accuracy at the end and after repair alone, parameters, seconds of training."""
    summary, seconds = row["summary"], row.get("seconds", {})
    if summary.get("latency_ratio") is None:
        return f"{name:<44} exit {row['exit_code']}: {summary.get('error') or summary.get('verdict')}"
    repaired = row["repairs"].get("least-squares", {}).get("validate")
    spent = seconds.get("prepare", 0.0) + seconds.get("recover", 0.0)
    return (
        f"{name:<44} {summary['latency_ratio']:.3f}x  accuracy {summary['accuracy']:.4f}"
        f"  repaired {'-' if repaired is None else f'{repaired:.4f}'}"
        f"  parameters {summary['parameters']:>9,}  trained {spent:6.0f} s"
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """All cells, with what they were taken on and what the given network has."""
    lines = []
    for project, rows in results.items():
        first: dict[str, Any] = next(iter(rows.values()), {})
        dense = first.get("summary", {}).get("accuracy_dense")
        lines.append(f"{project}, given network {dense}: {first.get('machine')} {first.get('versions')}")
        lines.append("cells are budget/arm/epochs before + after pruning/seed; the schedules are short ones")
        lines += [line(name, row) for name, row in sorted(rows.items())]
    return "\n".join(lines)


def main() -> int:
    """Run, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--project", default="inception_gtsrb")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of training before pruning")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], choices=[arm.name for arm in ARMS], help="an arm")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if not asked.table:
        if not (builds.ROOT / "benchmarks" / "projects" / asked.project / "deploy.toml").is_file():
            parser.error(f"there is no benchmarks/projects/{asked.project}/deploy.toml")
        run(asked.project, asked.minutes, asked.epochs, asked.seeds, asked.only)
    print(table(read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
