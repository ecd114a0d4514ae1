"""One global threshold on the rankings' scores: every unit under it goes, the lowest threshold that fits.

A unit's score is its marginal loss x the weight of its ranking / the cost of one unit of its group, made non-decreasing
along the removal order, so that a unit goes only after those that rank below it. This is the global rule of Group
Fisher Pruning (Liu et al., ICML 2021, s / dM), applied at once where that removes one unit a step and scores again. The
cost is `prune.normalise`:

    none     1
    macs     multiply-accumulates that one unit less saves in the dense network
    memory   elements that layers write which one unit less saves there
    ms       milliseconds a unit by the table: least-squares slope through the dense network over the widths of the
             group, all others at full width; with the groups that it has to move with where it cannot move alone.
             A slope within twice its standard error says nothing: there `memory` stands in, at the median rate
             of milliseconds an element of the other groups

Costs below a millionth of the largest count as that: a unit that saves nothing stays. Every width is the allowed one
nearest to what the threshold leaves (off the grid of a sum: the nearest choice on it). A block is removed only where
all units of all groups inside it lie under the threshold, and it has such groups. Groups without a ranking keep their
size. Thresholds are tried from the lowest, and of units with equal scores only as many go as the budget needs: first
from the group that has then lost the smallest share, of those in the network's order. Where even the highest threshold
does not fit, the narrowest network is taken.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pipeline.latency.operations import Operations
from pipeline.latency.solvers._lattice import Lattice, Points, Values
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.schema import PruneSpec

NORMALISES = True
TRIES = False
VALUES = False
LEAST_COST = 1e-6
"""Smallest cost of a unit, relative to the largest."""


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """The network of the lowest threshold that fits. Raises MissedError where not even the narrowest one does."""
    start = time.perf_counter()
    lattice = Lattice(sensitivity, table, topology, spec)
    costs = unit_costs(lattice, spec.normalise)
    known = {ranking.group: ranking for ranking in rankings}
    scores = {
        row: np.maximum.accumulate(known[group].marginal_loss) * known[group].weight / costs[row]
        for row, group in enumerate(lattice.groups)
        if group in known and lattice.counts[row] > 1
    }
    found = lattice.largest(_points(lattice, scores), budget_ms)
    return lattice.solution(lattice.last_resort(budget_ms) if found is None else found, start)


def unit_costs(lattice: Lattice, normalise: str) -> Values:
    """What a score is divided by, for each group of the lattice. Shape (groups,)."""
    if normalise == "none":
        return np.ones(len(lattice.groups))
    operations = Operations(lattice.topology)
    count = operations.macs if normalise == "macs" else operations.activations
    costs = np.array([count() - count({g.id: g.size - 1}) for g in lattice.topology.groups], dtype=np.float64)
    if normalise == "ms":
        slopes, errors = _slopes(lattice)
        sure = slopes > 2 * errors
        rates = slopes[sure & (costs > 0)] / costs[sure & (costs > 0)]
        costs = np.where(sure, slopes, costs * np.median(rates) if len(rates) else 0.0)
    return np.maximum(costs, LEAST_COST * costs.max(initial=0.0) or 1.0)


def _slopes(lattice: Lattice) -> tuple[Values, Values]:
    """Milliseconds a unit, and their standard errors: sum(units x saved) / sum(units^2) over the moves of each group.

    Moves are from the dense network, which is as uncertain as they are: the error is that of a line which need not go
    through it. One move alone has no error.
    """
    moves, groups = lattice.moves(lattice.dense), len(lattice.groups)
    columns = np.arange(groups)
    full = lattice.widths[columns, lattice.dense[:groups]]
    units = (full - lattice.widths[columns, moves.points[:, :groups]]).sum(axis=1)
    slopes, errors = np.zeros(groups), np.zeros(groups)
    for group in set(moves.owners[moves.owners < groups].tolist()):
        own = moves.owners == group
        slopes[group] = (units[own] * moves.saved[own]).sum() / (units[own] ** 2).sum()
        x, y = (np.append(values[own], 0.0) for values in (units, moves.saved))
        x, y = x - x.mean(), y - y.mean()
        left = y - x * (x @ y) / (x @ x)
        errors[group] = np.sqrt((left @ left) / max(1, len(left) - 2) / (x @ x))
    return slopes, errors


def _points(lattice: Lattice, scores: dict[int, Values]) -> Points:
    """The networks of all thresholds, the largest first. scores: group -> ascending scores of its units."""
    removed = lattice.removals(scores)
    points = np.repeat(lattice.dense[None], len(removed), axis=0)
    emptied = np.zeros(removed.shape, dtype=np.bool_)
    for group, own in scores.items():
        points[:, group] = lattice.nearest_index(group, len(own) - removed[:, group])
        emptied[:, group] = removed[:, group] == len(own)
    for block in range(len(lattice.blocks)):
        inside = np.flatnonzero(lattice.homes == block)
        if len(inside):
            points[:, len(lattice.groups) + block] = emptied[:, inside].all(axis=1)
    changed = np.append(True, (points[1:] != points[:-1]).any(axis=1))
    return lattice.settle(points[changed])
