"""The nightly check on one page: baseline, baseline again and candidate measured in turn, judged, explained and kept.

    pins → artifacts → stage 1 → (stage 2) → verdict → where → record

Only artifacts are pinned and only ratios of one session are judged; the times of the night go into the series, which
say what a ratio cannot see. A check that was not measured is an error or inconclusive, never a pass. From the moment
that its baseline is found a check is kept however it ends, with everything that was measured until then.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.cache import Cache, disk_full, named, write_atomic
from pipeline.nightly import baseline
from pipeline.nightly.history import Nights
from pipeline.nightly.levels import CONTEXT, device_changes
from pipeline.nightly.records import to_table
from pipeline.nouns import CheckRecord, LayerMove, Ledger, Pin
from pipeline.run import Interrupted
from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import Budget, CheckSpec, Profile
from targets.base import Target
from targets.harness.compare import (
    AGAIN,
    BASELINE,
    CANDIDATE,
    Stage,
    Verdict,
    confirm,
    confirming,
    control_arms,
    screen,
    stage,
)
from targets.harness.device import Fingerprint
from targets.harness.measurement import STATISTICS, Session

MOVED = ("warn", "fail", "improved")
"""Verdicts after which the layers are looked at."""
SEEDS_A_CHECK = 16
COUNTS = re.compile(r" \d+x\d+ blocks of [\d+,]+")
"""The part of a protocol that says how much was measured, not how."""
log = logging.getLogger(__name__)

Progress = Callable[[float], None]


@dataclass(frozen=True)
class CheckRequest:
    """What is asked. candidate: a run, bundle or ONNX file, None for the newest run that met its budget.

    state: the `.deploy` folder; runs: where runs lie; layers: whether to say where a change lies; target: what hints
    call the device, a profile's name or its file, the profile's name where left out; spare: folders for what the store
    in `state` refuses, before the temporary one.
    """

    profile: Profile
    candidate: Path | None
    state: Path
    runs: Path
    layers: bool = True
    target: str = ""
    spare: tuple[Path, ...] = ()

    @property
    def named(self) -> str:
        """What follows `--target` in a hint."""
        return self.target or self.profile.name


@dataclass(frozen=True)
class CheckResult:
    """A finished check, its raw sessions and its number in the store, None where it could not be kept.

    error: what went wrong once the verdict stood, which it does not change: a store that could not be written, or an
    interruption. It decides the exit code.
    """

    record: CheckRecord
    sessions: tuple[Session, ...]
    number: int | None
    error: DeployError | None = None

    @property
    def exit_code(self) -> int:
        """That of the verdict, or of what went wrong after it."""
        return self.error.exit_code if self.error else self.record.verdict.exit_code


def check(request: CheckRequest, target: Target, progress: Callable[[str], Progress] | None = None) -> CheckResult:
    """Measure, judge and keep one check.

    progress: gives a bar for a step's name. Raises UndecidedError on a device that nothing can be timed on, without a
    baseline, on another device, for a network
    of other shapes, and for what makes measuring meaningless; DeployError for what cannot be run; Interrupted. What is
    raised after the baseline was found, save a mistake in what was asked, is kept as an inconclusive check.
    """
    name = request.profile.name
    target.require_latency()
    pin = baseline.baseline_of(request.state, name)
    if pin is None:
        message = f"profile '{name}' has no baseline, so there is nothing to compare with."
        raise UndecidedError(message, baseline.accept_with(request.named))
    with Cache(request.state).in_use(), Nights(request.state / "nights.sqlite") as nights:
        night = _Night(request, nights, pin)
        try:
            verdict = night.judged(target, progress)
        except BaseException as error:
            if isinstance(error, UsageError) and night.measuring is None:
                raise
            kept = night.broken_off(error)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"interrupted; {kept}.", "deploy history") from error
            if isinstance(error, OSError) and (full := disk_full(error, Path(str(error.filename or request.state)))):
                raise full from error
            raise
        return night.kept(verdict)


# --- one night -----------------------------------------------------------------------------------------------------


class _Night:
    """What is known of one check so far, so that it can be kept whatever happens next."""

    def __init__(self, request: CheckRequest, nights: Nights, pin: Pin) -> None:
        asked = request.candidate
        self.request, self.nights = request, nights
        self.pins = (pin, Pin(asked.name if asked else "not known", "", str(asked or request.runs)))
        self.started, self.begun = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
        self.fingerprint: Fingerprint | None = None
        self.changed: Mapping[str, tuple[Any, Any]] = {}
        self.spec, self.ledger = request.profile.check, Ledger(0, 0, 1.0)
        self.measuring: Measuring | None = None
        self.verdict: Verdict | None = None
        self.layers: tuple[LayerMove, ...] = ()
        self.notes: list[str] = []
        self.error: DeployError | None = None

    def judged(self, target: Target, progress: Callable[[str], Progress] | None) -> Verdict:
        """The verdict, and the layers where it says that something moved."""
        request, profile = self.request, self.request.profile
        self.fingerprint = target.fingerprint()
        self.changed, other = baseline.environment(self.pins[0], self.fingerprint)
        if other is not None:
            raise UndecidedError(other, f"{baseline.accept_with(request.named)}, on this device")
        then, here = self.pins[0].profile, baseline.profile_file(request.target)
        if then and here and then != here:
            self.notes.append(f"the baseline was accepted with the profile '{then}', and this one is '{here}'.")
        paths = self._networks()
        self.spec, self.ledger = self.nights.ledger(profile.name, baseline.machine_of(self.fingerprint), profile.check)
        seed = profile.measure.seed + SEEDS_A_CHECK * (1 + self.nights.newest())
        with tempfile.TemporaryDirectory(prefix="check-", dir=_scratch(request.state)) as folder:
            with named({BASELINE: paths[0]}):
                bar = progress("build") if progress else None
                built = _artifacts(target, self.pins, paths, Path(folder), bar)
            budget = budget_of(profile, *self.pins)
            self.measuring = Measuring(target, profile, self.spec, built, seed, progress, budget)
            self.verdict = self.measuring.verdict()
            if request.layers and self.verdict.outcome in MOVED:
                self._look(self.measuring)
        return self.verdict

    def _networks(self) -> tuple[Path, Path]:
        """Files of the baseline and of the candidate; without a newer run the baseline is compared with itself."""
        request, pin = self.request, self.pins[0]
        path = baseline.artifact_of(request.state, pin, request.named)
        pinned = (baseline.described(pin, path), path)
        if request.candidate is not None:
            found = baseline.from_run(request.candidate)
        else:
            found = baseline.newest(request.runs, request.profile.name, pin) or pinned
        self.pins = (pinned[0], found[0])
        if refused := baseline.unlike(*self.pins):
            raise UndecidedError(refused, f"--candidate RUN of the same task, or {baseline.accept_with(request.named)}")
        return path, found[1]

    def _look(self, measuring: Measuring) -> None:
        """Where the change lies; what goes wrong there takes nothing from the verdict."""
        try:
            self.layers = _layers(measuring)
        except (DeployError, OSError) as error:
            self.notes.append(f"the layers were not looked at: {_said(error)}")
        except KeyboardInterrupt:
            self.notes.append("the layers were not looked at: interrupted.")
            self.error = Interrupted("interrupted while the layers were looked at; the verdict stands.")

    def kept(self, verdict: Verdict) -> CheckResult:
        """The check in the store, tonight's change points with it; a store that cannot be written hides no verdict."""
        record, number, error = self._record(verdict), None, self.error
        sessions, stages = self._measured()
        try:
            number = self.nights.add(record, sessions, control_arms(*stages))
            found = device_changes(self.nights.numbered(record.profile, CONTEXT))
            moved = next((each for each in found if each.number == number), None)
            changes = self.nights.changes(record.profile, record.baseline.sha256)
            record = replace(record, changes=changes, moved=moved)
            self.nights.amend(number, record)
        except (DeployError, OSError, sqlite3.Error) as full:
            hint = full.hint if isinstance(full, DeployError) else ""
            aside = "" if number is not None else self._aside(record, sessions)
            what = self._stands() if number is None else f"check {number} is kept, but what past nights say beside it"
            error = error or DeployError(f"{what} could not be kept: {_said(full)}{aside}", hint)
        return CheckResult(record, sessions, number, error)

    def _stands(self) -> str:
        """What the store would have got, as the beginning of a sentence."""
        if self.verdict is not None:
            return "the verdict stands, but it"
        return "what was measured" if self._measured()[0] else "the record of this check"

    def _aside(self, record: CheckRecord, sessions: tuple[Session, ...]) -> str:
        """Write what the store refused into another folder, and say in a sentence where it is; "" without samples."""
        if not sessions:
            return ""
        raw = ",".join(session.to_json() for session in sessions)
        text = f'{{"version":1,"record":{json.dumps(to_table(record), allow_nan=False)},"sessions":[{raw}]}}\n'
        name = f"check-{quote(record.profile, safe='')}-{re.sub('[^0-9]', '', record.started[:19])}-{os.getpid()}.json"
        for folder in (*self.request.spare, None):
            try:
                path = (folder or Path(tempfile.gettempdir())).resolve() / name
                write_atomic(path, text.encode())
            except (DeployError, OSError):
                continue
            return f" Its record and raw samples are in '{path}'."
        return " Its raw samples are lost: no other folder could be written either."

    def broken_off(self, error: BaseException) -> str:
        """Keep what there is of a check that ends with an error, and say in words whether that could be done."""
        verdict = self.verdict or Verdict("inconclusive", _said(error), self._measured()[1])
        result = self.kept(verdict)
        if result.number is not None:
            return f"what was measured is kept as check {result.number}"
        if result.error is not None:
            log.warning("%s", result.error.message)
        return "what was measured could not be kept" if result.sessions else "nothing was measured"

    def _measured(self) -> tuple[tuple[Session, ...], tuple[Stage, ...]]:
        own = self.measuring
        return (tuple(own.sessions), tuple(own.stages)) if own else ((), ())

    def _record(self, verdict: Verdict) -> CheckRecord:
        sessions, _ = self._measured()
        seen = sessions[0].fingerprint if sessions else self.fingerprint
        arms = sessions[-1].measurements if sessions else {}
        return CheckRecord(
            started=sessions[0].started if sessions else self.started,
            profile=self.request.profile.name,
            device=seen.digest() if seen else "",
            baseline=self.pins[0],
            candidate=self.pins[1],
            verdict=verdict,
            absolute={arm: {s: taken.statistic(s).value_ms for s in STATISTICS} for arm, taken in arms.items()},
            changed=self.changed,
            conditions=(*_conditions(sessions), *self.notes),
            layers=self.layers,
            ledger=self.ledger,
            changes=(),
            spec=self.spec,
            protocol=COUNTS.sub("", sessions[0].protocol) if sessions else "",
            seconds=time.monotonic() - self.begun,
            machine=baseline.machine_of(seen) if seen else "",
            simulated=seen.simulated if seen else False,
        )


def _said(error: BaseException) -> str:
    if isinstance(error, DeployError):
        return error.message
    return "interrupted." if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}."


def _conditions(sessions: tuple[Session, ...]) -> list[str]:
    """What was not in order before a session, each once, and which arms never became steady, as sentences."""
    spoilt = {c.name: f"{c.name} was {c.value}; {c.why}." for s in sessions for c in s.preflight.spoilt}
    told = list(spoilt.values())
    for number, session in enumerate(sessions, start=1):
        for arm, taken in session.measurements.items():
            if not taken.steady:
                shaky = f"{taken.unsteady} of {len(taken.processes)} processes of the {arm}"
                told.append(f"UNSTABLE: {shaky} never became steady in session {number}.")
    return told


# --- what is compared ----------------------------------------------------------------------------------------------


def budget_of(profile: Profile, pin: Pin, candidate: Pin) -> Budget | None:
    """What the candidate is held to: the profile's absolute budget, else the one it was built for, else the baseline's.

    A relative budget speaks of a dense network that is not here, so it is nobody's to judge.
    """
    told = [profile.budget, *(Budget.parse(each.budget) for each in (candidate, pin) if each.budget)]
    return next((budget for budget in told if budget is not None and budget.limit_ms is not None), None)


def _artifacts(
    target: Target, pins: tuple[Pin, Pin], paths: tuple[Path, Path], folder: Path, progress: Progress | None
) -> dict[str, Path]:
    """The three arms as the device runs them. The same network is built once, whatever its name."""
    places = {pin.sha256: folder / f"{pin.sha256[:16]}.artifact" for pin in pins}
    files = {pin.sha256: path for pin, path in zip(pins, paths, strict=True)}
    target.build_each({path: places[sha256] for sha256, path in files.items()}, progress)
    one, two = (places[pin.sha256] for pin in pins)
    return {BASELINE: one, AGAIN: one, CANDIDATE: two}


def _scratch(state: Path) -> Path:
    area = state / "scratch"
    area.mkdir(parents=True, exist_ok=True)
    return area


# --- measuring -----------------------------------------------------------------------------------------------------


class Measuring:
    """The stages of one check. sessions, stages: everything measured so far, what says nothing included, in order.

    budget: what the candidate is held to, where the profile has no absolute one.
    """

    def __init__(
        self,
        target: Target,
        profile: Profile,
        spec: CheckSpec,
        artifacts: Mapping[str, Path],
        seed: int,
        progress: Callable[[str], Progress] | None = None,
        budget: Budget | None = None,
    ) -> None:
        self.target, self.profile, self.spec = target, profile, spec
        self.artifacts, self.seed, self.progress = artifacts, seed, progress
        self.sessions: list[Session] = []
        self.stages: list[Stage] = []
        self.begun = time.monotonic()
        self.budget = budget if budget is not None else profile.budget

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
        return confirm(first, self._stage(2, confirming(first, self.spec)), self.spec)

    def _stage(self, number: int, processes: int) -> Stage:
        taken = self._once(number, processes)
        return self._once(number, processes) if taken.spoilt else taken

    def _once(self, number: int, processes: int) -> Stage:
        begun = time.monotonic()
        asked = self.spec.session(self.profile.measure, processes, self.seed + len(self.sessions))
        bar = self.progress(f"stage {number}") if self.progress else None
        with named(self.artifacts):
            session = self.target.measure(self.artifacts, asked, "accept", bar)
        self.sessions.append(session)
        first = self.sessions[0].fingerprint
        taken = stage(session, number, self.spec, self.budget, time.monotonic() - begun, first)
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
