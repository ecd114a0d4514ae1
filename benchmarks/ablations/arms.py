"""The ablations, and how one is worked: builds until the measured latency is level with the others'."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import builds
from benchmarks.frontier.cells import DENSE, RECOVERIES, Unit

if TYPE_CHECKING:
    from benchmarks.frontier.arena import Arena, Entry, Pace

NET, BUDGET = "resnet56_cifar10_jpeg", "0.5x"
SEEDS = (0, 1, 2)
OURS = "ours"
SWITCHED = Path(__file__).parent / "switches.py"
TRIES = 4
"""Builds of one ablation at most."""
AIM = 0.985
"""The share of the budget that a further build is aimed at."""
FINEST = 0.01
"""Budgets that lie no farther apart, relative to them, are not divided again."""


@dataclass(frozen=True)
class Arm:
    """A build without one thing. worth: what that is. switch: of switches.py. flags: of `deploy build`.

    repair: the plan of the whole build is taken, and repaired in this way; nothing else is done again.
    """

    worth: str
    switch: str = ""
    flags: tuple[str, ...] = ()
    repair: str = ""


def _set(key: str, value: object) -> tuple[str, str]:
    return "--set", f"prune.{key}={value}"


ARMS: Mapping[str, Arm] = {
    OURS: Arm("nothing"),
    "flops": Arm("measuring the table instead of counting", "flops"),
    "flops-eighths": Arm("measuring the table and its grid instead of counting, in eighths", "flops", _set("grid", 8)),
    "separable": Arm("a table of widths together instead of each alone", "separable"),
    "no-feedback": Arm("measuring candidates and correcting the table", "unmeasured"),
    "no-blocks": Arm("removing blocks", "", _set("drop_blocks", "false")),
    "scores": Arm("measuring values instead of adding up scores", "scores"),
    "single-cuts": Arm("measuring values around the plan instead of adding up single cuts", "single"),
    "one-width": Arm("measuring values at three widths instead of one", "", _set("value_widths", 1)),
    "repair-none": Arm("repairing", "", ("--repair", "none")),
    "repair-bn": Arm("least squares instead of batch-norm statistics", "", ("--repair", "bn")),
    "repair-merge": Arm(
        "least squares instead of twins that stand in", "", ("--repair", "merge", "--criterion", "qsfm-psnr")
    ),
    "repair-layerwise": Arm(
        "least squares through the network instead of layer by layer", "", ("--repair", "layerwise")
    ),
    "same-plan-none": Arm("repairing the plan that was found", repair="none"),
    "same-plan-bn": Arm("least squares on that plan instead of batch-norm statistics", repair="bn"),
    "same-plan-layerwise": Arm("least squares through that plan instead of layer by layer", repair="layerwise"),
}


@dataclass(frozen=True)
class Cell(Unit):
    """An ablation with a seed; its contestant is `ABLATION@SEED`, and it is recovered as a build does it."""

    @property
    def arm(self) -> str:
        """The name of the ablation."""
        return self.contestant.partition("@")[0]

    @property
    def seed(self) -> int:
        """Of the build, its measuring and its recovery; 0 for the dense network."""
        return int(self.contestant.partition("@")[2] or 0)

    @property
    def recoveries(self) -> tuple[str, ...]:
        """One."""
        return (DENSE,) if self.contestant == DENSE else RECOVERIES[:1]


def cells(core_only: bool = False) -> Iterator[Cell]:
    """Every cell, seed by seed, the dense network first; the core is the first seed."""
    yield Cell(NET, "", DENSE)
    for seed in SEEDS[:1] if core_only else SEEDS:
        yield from (Cell(NET, BUDGET, f"{arm}@{seed}") for arm in ARMS)


def seeded(pace: Pace, unit: Unit) -> Pace:
    """The pace with the cell's seed in everything that draws."""
    assert isinstance(unit, Cell)
    tables = {table: {**pace.overrides.get(table, {}), "seed": unit.seed} for table in ("prune", "measure", "recover")}
    return replace(pace, overrides={**pace.overrides, **tables})


# --- working one ---------------------------------------------------------------------------------------------------


class Try(NamedTuple):
    """A build: the budget it was asked for, the ratio that its accepting session measured, whether that keeps ours."""

    asked: float
    ratio: float
    kept: bool


def next_budget(tried: Sequence[Try], budget: float, slack: float) -> float | None:
    """What to ask of the next build, or None where the last is level or no budget lies between those tried.

    slack: share of the budget that may be unused. A build that misses asks for less, one that leaves more for more, in
    proportion, and within what is known.
    """
    last = tried[-1]
    if last.kept and last.ratio > budget * (1 - slack):
        return None
    low = max((each.asked for each in tried if each.kept), default=0.0)
    high = min((each.asked for each in tried if not each.kept), default=1.0)
    if high - low < FINEST * budget:
        return None
    guess = last.asked * AIM * budget / last.ratio
    return guess if low < guess < high else math.sqrt(max(low, budget / 10) * high)


def enter(arena: Arena, unit: Unit, folder: Path, trials: Path) -> Entry:
    """The network of a cell before its recovery. Raises NeverMet."""
    assert isinstance(unit, Cell)
    arm = ARMS[unit.arm]
    return _same_plan(arena, unit, arm, trials) if arm.repair else _level(arena, unit, arm, folder)


def _level(arena: Arena, unit: Cell, arm: Arm, folder: Path) -> Entry:
    """The build whose measured latency is nearest below the budget; what is left of it: its plan and weights."""
    from benchmarks.frontier.arena import NeverMet

    work = folder / "build"
    shutil.rmtree(work, ignore_errors=True)
    entries: dict[Try, Entry] = {}
    spent, sittings, asked, why = 0.0, 0, unit.ratio, ""
    for _ in range(TRIES):
        try:
            entry = _built(arena, arm, asked, work)
        except NeverMet as missed:
            spent, why = spent + sum(missed.seconds.values()), str(missed)
            break
        spent, sittings = spent + sum(entry.seconds.values()), sittings + entry.sittings
        _, _, upper = entry.facts["accepted"]
        entries[Try(asked, entry.ratio, upper <= unit.ratio)] = entry
        following = next_budget(list(entries), unit.ratio, arena.profile.prune.slack)
        if following is None:
            break
        asked = following
    told = [[each.asked, *entry.facts["accepted"]] for each, entry in entries.items()]
    kept = [each for each in entries if each.kept]
    if not kept:
        ratios = ", ".join(f"{each.ratio:.3f}x for {each.asked:.3f}x" for each in entries)
        raise NeverMet(f"no build keeps {unit.budget}: {ratios or why}", {"search": spent}, sittings)
    best = entries[max(kept, key=lambda each: each.ratio)]
    return _settled(arena, best, folder, {"search": spent}, sittings, {"tried": told, "repair": _mode(arena, arm)})


def _built(arena: Arena, arm: Arm, asked: float, work: Path) -> Entry:
    """One build, without its recovery."""
    from benchmarks.frontier.ours import built

    command = [sys.executable, str(SWITCHED), arm.switch] if arm.switch else builds.DEPLOY
    return built(arena, f"{asked:.4f}x", [*arm.flags, "--set", "recover.epochs=0"], work, command)


def _settled(
    arena: Arena, entry: Entry, folder: Path, seconds: dict[str, float], sittings: int, facts: Mapping[str, Any]
) -> Entry:
    """The entry that is recovered like all others, from the repaired network of the build's bundle."""
    from safetensors.torch import load_file

    from benchmarks.frontier.ours import planned
    from pipeline.work import rebuilt

    assert entry.finished is not None
    onnx, accuracy = entry.finished
    for name in ("plan.json", "pruned.safetensors"):
        shutil.copyfile(onnx.parent / name, folder / name)
    shutil.rmtree(folder / "build")
    return replace(
        entry,
        start=lambda: rebuilt(
            arena.project, planned(folder), load_file(folder / "pruned.safetensors"), arena.profile.prune
        ),
        finished=None,
        seconds=seconds,
        sittings=sittings,
        facts={**entry.facts, **facts, "repaired": accuracy},
    )


def _mode(arena: Arena, arm: Arm) -> str:
    """The repair of a build."""
    return arm.flags[1] if arm.flags[:1] == ("--repair",) else arena.profile.prune.repair


def _same_plan(arena: Arena, unit: Cell, arm: Arm, trials: Path) -> Entry:
    """The plan of the whole build with the same seed, repaired in another way."""
    from benchmarks.frontier.arena import Entry
    from benchmarks.frontier.ours import planned, repaired

    whole = Cell(unit.net, unit.budget, f"{OURS}@{unit.seed}")
    folder = arena.folder / unit.budget / whole.contestant
    if not (folder / "plan.json").is_file():
        raise RuntimeError(f"{whole.name} left no plan in {folder}; take its line out of the results and run it first")
    plan, begun = planned(folder), time.monotonic()
    model = repaired(arena, plan, arm.repair)
    seconds = {"repair": time.monotonic() - begun}
    file = arena.written(model, trials / "repaired.onnx")
    validate, accuracy = arena.judged(file)
    ratio = arena.sit({"repaired": file}).times["repaired"].ratio
    facts = {"repair": arm.repair, "repaired": accuracy, "tried": []}
    return Entry(lambda: model, ratio, {arm.repair: validate}, seconds, 0, facts)
