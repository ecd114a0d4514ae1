"""How numbers are written in reports: few digits, a unit, and an honest dash for what was not measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipeline.report.data import Agreement, Interval
from targets.harness import measurement

NONE = "not measured"


def ms(value: float | None) -> str:
    """Milliseconds with three to four digits: `0.396 ms`, `12.4 ms`."""
    return NONE if value is None else f"{_digits(value)} ms"


def bounds(interval: Interval | None, unit: str = "ms") -> str:
    """An interval: `0.393 to 0.399 ms`, `0.485 to 0.492x`; a bound that does not exist is said so."""
    if interval is None:
        return NONE
    low, high = interval
    end = "no upper bound" if high == float("inf") else _digits(high)
    return f"{_digits(low)} to {end}{unit if unit == 'x' else f' {unit}'}"


def ratio(value: float | None) -> str:
    """A latency ratio: `0.488x`."""
    return NONE if value is None else f"{value:.3f}x"


def interval(value: measurement.Interval) -> str:
    """A ratio with its bounds and the digits that a check needs: `1.0153 [1.0101, 1.0210]`."""
    if not math.isfinite(value.center):
        return NONE
    ends = (f"{end:.4f}" if math.isfinite(end) and end > 0 else "no bound" for end in (value.low, value.high))
    return f"{value.center:.4f} [{', '.join(ends)}]"


def share(value: float | None) -> str:
    """A share in percent: `1.1 %`, `0.05 %`."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{100 * value:.2f} %" if abs(value) < 0.01 else f"{100 * value:.1f} %"


def fine_ms(value: float) -> str:
    """Milliseconds of a part of a network, four decimals."""
    return f"{value:.4f} ms"


def signed_ms(value: float) -> str:
    """A difference of such times with its sign."""
    return f"{'−' if value < 0 else '+'}{abs(value):.4f} ms"


def utc(moment: str) -> str:
    """A time of day in ISO 8601 as `2026-11-21 03:00 UTC`; what is no such time stays as it is."""
    try:
        seen = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    seen = seen.astimezone(UTC) if seen.tzinfo else seen
    return f"{seen:%Y-%m-%d %H:%M} UTC"


def strict(value: Any) -> Any:
    """Plain data that any JSON reader takes: a number that is not finite becomes None, a tuple a list."""
    if isinstance(value, Mapping):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(each) for each in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def score(value: float | None) -> str:
    """A value of the project's own metric, four digits."""
    return NONE if value is None else f"{value:.4g}"


def agreement(value: Agreement) -> str:
    """How far outputs agree, said as what it is: `R² 0.931 on 256 noise samples, equal argmax on 91.4 % (…)`."""
    told = f"R² {value.r2:.3f} on {value.samples} {'noise samples' if value.on == 'noise' else value.on}"
    if value.argmax is None:
        return told
    return f"{told}, equal argmax on {share(value.argmax)} (one class always: {share(value.constant)})"


def change(before: float | None, after: float | None) -> str:
    """Relative change in percent with its sign: `−55.6 %`."""
    if before is None or after is None or before == 0:
        return ""
    share = 100.0 * (after - before) / before
    return f"{'−' if share < 0 else '+'}{abs(share):.1f} %"


def difference(before: float | None, after: float | None) -> str:
    """Absolute change with its sign, in the unit of the numbers."""
    if before is None or after is None:
        return ""
    step = after - before
    return f"{'−' if step < 0 else '+'}{abs(step):.4g}"


def count(value: float) -> str:
    """A large count: `482`, `121.0 k`, `40.6 M`, `1.82 G`."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {suffix}" if value / size < 100 else f"{value / size:.0f} {suffix}"
    return f"{value:.0f}"


def seconds(value: float) -> str:
    """A duration: `0.6 s`, `2 min 23 s`."""
    if value < 99.5:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s"


def fact(value: str) -> str:
    """A condition or setting as people read it: hashes shortened, Python's own words translated."""
    words = {"": "–", "None": "none", "True": "yes", "False": "no"}
    return f"{value[:12]}…" if re.fullmatch(r"[0-9a-f]{40,}", value) else words.get(value, value)


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"
