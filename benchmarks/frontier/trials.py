"""Networks that a peer makes at some share of pruning, and what the device says of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim.swa_utils import update_bn

from benchmarks.frontier.arena import Arena, Entry, NeverMet
from benchmarks.frontier.bisection import accepted, search, settled
from benchmarks.frontier.sessions import Timed

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Trials:
    """A search for the share of pruning that keeps a budget. cut: share -> network, or None where it fails."""

    def __init__(self, arena: Arena, folder: Path, cut: Callable[[float], nn.Module | None]) -> None:
        self.arena, self.folder, self.cut = arena, folder, cut
        self.sittings, self.contaminated = 0, 0
        self.accepted: list[Timed] = []
        self.tried: dict[float, float] = {}
        self._known: dict[Shapes, float] = {}

    def least(self, budget: float, spent: Mapping[str, float], begun: float) -> float:
        """The least share whose network keeps the budget, as far as tightening helps. Raises NeverMet."""
        limit = self.arena.limit(budget)

        def choose(limit: float) -> float | None:
            self.tried = search(self.measured, limit, self.arena.pace.steps)
            return settled(self.tried, lambda key: self.measured([key], fresh=True)[0], limit, lambda key: key)

        share = accepted(choose, lambda share: self.bound(share, budget), limit, budget)
        if share is None:
            reason = nearest(self.tried, budget)
            raise NeverMet(reason, {**spent, "search": time.monotonic() - begun}, self.sittings)
        return share

    def bound(self, share: float, budget: float) -> float:
        """Upper bound of a network's ratio in a session of accepting length; NaN where that was contaminated."""
        model = self.cut(share)
        assert model is not None
        file = self.arena.written(self.arena.captured(model), self.folder / f"share-{share:.4f}.onnx")
        time, contaminated, count = self.arena.accept(file, budget)
        self.sittings += count
        self.contaminated += contaminated
        self.accepted.append(time)
        self._known[shapes(model)] = self.tried[share] = time.ratio
        return math.nan if contaminated else time.high

    def measured(self, shares: Sequence[float], fresh: bool = False) -> list[float]:
        """Ratios of the networks at these shares, those of equal shapes measured once; infinite for what fails."""
        known: dict[float, Shapes] = {}
        files: dict[float, Path] = {}
        for share in shares:
            model = self.cut(share)
            if model is None:
                continue
            key = known[share] = shapes(model)
            if fresh or (key not in self._known and key not in (known[s] for s in files)):
                files[share] = self.arena.written(self.arena.captured(model), self.folder / f"share-{share:.4f}.onnx")
        if files:
            self.sittings += 1
            sitting = self.arena.sit({str(share): file for share, file in files.items()})
            self.contaminated += sitting.contaminated
            for share in files:
                ratio, before = sitting.times[str(share)].ratio, self._known.get(known[share])
                self._known[known[share]] = math.sqrt(ratio * before) if fresh and before else ratio
            if fresh:
                return [sitting.times[str(share)].ratio if share in files else math.inf for share in shares]
        return [self._known[known[share]] if share in known else math.inf for share in shares]

    def entry(self, share: float, spent: Mapping[str, float], begun: float, facts: Mapping[str, Any]) -> Entry:
        """The network at a share, with what it keeps as it is and with its batch norms recalibrated."""
        model = self.cut(share)
        assert model is not None
        seconds = {**spent, "search": time.monotonic() - begun}
        tried = {f"{key:.4f}": ratio for key, ratio in sorted(self.tried.items()) if math.isfinite(ratio)}
        before = {"none": self.arena.validated(model), "bn": self.arena.validated(recalibrated(self.arena, model))}
        told = {**facts, "tried": tried, "accepted": self.accepted, "widths": widths(model)}
        return Entry(
            lambda: self.arena.captured(model),
            self.tried[share],
            before,
            seconds,
            self.sittings,
            told,
            contaminated=self.contaminated,
        )


def nearest(tried: Mapping[float, float], budget: float) -> str:
    """Why nothing keeps the budget."""
    share = min(tried, key=lambda key: tried[key])
    broken = sum(math.isinf(ratio) for ratio in tried.values())
    told = f"; {broken} of {len(tried)} shares gave no network that runs" if broken else ""
    return f"{budget:g}x is never kept: the fastest is {tried[share]:.3f}x at {share:.3f}{told}"


def recalibrated(arena: Arena, model: nn.Module) -> nn.Module:
    """A copy whose batch norms hold the statistics of the calibration samples."""
    fresh = copy.deepcopy(model)
    update_bn([batch[0] for batch in arena.samples.inputs], fresh)
    return fresh.eval()


def shapes(model: nn.Module) -> Shapes:
    """What tells whether two pruned networks take the same time."""
    return tuple((name, tuple(p.shape)) for name, p in model.named_parameters())


def widths(model: nn.Module) -> dict[str, int]:
    """Output channels of every convolution."""
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
