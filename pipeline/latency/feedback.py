"""Correcting the table with what whole candidates took: one factor, near the latencies that matter.

A good table needs no correction, and a factor from one candidate adds that candidate's noise; a biased table is mended
by the geometric mean of measured / predicted over the candidates nearest to the budget, of this build and of earlier
ones: a table whose rows are reused keeps its bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.latency.store import Store
from pipeline.nouns import LatencyTable

NEAREST = 6
KEPT = 64
"""How many candidates are kept of a network on a device, the latest."""

Seen = tuple[Mapping[str, int], Iterable[str], float]
"""Widths and removed blocks of a candidate, and its latency relative to the dense network."""


def recalibrate(table: LatencyTable, seen: Sequence[Seen], ratio: float) -> LatencyTable:
    """The table with its correction set from measured candidates, those whose latencies are nearest to `ratio`.

    The factor is against the uncorrected table, so that it does not matter how often it has been corrected before.
    Candidates with widths that the table does not hold tell nothing.
    """
    plain = replace(table, correction=1.0)
    logs: list[tuple[float, float]] = []
    for widths, dropped, measured in seen:
        try:
            predicted = plain.predict(widths, frozenset(dropped)).ms / table.dense_ms
        except KeyError:
            continue
        logs.append((abs(math.log(measured / ratio)), math.log(measured / predicted)))
    if not logs:
        return table
    near = [log for _, log in sorted(logs)[:NEAREST]]
    return replace(table, correction=math.exp(sum(near) / len(near)))


def recall(store: Store, device: str, protocol: str, dense: str) -> list[Seen]:
    """What earlier builds measured of a network on a device. dense: SHA-256 of its ONNX file."""
    found: list[Any] = store.fact(device, protocol, _name(dense)) or []
    return [(widths, tuple(dropped), ratio) for widths, dropped, ratio in found]


def remember(store: Store, device: str, protocol: str, dense: str, seen: Sequence[Seen]) -> None:
    """Keep what was measured for later builds, beside what earlier ones did; a run that is resumed says it twice."""
    new = [[dict(widths), sorted(dropped), ratio] for widths, dropped, ratio in seen]

    def joined(old: list[Any] | None) -> list[Any]:
        return [*(row for row in old or [] if row not in new), *new][-KEPT:]

    store.relearn(device, protocol, _name(dense), joined)


def _name(dense: str) -> str:
    return f"candidates of {dense}"
