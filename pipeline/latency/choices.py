"""Which widths are offered: those at which every channel count that a site sees lies on the device's grid.

A channel count is  v = constant + sum of coefficient x width.  It is on the grid when it is the dense one, a multiple
of the step, or one of the narrow counts that the device runs faster than a full step. Groups that are parts of sums
(padded streams, concatenations) get widths in smaller steps where only the sum has to be on the grid; a width stays
only if the other groups of each of its sums can complete it. A group may vanish (width 0) where something else always
stays in every channel count that it is part of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from pipeline.nouns import Dim, Topology

MOST_WIDTHS = 12
"""Widths per group: wide groups are offered in multiples of the step."""


@dataclass(frozen=True)
class Rule:
    """What makes a channel count acceptable. step: of the grid; least: smallest count asked for (`prune.min_width`);
    narrow: counts below the step that are worth having, for each dim that a fast narrow kernel serves."""

    step: int
    least: int
    narrow: Mapping[Dim, tuple[int, ...]]


@dataclass(frozen=True)
class Choices:
    """widths: group -> ascending widths, the full size last. values: dim -> ascending channel counts on the grid."""

    widths: dict[str, tuple[int, ...]]
    values: dict[Dim, tuple[int, ...]]


def find_choices(topology: Topology, dims: Iterable[Dim], rule: Rule) -> Choices:
    """Widths of every group (frozen ones keep their size) and the channel counts that they make."""
    seen = sorted(set(dims), key=lambda dim: (dim.terms, dim.constant))
    sizes = {group.id: group.size for group in topology.groups}
    free = {group.id for group in topology.offered}
    users: dict[str, list[Dim]] = {group: [dim for dim in seen if group in dict(dim.terms)] for group in sizes}
    vanishing = _vanishing(topology, users, free)
    widths = {
        group: _candidates(group, size, users[group], rule, group in vanishing) if group in free else (size,)
        for group, size in sizes.items()
    }
    units = {group: min((dict(dim.terms)[group] for dim in users[group]), default=1) for group in sizes}
    accepted = {dim: _accepted(dim, sizes, units, widths, rule) for dim in seen}
    while _drop_dead_ends(widths, seen, accepted, sizes):
        accepted = {dim: accepted[dim] & _sums(dim, widths) for dim in seen}
    return Choices(widths, {dim: tuple(sorted(values)) for dim, values in accepted.items()})


def _vanishing(topology: Topology, users: Mapping[str, Sequence[Dim]], free: AbstractSet[str]) -> set[str]:
    """Groups that may go to 0: each of their dims keeps a constant or a group that does not vanish itself."""
    gone: set[str] = set()
    for group in reversed([group.id for group in topology.groups if group.id in free and users[group.id]]):
        if all(dim.constant > 0 or any(n != group and n not in gone for n, _ in dim.terms) for dim in users[group]):
            gone.add(group)
    return gone


def _candidates(group: str, size: int, dims: Sequence[Dim], rule: Rule, may_vanish: bool) -> tuple[int, ...]:
    """Widths worth a thought: steps of the grid, the rest that keeps a sum on it, narrow ones, the full size."""
    if not dims:
        return (size,)
    unit = min(dict(dim.terms)[group] for dim in dims)
    step = math.lcm(*(rule.step // math.gcd(rule.step, dict(dim.terms)[group]) for dim in dims if len(dim.terms) == 1))
    step = max(step, rule.step // math.gcd(rule.step, unit)) if any(len(d.terms) == 1 for d in dims) else rule.step
    coarse = step * max(1, -(-size // (step * MOST_WIDTHS)))
    narrow = {v // unit for dim in dims for v in rule.narrow.get(dim, ()) if v % unit == 0}
    offsets = {0}
    if any(len(dim.terms) > 1 or dim.constant for dim in dims):
        offsets |= {size % step} | {(-dim.constant) % step for dim in dims}
        offsets |= {offset for width in narrow for offset in (width % step, -width % step)}
    found = {width for offset in offsets for width in range(offset, size + 1, coarse)} | narrow | {size}
    return tuple(sorted(w for w in found if 0 < w <= size or (w == 0 and may_vanish)))


def _accepted(
    dim: Dim,
    sizes: Mapping[str, int],
    units: Mapping[str, int],
    widths: Mapping[str, tuple[int, ...]],
    rule: Rule,
) -> set[int]:
    """Reachable channel counts of a dim that are on the grid. A dim that repeats channels (flatten) accepts all."""
    full = dim.size(sizes)
    repeats = bool(dim.terms) and all(coefficient > units[group] for group, coefficient in dim.terms)
    least = min(rule.least, full)

    def fits(value: int) -> bool:
        if value == full:
            return True
        return value >= least and (repeats or value % rule.step == 0 or value in rule.narrow.get(dim, ()))

    return {value for value in _sums(dim, widths) if value > 0 and fits(value)}


def _sums(dim: Dim, widths: Mapping[str, tuple[int, ...]]) -> set[int]:
    return _totals(dim.constant, [(c, widths[group]) for group, c in dim.terms])


def _totals(start: int, terms: Sequence[tuple[int, Sequence[int]]]) -> set[int]:
    totals = {start}
    for coefficient, options in terms:
        totals = {total + coefficient * width for total in totals for width in options}
    return totals


def _drop_dead_ends(
    widths: dict[str, tuple[int, ...]],
    dims: Sequence[Dim],
    accepted: Mapping[Dim, AbstractSet[int]],
    sizes: Mapping[str, int],
) -> bool:
    """Take away widths that no choice of the others completes to an accepted count; True if any went."""
    changed = False
    for dim in dims:
        for index, (group, coefficient) in enumerate(dim.terms):
            rest = [(c, widths[name]) for i, (name, c) in enumerate(dim.terms) if i != index]
            others = _totals(dim.constant, rest)
            alive = tuple(
                width
                for width in widths[group]
                if width == sizes[group] or any(coefficient * width + other in accepted[dim] for other in others)
            )
            if alive != widths[group]:
                widths[group] = alive
                changed = True
    return changed
