"""Nights on which a device told of itself something else than the night before, and what that did to the baseline.

A new kernel, runtime, driver or clock hits every arm of a check, so no ratio shows it. From such a night on the
baseline's own times are a level of their own, to be compared with the level before: A against A, across nights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from pipeline.nouns import CheckRecord, DeviceChange
from targets.harness.compare import BASELINE

WINDOW = 30
"""Nights of a level that its median is taken of: those next to the change."""
CONTEXT = 4 * WINDOW
"""Checks in which the level before a check is looked for."""


def device_changes(records: Mapping[int, CheckRecord]) -> tuple[DeviceChange, ...]:
    """Every change between two measured checks of a profile that follow each other. records: by number, oldest first.

    Checks that measured nothing are passed over: what changed there shows in the next one that did.
    """
    found: list[DeviceChange] = []
    for profile in dict.fromkeys(record.profile for record in records.values()):
        found += _of_one({n: r for n, r in records.items() if r.profile == profile and _p50(r) is not None})
    return tuple(sorted(found, key=lambda change: change.number))


def _of_one(records: Mapping[int, CheckRecord]) -> list[DeviceChange]:
    numbers, own = list(records), list(records.values())
    told = {i: fields for i in range(1, len(own)) if (fields := _differs(own[i - 1], own[i]))}
    edges = [0, *told, len(own)]
    found = []
    for place, index in enumerate(told, start=1):
        now = own[index]
        sides = (
            _levels(own[edges[place - 1] : index][-WINDOW:], now),
            _levels(own[index : edges[place + 1]][:WINDOW], now),
        )
        before, after = (median(side) if side else None for side in sides)
        assert after is not None  # the night itself
        counts = (len(sides[0]), len(sides[1]))
        found.append(DeviceChange(numbers[index], now.started, now.profile, told[index], before, after, counts))
    return found


def _levels(nights: Sequence[CheckRecord], like: CheckRecord) -> list[float]:
    """Times of the nights that measured the same baseline in the same way."""
    same = [
        night for night in nights if (night.baseline.sha256, night.protocol) == (like.baseline.sha256, like.protocol)
    ]
    return [ms for ms in map(_p50, same) if ms is not None]


def _p50(record: CheckRecord) -> float | None:
    return record.absolute.get(BASELINE, {}).get("p50")


def _differs(before: CheckRecord, now: CheckRecord) -> dict[str, tuple[Any, Any]]:
    """Fields of the fingerprints of two nights that both know and that differ: name -> (then, now)."""
    then, today = _facts(before), _facts(now)
    return {name: (then[name], today[name]) for name in today if name in then and then[name] != today[name]}


def _facts(record: CheckRecord) -> dict[str, Any]:
    """The fingerprint of a night: that of its baseline with what had changed since."""
    table = {**record.baseline.fingerprint, **{name: now for name, (_, now) in record.changed.items()}}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}
