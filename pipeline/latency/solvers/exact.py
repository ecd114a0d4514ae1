"""Mixed-integer programme over widths and blocks (HiGHS): the least added loss that fits the budget, with its gap.

The programme is that of `pipeline.latency.program`. A greedy answer bounds it first: a single cut that alone costs more
than the whole greedy answer is left out, and the objective is scaled by that answer so that tolerances mean something.
Between equal losses the lower latency wins. An infinite loss counts more than all finite ones together. Stopped by its
time limit, the better of the two answers is returned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.latency.program import Answer, Program, formulate, narrowest
from pipeline.latency.solvers import greedy
from pipeline.latency.solvers.base import FIT, added_loss, allowed_widths, droppable, infeasible
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.errors import MissedError
from profiles.schema import PruneSpec

TIE = 1e-4
"""Weight of latency / budget in an objective whose loss is of order one."""


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
    """The best choice, proven unless `spec.solver_seconds` ran out; `gap` is what is left unproven, relative.

    Raises MissedError, naming the narrowest latency that can be had, when nothing fits.
    """
    start, values = time.perf_counter(), sensitivity.finite(table.choices)
    least, largest = _loss_range(values, table, topology, spec)
    try:
        bound = greedy.solve(rankings, sensitivity, table, topology, budget_ms, spec)
        bound = replace(bound, loss=added_loss(values, topology, bound.widths, bound.dropped))
    except MissedError:
        bound = None
    ceiling = (bound.loss - least) * (1 + 1e-9) if bound else np.inf
    span = max(bound.loss - least if bound else largest - least, 1e-12)
    program = formulate(table, topology, spec, values, ceiling)
    objective = np.array(program.loss) / span + TIE * np.array(program.latency) / budget_ms
    known = _value(bound, table, program, budget_ms, span) if bound else np.inf
    left = max(spec.solver_seconds - (time.perf_counter() - start), 0.1)
    answer = program.minimise(objective, budget_ms=budget_ms / table.correction, seconds=left, incumbent=known)
    found = _decoded(program, answer, values, table, topology)
    fits = [s for s in (found, bound) if s is not None and s.predicted_ms <= budget_ms * FIT]
    if not fits:
        raise infeasible(budget_ms, narrowest(table, topology, spec, sensitivity).predicted_ms)
    best = min(fits, key=lambda s: _value(s, table, program, budget_ms, span))
    value = _value(best, table, program, budget_ms, span)
    gap = 0.0 if answer.done else float(np.clip((value - answer.bound) / max(abs(value), 1e-12), 0.0, 1.0))
    loss = added_loss(sensitivity, topology, best.widths, best.dropped)
    return Solution(best.widths, best.dropped, best.predicted_ms, loss, gap, time.perf_counter() - start)


def _loss_range(
    sensitivity: Sensitivity, table: LatencyTable, topology: Topology, spec: PruneSpec
) -> tuple[float, float]:
    """The least and the largest sum of losses that could ever be reached, each group and block on its own."""
    widths = allowed_widths(table, topology, sensitivity)
    least = largest = 0.0
    for group in topology.groups:
        if group.id in sensitivity.groups:
            losses = [sensitivity.loss(group.id, width) for width in widths[group.id]]
            least += min(0.0, *losses)
            largest += max(0.0, *losses)
    for block in droppable(topology, spec, sensitivity):
        least += min(0.0, sensitivity.blocks[block])
        largest += max(0.0, sensitivity.blocks[block])
    return least, largest


def _decoded(
    program: Program, answer: Answer, sensitivity: Sensitivity, table: LatencyTable, topology: Topology
) -> Solution | None:
    if answer.point is None:
        return None
    widths, dropped = program.decode(answer.point, topology)
    loss = added_loss(sensitivity, topology, widths, dropped)
    return Solution(widths, dropped, table.predict(widths, dropped).ms, loss)


def _value(choice: Solution, table: LatencyTable, program: Program, budget_ms: float, span: float) -> float:
    """The objective of the programme at a choice."""
    latency = choice.predicted_ms / table.correction - program.constant_ms
    return choice.loss / span + TIE * latency / budget_ms
