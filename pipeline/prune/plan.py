"""A plan resolved against a topology: which positions of which parameter stay, and what every constant becomes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.nouns import Constant, ConstantValue, Cut, DropBlock, KeepUnits, PruningPlan, Ranking, Topology, Units
from profiles.errors import DeployError


def make_plan(
    topology: Topology, rankings: Mapping[str, Ranking], widths: Mapping[str, int], dropped: frozenset[str]
) -> PruningPlan:
    """The plan that keeps the best units of each group at these widths; groups of removed blocks are left out."""
    edits: list[KeepUnits | DropBlock] = [DropBlock(block.id) for block in topology.blocks if block.id in dropped]
    for group in topology.offered:
        width = widths.get(group.id, group.size)
        if width < group.size and group.block not in dropped:
            edits.append(KeepUnits(group.id, rankings[group.id].keep(width)))
    return PruningPlan(tuple(edits))


def kept_units(topology: Topology, plan: PruningPlan) -> NDArray[np.bool_]:
    """For every unit id whether it stays. Raises DeployError for a plan that is not of this topology."""
    groups = {group.id: group for group in topology.groups}
    keep = np.ones(topology.count + 1, dtype=bool)  # the last entry answers for -1
    for id, kept in plan.kept.items():
        group = groups.get(id)
        if group is None:
            raise DeployError(
                f"the plan cuts a group '{id}' that this network does not have.",
                "use the network that the plan was made for.",
            )
        if kept and kept[-1] >= group.size:
            raise DeployError(f"the plan keeps unit {kept[-1]} of group '{group.name}', which has {group.size} units.")
        if group.frozen is not None:
            raise DeployError(f"the plan cuts the group '{group.name}', which is frozen: {group.frozen}.")
        keep[list(group.units)] = False
        keep[[group.units[i] for i in kept]] = True
    return keep


def resolve(topology: Topology, plan: PruningPlan) -> Cut:
    """What the plan does to every parameter axis and every constant. Raises DeployError as `kept_units` does."""
    keep = kept_units(topology, plan)
    known = {block.id: block for block in topology.blocks}
    for id in plan.dropped:
        if id not in known or known[id].frozen is not None:
            raise DeployError(f"the plan removes a block '{id}' that this network cannot lose.")
    dropped = tuple(block for block in topology.blocks if block.id in plan.dropped)
    gone = {name for block in dropped for name in block.params}
    nodes = {node for block in dropped for node in block.nodes}
    params: dict[str, dict[int, NDArray[np.int64]]] = {}
    for name, axes in topology.params.items():
        if name in gone:
            continue
        for axis, units in axes.items():
            positions = _stay(units, keep)
            if positions.size == 0:
                raise DeployError(f"the plan leaves no channel of '{name}'.", "raise prune.min_width.")
            if positions.size < units.size:
                params.setdefault(name, {})[axis] = positions
    constants = {c.node: (c.kind, c.axis, _value(c, keep)) for c in topology.constants if c.node not in nodes}
    return Cut(params, constants, dropped)


def _stay(units: Units, keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.flatnonzero(keep[units])


def _count(units: Units | None, keep: NDArray[np.bool_]) -> int:
    return 0 if units is None else int(np.count_nonzero(keep[units]))


def _value(c: Constant, keep: NDArray[np.bool_]) -> ConstantValue:
    if c.kind == "reshape":
        return tuple(
            size if units is None else _count(units, keep) for size, units in zip(c.sizes, c.units, strict=True)
        )
    if c.kind == "gather":
        (units,) = c.units
        assert units is not None
        rank = np.cumsum(keep[units]) - 1
        return tuple(int(rank[i]) for i in c.indices if keep[units[i]])
    counts = tuple(_count(units, keep) for units in c.units)
    if c.kind == "slice":
        return (counts[0], counts[0] + counts[1])
    return counts
