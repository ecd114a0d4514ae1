"""The honest baseline: a smaller network of the same family, trained from nothing for as many steps in all.

`scratch-width` scales every channel count, to multiples of eight; `scratch-depth` leaves blocks out, from the longest
stage first, and narrows those that come next to the budget from above. Of these the slowest that keeps the budget as
measured is trained: for the epochs that the dense weights had plus the one of the recovery, ten at most, with the
recovery's optimizer, schedule and learning rate, from labels (`plain`) or with the dense network as a teacher
(`distilled`). A training that the ten cut short is called truncated and is no peer of the criterion.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.frontier.arena import Arena, Entry, NeverMet
from benchmarks.frontier.bisection import accepted, settled
from benchmarks.frontier.dense import EPOCHS, LEARNING_RATE
from benchmarks.frontier.trials import widths

NARROW = tuple(i / 16 for i in range(15, 1, -1))
"""Widths that are tried."""
NARROWED = 2
"""Of the depths that are too slow, how many are tried narrower too: blocks come in large steps of latency."""
MOST_ARMS = 12


@dataclass(frozen=True)
class Shape:
    """A member of the family. width: of every channel count. blocks: of each stage."""

    width: float
    blocks: tuple[int, ...]


def shapes(contestant: str, blocks: Sequence[int]) -> list[Shape]:
    """What is tried first. blocks: of the dense network."""
    if contestant == "scratch-width":
        return [Shape(width, tuple(blocks)) for width in NARROW]
    return [Shape(1.0, counts) for counts in shallower(blocks)]


def narrowed(tried: Mapping[Shape, float], limit: float) -> list[Shape]:
    """Narrower forms of the NARROWED fastest networks that are too slow."""
    slow = sorted((shape for shape in tried if tried[shape] > limit), key=lambda shape: tried[shape])
    return [Shape(width, shape.blocks) for shape in slow[:NARROWED] for width in NARROW]


def shallower(blocks: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ever fewer blocks: one less in the longest stage, the first of several, down to one each."""
    counts = list(blocks)
    while max(counts) > 1:
        counts[counts.index(max(counts))] -= 1
        yield tuple(counts)


def enter(arena: Arena, budget: float, contestant: str, folder: Path) -> Entry:
    """The slowest of these networks that keeps the budget, untrained. Raises NeverMet."""
    begun, limit = time.monotonic(), arena.limit(budget)
    family = Family(arena, folder)
    blocks = inspect.signature(arena.project.references["model.factory"].call).parameters["blocks"].default
    tried = family.measured(shapes(contestant, blocks))
    if contestant == "scratch-depth":
        tried |= family.measured(narrowed(tried, limit))
    told = {f"{shape.width:g} {shape.blocks}": ratio for shape, ratio in tried.items()}

    def bound(shape: Shape) -> float:
        tried[shape], high = family.accepted(shape, budget)
        return high

    chosen = accepted(
        lambda limit: settled(tried, family.again, limit, lambda shape: -tried[shape]), bound, limit, budget
    )
    seconds = {"search": time.monotonic() - begun}
    if chosen is None:
        raise NeverMet(
            f"{budget:g}x is never kept: the fastest is {min(tried.values()):.3f}x", seconds, family.sittings
        )
    model = family.made(chosen)
    facts: dict[str, object] = {"width": chosen.width, "blocks": chosen.blocks, "tried": told, "widths": widths(model)}
    wanted = EPOCHS[arena.net] + 1
    epochs = min(wanted, arena.pace.most_epochs)
    if epochs < wanted:
        facts["truncated"] = [epochs, wanted]
    return Entry(
        lambda: arena.captured(model), tried[chosen], {}, seconds, family.sittings, facts,
        epochs=epochs, learning_rate=LEARNING_RATE, contaminated=family.contaminated,
    )  # fmt: skip


class Family:
    """Networks of a factory at other widths and depths. sittings: their sessions, `contaminated` of them disturbed."""

    def __init__(self, arena: Arena, folder: Path) -> None:
        self.arena, self.folder, self.sittings, self.contaminated = arena, folder, 0, 0
        self._seen: set[tuple[torch.Size, ...]] = set()

    def made(self, shape: Shape) -> nn.Module:
        """The network with its first weights, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            factory = self.arena.project.references["model.factory"].call
            model: nn.Module = factory(width=shape.width, blocks=shape.blocks)
        return model.eval()

    def measured(self, asked: Sequence[Shape]) -> dict[Shape, float]:
        """Latencies relative to the dense network of those that are not equal to one that was measured before."""
        new = [shape for shape in asked if self._is_new(shape)]
        parts = (new[start : start + MOST_ARMS] for start in range(0, len(new), MOST_ARMS))
        return {shape: ratio for part in parts for shape, ratio in self._sit(part).items()}

    def again(self, shape: Shape) -> float:
        """One network's latency once more."""
        return self._sit([shape])[shape]

    def accepted(self, shape: Shape, budget: float) -> tuple[float, float]:
        """One network's ratio and upper bound in a session of accepting length; no bound where it was contaminated."""
        file = self.arena.written(self.arena.captured(self.made(shape)), self.folder / "accepted.onnx")
        time, contaminated, count = self.arena.accept(file, budget)
        self.sittings += count
        self.contaminated += contaminated
        return time.ratio, math.nan if contaminated else time.high

    def _is_new(self, shape: Shape) -> bool:
        sizes = tuple(p.shape for p in self.made(shape).parameters())
        new = sizes not in self._seen
        self._seen.add(sizes)
        return new

    def _sit(self, part: Sequence[Shape]) -> dict[Shape, float]:
        self.sittings += 1
        named = {str(number): shape for number, shape in enumerate(part)}
        files = {
            name: self.arena.written(self.arena.captured(self.made(shape)), self.folder / f"shape-{name}.onnx")
            for name, shape in named.items()
        }
        sitting = self.arena.sit(files)
        self.contaminated += sitting.contaminated
        return {shape: sitting.times[name].ratio for name, shape in named.items()}
