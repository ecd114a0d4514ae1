"""Correcting the table with what whole candidates took: one factor, near the plans that matter.

A good table needs no correction, and a factor from one candidate adds that candidate's noise; a biased table is mended
by the geometric mean of measured / predicted over candidates near the budget or near the plan in question, of this
build and of earlier ones: a table whose rows are reused keeps its bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.latency.store import Store
from pipeline.nouns import LatencyTable

NEAREST = 6
KEPT = 64
"""How many candidates are kept of a network on a device, the latest."""

Seen = tuple[Mapping[str, int], Iterable[str], float]
"""Widths and removed blocks of a candidate, and its latency relative to the dense network."""


@dataclass(frozen=True)
class Residual:
    """How far a measured candidate was from the uncorrected table: log = ln(measured / predicted)."""

    widths: Mapping[str, int]
    dropped: frozenset[str]
    ratio: float
    log: float

    def edits(self, widths: Mapping[str, int], dropped: frozenset[str]) -> int:
        """In how many groups and blocks it differs from a choice."""
        differ = sum(width != widths[id] for id, width in self.widths.items() if id in widths)
        return differ + len(self.dropped ^ dropped)


def residuals(table: LatencyTable, seen: Sequence[Seen]) -> list[Residual]:
    """What the candidates tell of the table: nothing, where it does not hold their widths or they have no time."""
    plain = replace(table, correction=1.0)
    found = []
    for widths, dropped, ratio in seen:
        if not 0 < ratio < math.inf:
            continue
        try:
            predicted = plain.predict(widths, frozenset(dropped)).ms / table.dense_ms
        except KeyError:
            continue
        found.append(Residual(widths, frozenset(dropped), ratio, math.log(ratio / predicted)))
    return found


def recalibrate(table: LatencyTable, found: Sequence[Residual], ratio: float) -> LatencyTable:
    """The table with its correction set from the candidates whose latencies are nearest to `ratio`.

    The factor is against the uncorrected table, so that it does not matter how often it has been corrected before.
    """
    near = sorted(found, key=lambda seen: abs(math.log(seen.ratio / ratio)))[:NEAREST]
    return replace(table, correction=math.exp(sum(seen.log for seen in near) / len(near))) if near else table


def near(
    table: LatencyTable, found: Sequence[Residual], widths: Mapping[str, int], dropped: frozenset[str]
) -> LatencyTable:
    """The table with the correction for choices like this one: candidates weigh 1 / (1 + edits between them)².

    What a table is off by belongs to a plan's shape: on ResNet-20 at 0.5x three finalists took 0.95 of what it said,
    and three of another shape that followed took 0.98 to 1.00, where one factor for all had promised 0.95.
    """
    weights = [(1.0 + seen.edits(widths, dropped)) ** -2 for seen in found]
    if not weights:
        return table
    mean = sum(w * seen.log for w, seen in zip(weights, found, strict=True)) / sum(weights)
    return replace(table, correction=math.exp(mean))


def recall(store: Store, device: str, protocol: str, dense: str) -> list[Seen]:
    """What earlier builds measured of a network on a device. dense: SHA-256 of its ONNX file."""
    found: list[Any] = store.fact(device, protocol, _name(dense)) or []
    return [(widths, tuple(dropped), ratio) for widths, dropped, ratio in found]


def remember(store: Store, device: str, protocol: str, dense: str, seen: Sequence[Seen]) -> None:
    """Keep what was measured for later builds, beside what earlier ones did; a run that is resumed says it twice."""
    new = _rows(seen)

    def joined(old: list[Any] | None) -> list[Any]:
        return [*(row for row in old or [] if row not in new), *new][-KEPT:]

    store.relearn(device, protocol, _name(dense), joined)


def corrected(known: Iterable[Seen], now: Seen) -> list[Seen]:
    """What was measured, one candidate at last by the accepting protocol: in place of every other reading of it."""
    plan = dict(now[0]), frozenset(now[1])
    return [*(seen for seen in known if (dict(seen[0]), frozenset(seen[1])) != plan), now]


def remember_corrected(store: Store, device: str, protocol: str, dense: str, now: Seen) -> None:
    """Keep such a reading for later builds."""

    def joined(old: list[Any] | None) -> list[Any]:
        return _rows(corrected(map(tuple, old or []), now))[-KEPT:]

    store.relearn(device, protocol, _name(dense), joined)


def _rows(seen: Iterable[Seen]) -> list[Any]:
    """Candidates as a store keeps them."""
    return [[dict(widths), sorted(dropped), ratio] for widths, dropped, ratio in seen]


def _name(dense: str) -> str:
    return f"candidates of {dense}"
