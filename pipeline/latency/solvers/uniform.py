"""One ratio for all groups, the largest network of that kind that fits: the control that any solver has to beat.

Every group keeps the widest width of its own that is at most `keep` x its size (its narrowest one where there is none);
where that leaves a sum off the grid, the nearest choice on it is taken. `keep` goes down through the values at which
any group changes. No block is removed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from pipeline.latency.program import nearest
from pipeline.latency.solvers.base import FIT, added_loss, allowed_widths, infeasible
from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.schema import PruneSpec

TRIES = False
VALUES = False


def solve(
    rankings: Sequence[Ranking],
    sensitivity: Sensitivity,
    table: LatencyTable,
    topology: Topology,
    budget_ms: float,
    spec: PruneSpec,
    trial: Trial | None = None,
) -> Solution:
    """The widest uniform choice that fits. Raises MissedError, naming the fastest uniform one, where none does."""
    start = time.perf_counter()
    choices = allowed_widths(table, topology, sensitivity)
    sizes = {group.id: group.size for group in topology.groups}
    least = float("inf")
    tried: set[tuple[int, ...]] = set()
    for keep in sorted({w / sizes[g] for g, options in choices.items() for w in options}, reverse=True):
        wanted = {
            group: max((w for w in options if w <= keep * sizes[group] + 1e-9), default=min(options))
            for group, options in choices.items()
        }
        widths = wanted if on_grid(table, wanted) else nearest(table, topology, spec, sensitivity, wanted)
        key = tuple(widths[group] for group in choices)
        if key in tried:
            continue
        tried.add(key)
        predicted = table.predict(widths).ms
        least = min(least, predicted)
        if predicted <= budget_ms * FIT:
            loss = added_loss(sensitivity, topology, widths, ())
            return Solution(widths, frozenset(), predicted, loss, None, time.perf_counter() - start)
    one = "the fastest network of one ratio for all groups"
    hint = "--solver exact also takes other widths and drops blocks; or lower prune.min_width or raise the budget."
    raise infeasible(budget_ms, least, one, hint)


def on_grid(table: LatencyTable, widths: Mapping[str, int]) -> bool:
    """Whether the table holds every site at these widths."""
    return all(tuple(dim.size(widths) for dim in cost.site.dims) in cost.ms for cost in table.sites)
