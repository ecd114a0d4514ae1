"""Finds how much has to be pruned for a measured latency: a scan, then ever finer steps where the budget is crossed.

Latency is no monotone function of what is pruned (widths off the device's grid are slower, layers that are too narrow
are left whole), so the scan covers the whole range, and the first crossing from below is refined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

SMALLEST_STEP = 1e-3
RETRIES, STEP_BACK = 3, 0.985
"""How often a limit is tightened, and by what, where the accepting session does not find the budget kept."""
Key = TypeVar("Key")


@dataclass(frozen=True)
class Steps:
    """scan: shares that are tried first, ascending. points: of each finer session. sessions: most of these.

    slack: the unused part of the budget below which nothing finer is tried.
    """

    scan: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    points: int = 4
    sessions: int = 3
    slack: float = 0.01


class Measure(Protocol):
    """Shares, taken together in one session -> latencies relative to the dense one, infinite where it fails."""

    def __call__(self, shares: Sequence[float]) -> Sequence[float]: ...


def search(measure: Measure, limit: float, steps: Steps) -> dict[float, float]:
    """Share -> ratio of everything that was tried on the way to the least share whose ratio is at most `limit`."""
    tried = dict(zip(steps.scan, measure(steps.scan), strict=True))
    for _ in range(steps.sessions):
        ends = _bracket(tried, limit, steps.slack)
        if ends is None:
            break
        low, high = ends
        inside = [low + (high - low) * i / (steps.points + 1) for i in range(1, steps.points + 1)]
        new = [share for share in inside if share not in tried]
        tried.update(zip(new, measure(new), strict=True))
    return tried


def _bracket(tried: dict[float, float], limit: float, slack: float) -> tuple[float, float] | None:
    """Between which shares to look closer; None where that leads nowhere."""
    shares = sorted(tried)
    good = [share for share in shares if tried[share] <= limit]
    if good:
        high = good[0]
        low = max((share for share in shares if share < high), default=0.0)
        done = 1 - tried[high] / limit < slack
    else:  # the fastest one may have a faster neighbour
        at = min(range(len(shares)), key=lambda i: tried[shares[i]])
        low, high = shares[max(at - 1, 0)], shares[min(at + 1, len(shares) - 1)]
        done = math.isinf(tried[shares[at]])
    return None if done or high - low < SMALLEST_STEP else (low, high)


def accepted(
    choose: Callable[[float], Key | None], bound: Callable[[Key], float], limit: float, budget: float
) -> Key | None:
    """What is chosen for a limit and keeps the budget in a session of accepting length; tighter ones where it does not.

    choose: limit -> what keeps it in short sessions. bound: of the accepting session, NaN where that says nothing. Our
    own build gets as much from its accepting session. After RETRIES the last one chosen stands, and does not keep it.
    """
    last = None
    for attempt in range(1 + RETRIES):
        chosen = choose(limit * STEP_BACK**attempt)
        if chosen is None:
            break
        last = chosen
        if not bound(chosen) > budget:
            break
    return last


def settled(
    tried: dict[Key, float], again: Callable[[Key], float], limit: float, order: Callable[[Key], float]
) -> Key | None:
    """The first in `order` that keeps the limit when it is measured once more too, or None; corrects `tried`.

    The better of several short measurements flatters itself, so the mean of both counts.
    """
    for key in sorted((key for key, ratio in tried.items() if ratio <= limit), key=order):
        tried[key] = math.sqrt(tried[key] * again(key))
        if tried[key] <= limit:
            return key
    return None
