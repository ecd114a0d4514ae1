"""A beam of pruned networks that grow narrower side by side, each measured on the target as it comes.

The idea of Archtree (arXiv 2311.10549, 2023; no code is public, so the form is a reconstruction): the tree of pruned
networks is searched in parallel from the dense one, and latency is measured on the target on the fly instead of being
predicted alone. The way to the budget is divided into LEVELS latencies on a geometric scale. At each level

    children   of every network in the beam, up to CHILDREN, all cut to the level's latency as the table predicts it,
               corrected by what it was off for the parent. The first takes the cuts that cost the least loss per
               millisecond by the measured values. Half of the others each leave one of these cuts undone, those that
               cost most loss, and so does their branch from there on; the rest each begin with a cut that it spared,
               the cheapest ones. So where a value is wrong, some child shows it
    judged     by the trial's loss after repair, all of them
    measured   those of least loss, MEASURED of them in one batch
    kept       the BEAM of least loss among those that are measured within NEAR of the level, else the fastest

At the last level the dense network has children too, as the least loss on the way need not lead to the least at its
end; only what is measured and predicted to keep the budget counts, and single moves use what is left of it. Where
nothing keeps it, up to FURTHER levels follow from the fastest, which is taken in the end. At most (LEVELS + FURTHER) x
MEASURED measurements and ((LEVELS + FURTHER) x BEAM + 1) x CHILDREN losses are asked for. Without a trial losses are
the values and latencies the table's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.latency.solvers._lattice import Lattice, Points, losses_of
from pipeline.latency.solvers.base import FIT
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.schema import PruneSpec

TRIES = True
VALUES = True
LEVELS = 4
FURTHER = 2
BEAM = 3
CHILDREN = 8
MEASURED = 6
NEAR = 1.02

Child = tuple[Points, frozenset[int]]
"""A network that is neither judged nor measured yet, and what its branch leaves alone."""


@dataclass(frozen=True)
class Node:
    """A network of the tree. barred: columns that its branch leaves alone. loss: judged; ms: measured; off: measured /
    predicted."""

    point: Points
    barred: frozenset[int]
    loss: float
    ms: float
    off: float


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """The network of least loss at the end of the beam. Raises MissedError where not even the narrowest one fits."""
    start = time.perf_counter()
    lattice = Lattice(sensitivity, table, topology, spec)
    dense_ms = float(lattice.ms(lattice.dense[None])[0])
    dense = Node(lattice.dense, frozenset(), 0.0, dense_ms, 1.0)
    beam = [dense]
    for level in range(1, LEVELS + FURTHER + 1):
        share = min(1.0, level / LEVELS)
        last = level >= LEVELS
        goal_ms = dense_ms ** (1 - share) * budget_ms**share
        if level == LEVELS:
            beam.append(replace(dense, off=beam[0].off))
        grown = _children(lattice, beam, goal_ms, budget_ms if last else None)
        if not grown:
            break
        nodes = _judged(lattice, grown, trial)
        kept = [node for node in nodes if node.ms <= goal_ms * (FIT if last else NEAR)]
        beam = kept[:BEAM] or [min(nodes, key=lambda node: node.ms)]
        if last and kept:
            break
    best = beam[0].point
    fits = lattice.ms(best[None])[0] <= budget_ms * FIT
    return lattice.solution(best if fits else lattice.last_resort(budget_ms), start)


def _children(lattice: Lattice, beam: Sequence[Node], goal_ms: float, budget_ms: float | None) -> list[Child]:
    """What the beam grows into at a level, each once; budget_ms: of the last level, which predictions keep too."""
    found: dict[bytes, Child] = {}
    for node in beam:
        limit = goal_ms / node.off if budget_ms is None else min(goal_ms / node.off, budget_ms)
        plain = lattice.descend(node.point, limit, node.barred)
        if plain is None:
            plain = lattice.descend(node.point, limit)
        if plain is None:
            continue
        grown: list[tuple[Points | None, frozenset[int]]] = [(plain, node.barred)]
        spent = _spent(lattice, node.point, plain)
        for column in spent[: CHILDREN // 2]:
            barred = node.barred | {column}
            grown.append((lattice.descend(node.point, limit, barred), barred))
        moves = lattice.moves(node.point).cheapest()
        spared = moves.only(np.flatnonzero(~np.isin(moves.owners, [*spent, *node.barred])))
        for row in np.sort(np.unique(spared.owners, return_index=True)[1])[: CHILDREN - len(grown)]:
            grown.append((lattice.descend(spared.points[row], limit, node.barred), node.barred))
        for child, barred in grown:
            if child is not None:
                full = child if budget_ms is None else lattice.refill(child, limit)
                found.setdefault(full.tobytes(), (full, barred))
    return list(found.values())


def _spent(lattice: Lattice, before: Points, after: Points) -> list[int]:
    """Columns in which a cut network differs from what it was cut from, those that cost most loss first."""
    inside = np.concatenate([lattice.inside(after[None])[0], np.zeros(len(lattice.blocks), dtype=np.bool_)])
    columns = np.flatnonzero((before != after) & ~inside)
    undone = np.repeat(after[None], len(columns), axis=0)
    undone[np.arange(len(columns)), columns] = before[columns]
    return [int(columns[row]) for row in np.argsort(lattice.loss(lattice.settle(undone)), kind="stable")]


def _judged(lattice: Lattice, children: Sequence[Child], trial: Trial | None) -> list[Node]:
    """The children that are measured, by rising loss."""
    points = np.stack([point for point, _ in children])
    predicted = lattice.ms(points)
    losses = lattice.loss(points) if trial is None else losses_of(trial.loss, lattice, points)
    order = np.lexsort((predicted, losses))
    measured = predicted[order].tolist()
    if trial is not None:
        order = order[:MEASURED]
        measured = trial.measure([lattice.solution(points[row]) for row in order])
    nodes = []
    for row, ms in zip(order.tolist(), measured, strict=True):
        point, barred = children[row]
        nodes.append(Node(point, barred, float(losses[row]), ms, ms / float(predicted[row])))
    return nodes
