"""Networks measured in turn with the dense one: ratios with 99 % bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from profiles.schema import MeasureSpec
from targets.base import Target
from targets.harness.measurement import Session

DENSE, AGAIN, PRUNED = "dense", "dense-again", "pruned"
TRIES = 3


class Timed(NamedTuple):
    """Latency relative to the dense network of the same session, with 99 % bounds."""

    ratio: float
    low: float
    high: float


class Sitting(NamedTuple):
    """One session: name -> latency, whether too much disturbed it, and when it ended (UTC, ISO 8601)."""

    times: dict[str, Timed]
    contaminated: bool
    ended: str


def sit(
    target: Target, dense: Path, files: Mapping[str, Path], spec: MeasureSpec, mode: Literal["rank", "accept"]
) -> Sitting:
    """Measure the files beside the dense network, which stands in the session twice: both are the reference.

    A contaminated session is taken again, up to three times in all; the last one stands and says so.
    """
    artifacts = {DENSE: dense, AGAIN: dense, **files}
    built = {name: path.with_suffix(".artifact") for name, path in artifacts.items()}
    target.build_each({path: built[name] for name, path in artifacts.items()})
    for _ in range(TRIES):
        session = target.measure(built, spec, mode)
        if not session.contaminated:
            break
    return Sitting({name: timed(session, name) for name in files}, session.contaminated, session.ended)


def accept(target: Target, dense: Path, file: Path, spec: MeasureSpec, budget: float) -> tuple[Sitting, int]:
    """One network in a session that decides, and how many it took: a second one where the bounds enclose the budget."""
    built = {name: path.with_suffix(".artifact") for name, path in ((DENSE, dense), (AGAIN, dense), (PRUNED, file))}
    target.build_each({dense: built[DENSE], file: built[PRUNED]})
    session, count = target.measure(built, spec, "accept"), 1
    found = timed(session, PRUNED)
    if session.contaminated or found.low <= budget < found.high:
        more, count = target.measure(built, spec, "accept"), 2
        if not more.contaminated:
            session = more if session.contaminated else session.joined(more)
    return Sitting({PRUNED: timed(session, PRUNED)}, session.contaminated, session.ended), count


def timed(session: Session, name: str) -> Timed:
    """A network's latency over that of the dense one: the geometric mean of both references, the wider bounds."""
    one, two = session.ratio(name, DENSE), session.ratio(name, AGAIN)
    return Timed(math.sqrt(one.center * two.center), min(one.low, two.low), max(one.high, two.high))
