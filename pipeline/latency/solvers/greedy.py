"""Greedy descent: again and again the cut with the least added loss per millisecond saved, until the budget fits.

From the dense network; a cut narrows one group, narrows two groups that share a sum, or removes a block. Costs are
those of the sites that a cut touches, read from the table at the widths of the moment. No step back and no proof: the
control for the exact solver, and its incumbent. On the way down a block may go whose inner groups were narrowed before:
their loss leaves with them.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from pipeline.latency.program import last_resort
from pipeline.latency.solvers.base import FIT, added_loss, allowed_widths, droppable
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, SiteCost, Solution, Topology, Trial
from profiles.schema import PruneSpec

Cut = tuple[tuple[str, int], ...]
"""New widths of groups; a removed block is written as (block id, -1)."""


@dataclass(frozen=True)
class Gain:
    """What a cut saves and costs at the moment."""

    saved_ms: float
    added: float

    @property
    def order(self) -> tuple[float, float]:
        """Sort key: free cuts first (the most time saved), then the least loss per millisecond."""
        return (0.0, -self.saved_ms) if self.added <= 0 else (self.added / self.saved_ms, -self.saved_ms)


class Descent:
    """The state of the search: widths and removed blocks, the sites that each group touches, gains already known."""

    def __init__(self, sensitivity: Sensitivity, table: LatencyTable, topology: Topology, spec: PruneSpec) -> None:
        self.choices = allowed_widths(table, topology, sensitivity)
        self.homes = {group.id: group.block for group in topology.groups}
        self.widths = {group.id: group.size for group in topology.groups}
        self.dropped: set[str] = set()
        self.blocks = droppable(topology, spec, sensitivity)
        self.block_loss = sensitivity.blocks
        self.losses = {
            group: {w: sensitivity.loss(group, w) for w in options} if group in sensitivity.groups else {}
            for group, options in self.choices.items()
        }
        self.sites: dict[str, list[SiteCost]] = defaultdict(list)
        self.partners: dict[str, set[str]] = defaultdict(set)
        self._index(table)
        self.known: dict[Cut, Gain | None] = {}

    def _index(self, table: LatencyTable) -> None:
        for cost in table.sites:
            groups = {group for dim in cost.site.dims for group, _ in dim.terms}
            for owner in groups | ({cost.site.block} if cost.site.block in self.blocks else set()):
                if owner is not None:
                    self.sites[owner].append(cost)
            for dim in cost.site.dims:
                members = [group for group, _ in dim.terms if len(self.choices[group]) > 1]
                for first, second in itertools.permutations(members, 2):
                    self.partners[first].add(second)

    def ms(self, cost: SiteCost, widths: Mapping[str, int], dropped: AbstractSet[str]) -> float | None:
        """Time of a site, or None off the grid."""
        key = tuple(dim.size(widths) for dim in cost.site.dims)
        if cost.site.block is not None and cost.site.block in dropped:
            return cost.dropped_ms.get(key, 0.0 if not cost.dropped_ms else None)
        return cost.ms.get(key)

    def cuts(self) -> list[Cut]:
        """Every cut that is open now: blocks, single groups, and pairs where a group cannot move alone on the grid."""
        cuts: list[Cut] = [((block, -1),) for block in self.blocks if block not in self.dropped]
        for group in self.choices:
            lower = self._lower(group)
            alone: list[Cut] = [((group, w),) for w in lower]
            cuts += alone
            if self.partners[group] and lower and all(self.gain(cut) is None for cut in alone):
                for other in sorted(self.partners[group]):
                    cuts += [((group, w), (other, v)) for v in self._lower(other)[-2:] for w in lower[-2:]]
        return cuts

    def _lower(self, group: str) -> list[int]:
        if self.homes[group] in self.dropped:
            return []
        return [width for width in self.choices[group] if width < self.widths[group]]

    def gain(self, cut: Cut) -> Gain | None:
        """What a cut brings, or None where it leaves the grid or saves no time."""
        if cut not in self.known:
            self.known[cut] = self._gain(cut)
        return self.known[cut]

    def _gain(self, cut: Cut) -> Gain | None:
        widths, dropped, lost, losing = dict(self.widths), set(self.dropped), 0.0, 0.0
        for name, width in cut:
            if width < 0:
                dropped.add(name)
                inner = [group for group, home in self.homes.items() if home == name]
                lost += sum(self.losses[g].get(self.widths[g], 0.0) for g in inner)
                losing += self.block_loss[name]
                widths.update({group: self.choices[group][-1] for group in inner})
            else:
                widths[name] = width
                lost += self.losses[name][self.widths[name]]
                losing += self.losses[name][width]
        saved = 0.0
        for cost in {id(c): c for name, _ in cut for c in self.sites[name]}.values():
            before, after = self.ms(cost, self.widths, self.dropped), self.ms(cost, widths, dropped)
            if before is None or after is None:
                return None
            saved += before - after
        added = losing - lost if losing != lost else 0.0  # both may be infinite
        return Gain(saved, added) if saved > 0 else None

    def apply(self, cut: Cut) -> None:
        """Make a cut and forget the gains that it changed."""
        touched: set[str] = set()
        for name, width in cut:
            if width < 0:
                self.dropped.add(name)
                inner = [group for group, home in self.homes.items() if home == name]
                self.widths.update({group: self.choices[group][-1] for group in inner})
            else:
                self.widths[name] = width
            for cost in self.sites[name]:
                touched |= {group for dim in cost.site.dims for group, _ in dim.terms}
                touched |= {cost.site.block} if cost.site.block else set()
            touched.add(name)
        self.known = {c: gain for c, gain in self.known.items() if not any(name in touched for name, _ in c)}


TRIES = False
VALUES = True


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """Cut from the dense network until the budget fits. Raises MissedError where it ends before that."""
    start = time.perf_counter()
    state = Descent(sensitivity, table, topology, spec)
    predicted = table.predict(state.widths, state.dropped).ms
    while predicted > budget_ms * FIT:
        gains = [(gain.order, cut) for cut in state.cuts() if (gain := state.gain(cut)) is not None]
        if not gains:
            least = last_resort(table, topology, spec, sensitivity, budget_ms)
            return replace(least, seconds=time.perf_counter() - start)
        state.apply(min(gains)[1])
        predicted = table.predict(state.widths, state.dropped).ms
    loss = added_loss(sensitivity, topology, state.widths, state.dropped)
    return Solution(dict(state.widths), frozenset(state.dropped), predicted, loss, None, time.perf_counter() - start)
