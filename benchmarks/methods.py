"""Every method at the same measured latency: what it keeps without repair, with each repair, and after one epoch.

    python -m benchmarks.methods                       all cells that have no result yet (hours)
    python -m benchmarks.methods --minutes 60          for at most that long
    python -m benchmarks.methods --only '*/criteria/*' shell patterns of PROJECT/FAMILY/METHOD/SEED
    python -m benchmarks.methods --table               what there is so far, and the picture

A cell is a whole `deploy build` at 0.5x on the ResNet-20 of GTSRB or the ResNet-56 of JPEG-re-encoded CIFAR-10, so its
latency is the accepted one; it ends at its budget whatever it loses. Criteria are compared without the removal of
blocks, which would leave them little to order; solvers, hooks and repairs with it. What is random has three seeds.
Families: criteria, solvers, hooks, repairs. Cells are kept one by one in benchmarks/results/methods.jsonl, each
processor's apart, since the widths that pay are others there; benchmarks/results/methods.png draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from benchmarks import builds, lines
from benchmarks.lines import Row
from pipeline.prune.criteria.base import PACKAGE as CRITERIA
from pipeline.prune.repair import MODES
from pipeline.recover.train import HOOKS
from profiles import plugins

RESULTS = Path(__file__).resolve().parent / "results" / "methods.jsonl"
PICTURE = RESULTS.with_suffix(".png")
SOLVERS = "pipeline.latency.solvers"
PROJECTS = ("resnet20_gtsrb", "resnet56_cifar10_jpeg")
BUDGET = "0.5x"
DRAWN = ("random", "information", "genetic", "scop", "scop-generator", "haste", "singe", "lda-deconv")
SEEDS = dict.fromkeys(DRAWN, 3)
"""Methods that draw at random, and how many seeds they get."""
NORMALISERS = ("none", "macs", "memory", "ms")
ABLATION = tuple(f"fisher, threshold by {normaliser}" for normaliser in NORMALISERS)
FIRST = ("obs", "random", "magnitude", "fisher", "qsfm-ssim", "red", "lda-deconv", *ABLATION, "scop")
"""The default, the control and what the project exists for are taken before the rest, where time runs out."""
FAMILIES = ("criteria", "solvers", "hooks", "repairs")


@dataclass(frozen=True)
class Cell:
    """One build. flags: what it asks of `deploy build` beside project and budget."""

    family: str
    method: str
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """The key of its result."""
        return f"{self.family}/{self.method}/{self.seed}"


def cells() -> Iterator[Cell]:
    """Every cell of one project."""
    for criterion in plugins.names(CRITERIA):
        for seed in range(SEEDS.get(criterion, 1)):
            flags = ("--criterion", criterion, "--set", "prune.drop_blocks=false", "--set", f"prune.seed={seed}")
            yield Cell("criteria", criterion, seed, flags)
    for solver in plugins.names(SOLVERS):
        for seed in range(SEEDS.get(solver, 1)):
            yield Cell("solvers", solver, seed, ("--solver", solver, "--set", f"prune.seed={seed}"))
    for name, normaliser in zip(ABLATION, NORMALISERS, strict=True):  # only a global threshold sees the difference
        flags = ("--criterion", "fisher", "--solver", "threshold", "--set", f"prune.normalise={normaliser}")
        yield Cell("solvers", name, 0, flags)
    for hook in plugins.names(HOOKS):
        yield Cell("hooks", hook, 0, ("--set", f'recover.hooks=["{hook}"]'))
    for mode in MODES:
        yield Cell("repairs", mode, 0, ("--repair", mode, "--criterion", "qsfm-psnr"))


Results = dict[tuple[str, str], dict[str, Row]]
"""(project, processor) -> cell -> its row."""


def run(minutes: float, patterns: Sequence[str]) -> None:
    """Cells in turn, until all are done or the time is up."""
    end, processor, known = time.monotonic() + 60 * minutes, builds.machine()["cpu"], read()
    for project in PROJECTS:
        for cell in sorted(cells(), key=_turn):
            asked = not patterns or any(fnmatch(f"{project}/{cell.name}", pattern) for pattern in patterns)
            if not asked or cell.name in known.get((project, processor), {}):
                continue
            if time.monotonic() > end:
                return
            print(f"== {project} {cell.name}", flush=True)
            place = builds.accepting(project, builds.WORK / "accepting" / project)
            row = builds.deploy(place, BUDGET, cell.flags, builds.WORK)
            lines.append(RESULTS, {"project": project, "cell": cell.name, **row})
            print(line(cell.name, row), flush=True)


def _turn(cell: Cell) -> tuple[int, int]:
    """The first seed of everything before the second, and what is asked for most before the rest."""
    return cell.seed, FIRST.index(cell.method) if cell.method in FIRST else len(FIRST)


def read() -> Results:
    """What there is so far; the last row of a cell counts."""
    found: Results = {}
    for row in lines.read(RESULTS):
        found.setdefault((row["project"], row["machine"]["cpu"]), {})[row["cell"]] = row
    return found


def line(name: str, row: Row) -> str:
    """One cell in a line: latency, validation accuracy after each repair, test accuracy after the epoch, seconds."""
    summary = row["summary"]
    if summary.get("latency_ratio") is None:
        return f"{name:<32} exit {row['exit_code']}: {summary.get('error') or summary.get('verdict')}"
    repairs = row.get("repairs", {})
    told = " ".join(f"{mode} {_share(repairs.get(mode, {}).get('validate'))}" for mode in MODES if mode in repairs)
    seconds = row.get("seconds", {})
    spent = f"rank {seconds.get('rank', 0):.0f} s, search {seconds.get('search', 0):.0f} s"
    return f"{name:<32} {summary['latency_ratio']:.3f}x  {told}  epoch {_share(summary['accuracy'])}  {spent}"


def _share(value: float | None) -> str:
    return "   -" if value is None else f"{100 * value:5.1f}"


def table(results: Results) -> str:
    """All cells, those of a machine and its versions together."""
    told = []
    for (project, _), rows in results.items():
        taken: dict[str, list[str]] = {}
        for name, row in sorted(rows.items()):
            taken.setdefault(json.dumps([row["machine"], row.get("versions")], sort_keys=True), []).append(name)
        for where, names in taken.items():
            dense = rows[names[0]].get("summary", {}).get("accuracy_dense")
            told.append(f"{project} at {BUDGET}, dense {_share(dense)}: {where}")
            told += [line(name, rows[name]) for name in names]
    return "\n".join(told)


def draw(results: Results, path: Path) -> None:
    """Accuracy of each cell after each step, one panel a project, processor and family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [(p, f) for p in results for f in FAMILIES if any(name.startswith(f) for name in results[p])]
    if not shown:
        return
    figure, panels = plt.subplots(len(shown), 1, figsize=(9, 4 * len(shown)), squeeze=False, layout="constrained")
    steps = {"none": "o", "bn": "s", "merge": "v", "layerwise": "^", "least-squares": "D", "epoch": "*"}
    for (where, family), panel in zip(shown, panels[:, 0], strict=True):
        rows = {
            name: row
            for name, row in sorted(results[where].items())
            if name.startswith(family) and row["summary"].get("latency_ratio") is not None
        }
        labels = [name.removeprefix(f"{family}/") for name in rows]
        for step, marker in steps.items():
            points = [
                (i, row["summary"]["accuracy"] if step == "epoch" else row["repairs"].get(step, {}).get("validate"))
                for i, row in enumerate(rows.values())
            ]
            known = [(i, 100 * value) for i, value in points if value is not None]
            if known:
                panel.plot(*zip(*known, strict=True), marker, label=step)
        panel.set_xticks(range(len(labels)), labels, rotation=60, ha="right")
        panel.set_ylabel("accuracy, %")
        panel.set_title(f"{' on '.join(where)}: {family}, all at {BUDGET} of the dense latency as measured")
        panel.legend(ncols=6, fontsize="small")
        panel.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Run, then print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--only", nargs="+", default=(), metavar="PROJECT/FAMILY/METHOD/SEED", help="shell patterns")
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if not asked.table:
        run(asked.minutes, asked.only)
    print(table(read()))
    draw(read(), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
