"""Whether a candidate became slower than its baseline: three arms, two stages, a control, and what it could have seen.

Arms of a session: the baseline A, the baseline again A', the candidate B, in fresh processes, in turn (measurement.md,
section 4). All bounds are one-sided 99 % t bounds over processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from targets.harness.measurement import Interval

BASELINE, AGAIN, CANDIDATE = "baseline", "baseline again", "candidate"

Outcome = Literal["pass", "warn", "fail", "improved", "undecided", "inconclusive"]
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "warn": 0, "fail": 3, "improved": 0, "undecided": 4, "inconclusive": 4}


@dataclass(frozen=True)
class Tail:
    """One statistic of the tail, candidate over A'. name: mean, p99 or deadline misses; risen: beyond its tolerance.

    For deadline misses the interval holds the two ratios: center of B, low of A', high the p-value of the rise.
    """

    name: str
    interval: Interval
    risen: bool


@dataclass(frozen=True)
class Stage:
    """What one stage showed. Ratios are candidate / baseline; control is baseline again / baseline.

    low: of the blocks' 10th percentiles. detectable: smallest slowdown that this stage would have found, as a share.
    spoilt: why the stage says nothing, "" where it does.
    """

    number: int
    ratio: Interval
    low: Interval
    control: Interval
    tails: tuple[Tail, ...]
    detectable: float
    spoilt: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What the check says. reason: one sentence with the numbers; stages: in the order they were measured."""

    outcome: Outcome
    reason: str
    stages: tuple[Stage, ...]

    @property
    def exit_code(self) -> int:
        """0, 3 for a fail, 4 where nothing can be said."""
        return EXIT_CODES[self.outcome]
