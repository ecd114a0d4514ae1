"""The contract of a solver: which width every group gets and which blocks go, so that the predicted latency fits.

A solver is a file with one function `solve`. It returns a `Solution` whose widths are all on the table's grid and whose
predicted latency is at most `budget_ms`; when there is none it raises the `MissedError` of `infeasible`. A solver that
searches by trying sets TRIES and asks its `trial`; the loop then calls it once a round, and not again for every turn of
measured values. In a dry run there is no trial, and it has to do without. Nor is one asked again whose choice does not
depend on values (VALUES = False, the controls): what ships is its own answer, not the best of what lies around it.
RECOVERS = True (False where it says nothing) tells that its trials are trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from pipeline.nouns import LatencyTable, Ranking, Sensitivity, Solution, Topology, Trial
from profiles.errors import MissedError
from profiles.schema import PruneSpec

FIT = 1.0 + 1e-6
"""A predicted latency up to this times the budget counts as within it: the tolerance of the linear programme."""


class Solver(Protocol):
    """A module of this folder. TRIES: whether it asks a trial. VALUES: whether its choice depends on values."""

    TRIES: bool
    VALUES: bool

    def solve(
        self,
        rankings: Sequence[Ranking],
        sensitivity: Sensitivity,
        table: LatencyTable,
        topology: Topology,
        budget_ms: float,
        spec: PruneSpec,
        trial: Trial | None = None,
    ) -> Solution:
        """Choose widths and blocks. Raises MissedError when nothing that the table allows fits the budget."""
        ...


def allowed_widths(
    table: LatencyTable, topology: Topology, sensitivity: Sensitivity | None
) -> dict[str, tuple[int, ...]]:
    """Group id -> widths to choose from, ascending: the table's where it is offered and was valued, else its size."""
    widths: dict[str, tuple[int, ...]] = {}
    for group in topology.groups:
        valued = sensitivity is None or group.id in sensitivity.groups
        free = group.frozen is None and valued
        widths[group.id] = tuple(sorted(table.choices.get(group.id, (group.size,)))) if free else (group.size,)
    return widths


def droppable(topology: Topology, spec: PruneSpec, sensitivity: Sensitivity | None) -> tuple[str, ...]:
    """Ids of the blocks that may be removed, in the network's order."""
    if not spec.drop_blocks:
        return ()
    blocks = topology.removable
    return tuple(block.id for block in blocks if sensitivity is None or block.id in sensitivity.blocks)


def added_loss(
    sensitivity: Sensitivity, topology: Topology, widths: Mapping[str, int], dropped: Iterable[str]
) -> float:
    """Sum of the measured losses of a choice; what lives inside a removed block adds nothing of its own."""
    gone = frozenset(dropped)
    total = sum(sensitivity.blocks[block] for block in gone)
    for group in topology.groups:
        if group.id in sensitivity.groups and group.block not in gone:
            total += sensitivity.loss(group.id, widths[group.id])
    return total


def infeasible(
    budget_ms: float,
    narrowest_ms: float,
    narrowest: str = "the narrowest allowed network",
    hint: str = "lower prune.min_width or raise the budget.",
) -> MissedError:
    """The error for a budget below what the narrowest network needs. narrowest: of those that the solver may choose."""
    digits = max(1, 1 - math.floor(math.log10(max(1e-6, min(budget_ms, narrowest_ms)))))  # two figures of the smaller
    for places in range(digits, digits + 4):
        budget, least = f"{budget_ms:.{places}f}", f"{narrowest_ms:.{places}f}"
        if budget != least:
            break
    return MissedError(
        f"budget {budget} ms cannot be met: {narrowest} is predicted at {least} ms.",
        hint,
    )
