"""What a build can be run without: parts of the pipeline that are replaced while a switch is on.

    python benchmarks/ablations/switches.py SWITCH build --project DIR ...      `deploy` with that switch on

flops       the table's times become multiply-accumulates, in the unit of the dense network; its widths stay
separable   the table's times become sums of what each width changes alone, the others whole: a table of one dimension
            a width,   t(w) = t(dense) + sum_i (t(w_i, the others dense) - t(dense))
unmeasured  no candidate is measured: the plan of least loss that is predicted to keep the budget is taken
single      values of single cuts are added up, and not measured again around the plan that they lead to
scores      the same with the criterion's own scores instead of measured values; a block's is that of its units
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pipeline import flow, losses, search
from pipeline.latency.solvers.base import FIT
from pipeline.latency.tabulate import tabulate
from pipeline.nouns import LatencyTable, Ranking, RowBuilder, Sensitivity, SiteCost, Topology
from pipeline.search import Candidate, Measured, Search

Times = Mapping[tuple[int, ...], float]


# --- tables --------------------------------------------------------------------------------------------------------


def counted(table: LatencyTable, builder: RowBuilder, topology: Topology) -> LatencyTable:
    """The table with multiply-accumulates for times, scaled so that the dense network takes as long as it did."""

    def macs(cost: SiteCost, times: Times, dropped: bool) -> Times:
        return {widths: _macs(builder.terms(cost.site, widths, dropped=dropped)) for widths in times}

    sites = [SiteCost(c.site, macs(c, c.ms, False), macs(c, c.dropped_ms, True), c.measured) for c in table.sites]
    plain = replace(table, sites=tuple(sites), fixed_ms=0.0)
    unit = table.dense_ms / plain.predict(_sizes(topology)).ms
    scaled = [replace(c, ms=_times(c.ms, unit), dropped_ms=_times(c.dropped_ms, unit)) for c in sites]
    return replace(plain, sites=tuple(scaled))


def _macs(terms: Mapping[str, float]) -> float:
    return sum(work for kind, work in terms.items() if kind != "elements")


def _times(times: Times, unit: float) -> Times:
    return {widths: time * unit for widths, time in times.items()}


def separable(table: LatencyTable, _: RowBuilder, topology: Topology) -> LatencyTable:
    """The table with each width's change of time taken alone, at the dense widths of the others; none below zero."""
    sizes = _sizes(topology)

    def alone(times: Times, dense: tuple[int, ...]) -> Times:
        def moved(widths: tuple[int, ...]) -> float:
            changes = (times[(*dense[:i], w, *dense[i + 1 :])] - times[dense] for i, w in enumerate(widths))
            return max(0.0, times[dense] + sum(changes))

        return {widths: moved(widths) for widths in times}

    sites = []
    for cost in table.sites:
        dense = tuple(dim.size(sizes) for dim in cost.site.dims)
        sites.append(replace(cost, ms=alone(cost.ms, dense), dropped_ms=alone(cost.dropped_ms, dense)))
    return replace(table, sites=tuple(sites))


def _sizes(topology: Topology) -> dict[str, int]:
    return {group.id: group.size for group in topology.groups}


def _tabulated(change: Callable[[LatencyTable, RowBuilder, Topology], LatencyTable]) -> Callable[..., LatencyTable]:
    """`tabulate` with its table changed."""

    def changed(target: Any, builder: RowBuilder, topology: Topology, *args: Any, **more: Any) -> LatencyTable:
        return change(tabulate(target, builder, topology, *args, **more), builder, topology)

    return changed


# --- feedback ------------------------------------------------------------------------------------------------------


class Unmeasured(Search):
    """Takes the plan of least loss that is predicted to keep the budget, and measures none."""

    def _measure(self, number: int) -> list[Candidate]:
        shares = {key: self._share(c.widths, c.dropped) for key, c in self.tried.items()}
        fit = [key for key, share in shares.items() if share <= self.ratio * self.aim * FIT]
        if not fit:
            return []
        best = min(fit, key=lambda key: self.tried[key].loss)
        share = shares[best]
        believed = Measured(share, share, share, self.table.dense_ms)
        self.tried[best] = replace(self.tried[best], predicted_ratio=share, round=number, measured=believed)
        return [self.tried[best]]


# --- values --------------------------------------------------------------------------------------------------------


def kept(
    loss: Any, topology: Any, choices: Any, widths: Any, dropped: Any, before: Sensitivity, **_: Any
) -> Sensitivity:
    """`around` that measures nothing: the values as they were."""
    return before


def scored(probe: Any, rankings: Mapping[str, Ranking], choices: Mapping[str, Sequence[int]], **_: Any) -> Sensitivity:
    """`measure` that asks the criterion: the sum of its losses of the units that go."""
    topology: Topology = probe.network.topology
    groups = {}
    for group in topology.offered:
        losses = rankings[group.id].marginal_loss
        widths = {*choices.get(group.id, ()), group.size}
        groups[group.id] = {width: float(sum(losses[: group.size - width])) for width in sorted(widths)}
    inside = {block.id: [g.id for g in topology.offered if g.block == block.id] for block in topology.removable}
    blocks = {block: sum(map(sum, (rankings[id].marginal_loss for id in ids))) for block, ids in inside.items()}
    return Sensitivity(
        groups, {block: float(loss) if inside[block] else float("inf") for block, loss in blocks.items()}
    )


# --- switching -----------------------------------------------------------------------------------------------------

SWITCHES: Mapping[str, Sequence[tuple[Any, str, Any]]] = {
    "flops": [(flow, "tabulate", _tabulated(counted))],
    "separable": [(flow, "tabulate", _tabulated(separable))],
    "unmeasured": [(flow, "Search", Unmeasured), (flow, "ATTEMPTS", 1)],
    "single": [(search, "around", kept)],
    "scores": [(search, "around", kept), (losses, "measure", scored)],
}
"""Switch -> what it puts in the place of what, as (module, name, value)."""


@contextmanager
def switched(name: str) -> Iterator[None]:
    """A pipeline without what the switch takes away, as long as the context lasts."""
    patches = [patch.object(module, attribute, value) for module, attribute, value in SWITCHES[name]]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def main(name: str, given: Sequence[str]) -> None:
    """`deploy` with the switch on."""
    from pipeline.cli import main as deploy

    sys.path.remove(str(Path(__file__).parent))  # its files must not stand for a user's modules
    with switched(name):
        deploy(given)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
