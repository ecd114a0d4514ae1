"""The cells of the frontier: which there are, in which order, and which have a result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.lines import Row, append, read
from pipeline.prune.criteria.base import PACKAGE as CRITERIA
from profiles import plugins
from profiles.schema import PruneSpec

SOLVERS = "pipeline.latency.solvers"
NETS = ("resnet20_gtsrb", "mobilenetv2_gtsrb", "resnet56_cifar10_jpeg", "inception_gtsrb")
BUDGETS = ("0.7x", "0.5x", "0.35x", "0.25x")
RECOVERIES = ("distilled", "plain")
DENSE = "dense"
"""The contestant that is the dense network itself: at no budget, first of all."""
METHODS, ROUND_TO = ("magnitude", "taylor", "group-norm", "bn-scale"), (1, 8, 16)
PADDED = ("resnet20_gtsrb", "resnet56_cifar10_jpeg")
"""Networks whose shortcuts are padded: Torch-Pruning prunes them as they are and, as further contestants, freed."""
SCRATCH = ("scratch-depth", "scratch-width")
FASTNAS = ("fastnas-8", "fastnas-16")
CORE: Mapping[str, tuple[str, ...]] = {
    "resnet20_gtsrb": (
        *(f"torch-pruning-{m}-{to}{kind}" for kind in ("", "-freed") for to in (1, 8) for m in METHODS),
        "fastnas-8",
    ),
    "mobilenetv2_gtsrb": (*(f"torch-pruning-{method}-8" for method in METHODS), "fastnas-8"),
}
"""Networks of the core, and Torch-Pruning with the roundings that can keep a budget there: with widths off the grid
MobileNets are slower than dense."""
CORE_BUDGETS = ("0.5x", "0.35x")


@dataclass(frozen=True)
class Unit:
    """What is worked in one go: a contestant with a network and a budget, in its recoveries."""

    net: str
    budget: str
    contestant: str

    @property
    def name(self) -> str:
        """net/budget/contestant, net/dense for the dense network."""
        return f"{self.net}/{self.contestant}" if self.contestant == DENSE else f"{self.group}/{self.contestant}"

    @property
    def group(self) -> str:
        """net/budget: what is measured in one session."""
        return f"{self.net}/{self.budget}"

    @property
    def ratio(self) -> float:
        """The budget as a share of the dense latency."""
        return float(self.budget.removesuffix("x"))

    @property
    def recoveries(self) -> tuple[str, ...]:
        """Its cells: other methods of ours are only recovered as a build does it."""
        if self.contestant == DENSE:
            return (DENSE,)
        return RECOVERIES[:1] if self.contestant.startswith("ours-") else RECOVERIES

    @property
    def cells(self) -> tuple[str, ...]:
        """The keys of its results."""
        return tuple(f"{self.name}/{recovery}" for recovery in self.recoveries)

    def matches(self, patterns: Sequence[str]) -> bool:
        """Whether one of the shell patterns names it, or a part that it begins with; without patterns always."""
        return not patterns or any(fnmatch(self.name, p) or fnmatch(self.name, f"{p}/*") for p in patterns)


def peers(net: str) -> tuple[str, ...]:
    """Everyone whom our default is compared with on a network."""
    found = tuple(f"torch-pruning-{method}-{to}" for to in ROUND_TO for method in METHODS)
    return (*SCRATCH, *found, *(f"{name}-freed" for name in found if net in PADDED), *FASTNAS)


def asked(net: str, budget: str, core: bool) -> tuple[str, ...]:
    """The peers that a verdict needs: those of the core, where the network and budget are in it, or all."""
    inside = core and net in CORE and budget in CORE_BUDGETS
    return (*SCRATCH, *CORE[net]) if inside else peers(net)


def contestants(net: str) -> tuple[str, ...]:
    """Everyone, ours first."""
    default = {PruneSpec().solver, PruneSpec().criterion}
    solvers = (f"ours-solver-{name}" for name in plugins.names(SOLVERS) if name not in default)
    criteria = (f"ours-criterion-{name}" for name in plugins.names(CRITERIA) if name not in default)
    return ("ours", *peers(net), *solvers, *criteria)


def units(core_only: bool = False) -> Iterator[Unit]:
    """Every unit, the core first; a network's dense one before its others."""
    seen: set[str] = set()

    def once(net: str, budget: str, names: Sequence[str]) -> Iterator[Unit]:
        for unit in (Unit(net, "", DENSE), *(Unit(net, budget, name) for name in names)):
            if unit.name not in seen:
                seen.add(unit.name)
                yield unit

    for net, core in CORE.items():
        for budget in CORE_BUDGETS:
            yield from once(net, budget, ("ours", *SCRATCH, *core))
    if not core_only:
        for own in (False, True):
            for net in NETS:
                names = [name for name in contestants(net) if name.startswith("ours-") == own]
                for budget in BUDGETS:
                    yield from once(net, budget, names)


@dataclass
class Store:
    """Results, a line each: a cell under `cell`, the session of a network and budget under `final`. The last counts."""

    path: Path
    cells: dict[str, Row] = field(default_factory=dict)
    finals: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Store:
        """What there is so far."""
        store = cls(path)
        for row in read(path):
            store._take(row)
        return store

    def add(self, row: Row) -> None:
        """Keep a result."""
        append(self.path, row)
        self._take(row)

    def lacks(self, unit: Unit, again: bool = False) -> list[str]:
        """Recoveries of a unit without a result. again: what failed lacks it too."""
        found = zip(unit.recoveries, unit.cells, strict=True)
        return [r for r, cell in found if cell not in self.cells or (again and "failed" in self.cells[cell])]

    def finalists(self, group: str) -> dict[str, Row]:
        """Contestant -> one of its cells that ended with a network; its recoveries have the same latency."""
        found: dict[str, Row] = {}
        for cell in self.cells.values():
            if cell["group"] == group and "onnx" in cell:
                found.setdefault(cell["contestant"], cell)
        return found

    def measured(self, group: str) -> dict[str, list[float]]:
        """Finalist -> ratio with its bounds in the common session, unless its file is another one now."""
        final = self.finals.get(group, {"ratios": {}, "sha256": {}})
        current = {name: row["sha256"] for name, row in self.finalists(group).items()}
        return {name: time for name, time in final["ratios"].items() if current.get(name) == final["sha256"][name]}

    def unmeasured(self, group: str) -> bool:
        """Whether a finalist is not in the session of its network and budget."""
        return set(self.finalists(group)) != set(self.measured(group))

    def _take(self, row: Row) -> None:
        if "cell" in row:
            self.cells[row["cell"]] = row
        elif not row.get("contaminated"):
            self.finals[row["final"]] = row
