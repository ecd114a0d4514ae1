"""The nightly check on one page: baseline, baseline again and candidate measured in turn, judged, explained and kept.

    pins → artifacts → stage 1 → (stage 2) → verdict → where → record

Only artifacts are pinned and only ratios of one session are judged; the times of the night go into the series, which
say what a ratio cannot see. A check that was not measured is an error or inconclusive, never a pass.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache import Cache
from pipeline.nightly import baseline
from pipeline.nightly.changes import changes
from pipeline.nightly.history import Nights
from pipeline.nouns import Change, CheckRecord, LayerMove, Ledger, Pin
from profiles.errors import UndecidedError
from profiles.schema import Budget, CheckSpec, Profile
from targets.base import Target
from targets.harness.compare import (
    AGAIN,
    BASELINE,
    CANDIDATE,
    Stage,
    Verdict,
    confirm,
    control_arms,
    screen,
    stage,
)
from targets.harness.measurement import Session, Statistic

STATISTICS: tuple[Statistic, ...] = ("p50", "mean", "p90", "p99")
WATCHED: tuple[Statistic, ...] = ("p50", "p99")
"""Statistics of the baseline whose nights are searched for change points."""
MOVED = ("warn", "fail", "improved")
"""Verdicts after which the layers are looked at."""
SEEDS_A_CHECK = 16
COUNTS = re.compile(r" \d+x\d+ blocks of [\d+,]+")
"""The part of a protocol that says how much was measured, not how."""

Progress = Callable[[float], None]


@dataclass(frozen=True)
class CheckRequest:
    """What is asked. candidate: a run, bundle or ONNX file, None for the newest run that met its budget.

    state: the `.deploy` folder; runs: where runs lie; layers: whether to say where a change lies.
    """

    profile: Profile
    candidate: Path | None
    state: Path
    runs: Path
    layers: bool = True


@dataclass(frozen=True)
class CheckResult:
    """A finished check, its raw sessions and its number in the store."""

    record: CheckRecord
    sessions: tuple[Session, ...]
    number: int


def check(request: CheckRequest, target: Target, progress: Callable[[str], Progress] | None = None) -> CheckResult:
    """Measure, judge and keep one check.

    progress: gives a bar for a step's name. Raises UndecidedError without a baseline, on another device, and for what
    makes measuring meaningless; DeployError for what cannot be run.
    """
    profile = request.profile
    pins = _pins(request)
    fingerprint = target.fingerprint()
    changed, other = baseline.environment(pins[0][0], fingerprint)
    if other is not None:
        raise UndecidedError(other, f"deploy baseline accept RUN --target {profile.name}, on this device")
    with Cache(request.state).in_use(), Nights(request.state / "nights.sqlite") as nights:
        spec, ledger = nights.ledger(profile.name, fingerprint.digest(), profile.check)
        seed = profile.measure.seed + SEEDS_A_CHECK * (1 + max(nights.numbered(limit=1), default=0))
        with tempfile.TemporaryDirectory(prefix="check-", dir=_scratch(request.state)) as folder:
            measuring = Measuring(target, profile, spec, _artifacts(target, pins, Path(folder)), seed, progress)
            verdict = measuring.verdict()
            layers = _layers(measuring) if request.layers and verdict.outcome in MOVED else ()
        record = _record(request, pins, measuring, verdict, layers, changed, ledger, nights)
        number = nights.add(record, measuring.sessions, control_arms(*measuring.stages))
    return CheckResult(record, tuple(measuring.sessions), number)


# --- what is compared ----------------------------------------------------------------------------------------------


def _pins(request: CheckRequest) -> tuple[tuple[Pin, Path], tuple[Pin, Path]]:
    """The baseline and the candidate, each with its file; without a newer run the baseline is compared with itself."""
    name = request.profile.name
    pin = baseline.baseline_of(request.state, name)
    if pin is None:
        hint = f"deploy baseline accept RUN --target {name}"
        raise UndecidedError(f"profile '{name}' has no baseline, so there is nothing to compare with.", hint)
    pinned = (pin, baseline.artifact_of(request.state, pin))
    if request.candidate is not None:
        return pinned, baseline.from_run(request.candidate)
    return pinned, baseline.newest(request.runs, name) or pinned


def _artifacts(target: Target, pins: tuple[tuple[Pin, Path], tuple[Pin, Path]], folder: Path) -> dict[str, Path]:
    """The three arms as the device runs them. The same network is built once, whatever its name."""
    built: dict[str, Path] = {}
    for pin, path in pins:
        if pin.sha256 not in built:
            built[pin.sha256] = target.build(path, folder / f"{pin.sha256[:16]}.artifact")
    one, two = (built[pin.sha256] for pin, _ in pins)
    return {BASELINE: one, AGAIN: one, CANDIDATE: two}


def _scratch(state: Path) -> Path:
    area = state / "scratch"
    area.mkdir(parents=True, exist_ok=True)
    return area


# --- measuring -----------------------------------------------------------------------------------------------------


class Measuring:
    """The stages of one check. sessions, stages: everything measured so far, what says nothing included, in order."""

    def __init__(
        self,
        target: Target,
        profile: Profile,
        spec: CheckSpec,
        artifacts: Mapping[str, Path],
        seed: int,
        progress: Callable[[str], Progress] | None = None,
    ) -> None:
        self.target, self.profile, self.spec = target, profile, spec
        self.artifacts, self.seed, self.progress = artifacts, seed, progress
        self.sessions: list[Session] = []
        self.stages: list[Stage] = []
        self.begun = time.monotonic()

    @property
    def budget(self) -> Budget | None:
        """The profile's budget."""
        return self.profile.budget

    @property
    def seconds(self) -> float:
        """Since the check began."""
        return time.monotonic() - self.begun

    def verdict(self) -> Verdict:
        """Stage 1, and stage 2 where stage 1 does not suffice. A stage that says nothing is measured once more."""
        first = self._stage(1, self.spec.screen_processes)
        early = screen(first, self.spec)
        if early is not None:
            return early
        return confirm(first, self._stage(2, self.spec.confirm_processes), self.spec)

    def _stage(self, number: int, processes: int) -> Stage:
        taken = self._once(number, processes)
        return self._once(number, processes) if taken.spoilt else taken

    def _once(self, number: int, processes: int) -> Stage:
        begun = time.monotonic()
        asked = self.spec.session(self.profile.measure, processes, self.seed + len(self.sessions))
        bar = self.progress(f"stage {number}") if self.progress else None
        session = self.target.measure(self.artifacts, asked, "accept", bar)
        self.sessions.append(session)
        taken = stage(session, number, self.spec, self.budget, time.monotonic() - begun)
        self.stages.append(taken)
        return taken


# --- explaining ----------------------------------------------------------------------------------------------------


def _layers(measuring: Measuring) -> tuple[LayerMove, ...]:
    """Each layer's time in the baseline and in the candidate, those that moved most first."""
    arms = {name: measuring.artifacts[name] for name in (BASELINE, CANDIDATE)}
    times = measuring.target.layers(arms, measuring.profile.measure)
    before, now = ({layer.name: layer for layer in times[name]} for name in (BASELINE, CANDIDATE))
    moves = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        op = new.op if new else old.op if old else ""
        moves.append(LayerMove(name, op, old.ms if old else 0.0, new.ms if new else 0.0))
    return tuple(sorted(moves, key=lambda move: -abs(move.candidate_ms - move.baseline_ms)))


def _record(
    request: CheckRequest,
    pins: tuple[tuple[Pin, Path], tuple[Pin, Path]],
    measuring: Measuring,
    verdict: Verdict,
    layers: tuple[LayerMove, ...],
    changed: Mapping[str, tuple[object, object]],
    ledger: Ledger,
    nights: Nights,
) -> CheckRecord:
    first, last = measuring.sessions[0], measuring.sessions[-1]
    spoilt = {c.name: f"{c.name} was {c.value}; {c.why}." for s in measuring.sessions for c in s.preflight.spoilt}
    arms = {arm: last.measurement(arm) for arm in measuring.artifacts}
    profile = request.profile
    return CheckRecord(
        started=first.started,
        profile=profile.name,
        device=first.fingerprint.digest(),
        baseline=pins[0][0],
        candidate=pins[1][0],
        verdict=verdict,
        absolute={arm: {s: taken.statistic(s).value_ms for s in STATISTICS} for arm, taken in arms.items()},
        changed=changed,
        conditions=tuple(spoilt.values()),
        layers=layers,
        ledger=ledger,
        changes=_changes(profile.name, pins[0][0], nights),
        spec=measuring.spec,
        protocol=COUNTS.sub("", first.protocol),
        seconds=measuring.seconds,
    )


def _changes(profile: str, pin: Pin, nights: Nights) -> tuple[Change, ...]:
    """Change points of the baseline's own times over the nights before this one, whatever else changed meanwhile."""
    return tuple(c for s in WATCHED for c in changes(nights.series(profile, None, pin.sha256, s)))
