"""Nights on which a device changed, and the baseline's level on both sides."""

from __future__ import annotations

from dataclasses import replace

from check_samples import DEVICE, record

from pipeline.nightly.levels import device_changes
from pipeline.nightly.records import from_table, to_table
from pipeline.nouns import CheckRecord, DeviceChange
from targets.harness.compare import BASELINE


def night(ms: float | None, **changed: object) -> CheckRecord:
    """A check whose baseline took `ms`, on the device of the baseline save for what `changed` says."""
    then = DEVICE.to_table()
    fields = {name: (then[name], now) for name, now in changed.items()}
    return replace(record(), changed=fields, absolute={} if ms is None else {BASELINE: {"p50": ms}})


def found(*nights: CheckRecord) -> list[DeviceChange]:
    return list(device_changes(dict(enumerate(nights, start=1))))


def test_a_new_kernel_is_told_on_the_night_it_came_and_on_no_other_with_the_level_on_both_sides():
    old, new = [night(ms) for ms in (1.0, 1.1, 0.9)], [night(ms, kernel="6.8") for ms in (1.2, 1.3)]
    (change,) = found(*old, *new)
    assert (change.number, change.fields) == (4, {"kernel": (DEVICE.kernel, "6.8")})
    assert (change.before_ms, change.after_ms, change.nights) == (1.0, 1.25, (3, 2))
    kept = replace(new[0], moved=change)
    assert from_table(to_table(kept)) == kept


def test_going_back_is_a_change_too_and_levels_end_where_the_next_begins():
    first, second = found(night(1.0), night(2.0, kernel="6.8"), night(2.2, kernel="6.8"), night(1.0), night(1.2))
    assert (first.number, first.before_ms, first.after_ms) == (2, 1.0, 2.1)
    assert (second.number, second.before_ms, second.after_ms, second.nights) == (4, 2.1, 1.1, (2, 2))
    assert second.fields == {"kernel": ("6.8", DEVICE.kernel)}


def test_a_night_that_measured_nothing_is_passed_over_and_the_next_tells():
    (change,) = found(night(1.0), night(None, kernel="6.8"), night(1.5, kernel="6.8"))
    assert (change.number, change.nights) == (3, (1, 1))


def test_another_baseline_or_protocol_has_no_level_before_and_lists_are_tuples():
    then = night(1.0)
    other = replace(night(1.5, kernel="6.8"), baseline=replace(then.baseline, sha256="b" * 64))
    (change,) = found(then, other)
    assert (change.before_ms, change.nights) == (None, (0, 1))
    assert found(then, replace(night(1.5, kernel="6.8"), protocol="another"))[0].before_ms is None
    assert found(then, night(1.0, providers=list(DEVICE.providers))) == []
    assert found(then, replace(night(1.0, kernel="6.8"), profile="another")) == []


def test_a_level_is_the_thirty_nights_next_to_the_change():
    (change,) = found(
        *[night(9.0)] * 40, *[night(1.0)] * 30, *[night(2.0, kernel="6.8")] * 30, *[night(9.0, kernel="6.8")] * 9
    )
    assert (change.before_ms, change.after_ms, change.nights) == (1.0, 2.0, (30, 30))
