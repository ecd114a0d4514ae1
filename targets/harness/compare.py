"""Whether a candidate became slower than its baseline: three arms, two stages, a control, and what it could have seen.

Arms of a session: the baseline A, the baseline again A', the candidate B, in fresh processes, in turn (measurement.md,
section 4). e_i is the median over rounds of log(block of B / block of A) in process triple i, [L, U] its two one-sided
99 % t bounds over the R triples (`Session.ratio`); the same of the blocks' 10th percentiles is `Stage.low`.

- Control first: the stage says nothing where A' differs from A, or scatters, by more than is tolerated.
- Stage 1 screens: pass where U < 1 + fail, L <= 1 + warn and no tail rose. Anything else is measured again.
- Stage 2, twice the processes (`confirming`) and none of stage 1's data: fail where L > 1 + fail at the median and
  L > 1 + fail_low at the 10th percentile, or where the same tail rose in both stages; else warn where L > 1 + warn;
  else improved where U < 1 / (1 + warn); else pass where U < 1 + fail; else undecided.
- An absolute budget adds two rules, since what was not measured or does not hold is no pass. Where its percentile has
  too few inferences for a bound, stage 1 does not pass, and what does not fail is undecided after stage 2. Where the
  candidate's bound is above the limit, a pass or an improvement is a warning that says so: at once where the baseline's
  is above it too, after stage 2 where the candidate is alone there and was not shown slower in both.
- The device must be the same throughout: a stage on a device whose fingerprint is not the check's first says nothing.

A bound that excludes no change is not enough: in replays that alone gave 5.7 % false alarms, a smallest effect beside
it gave none. The smallest slowdown that a stage warns of in four of five nights is
log(1 + warn) + (t(.99, R-1) + t(.80, R-1)) sd / sqrt(R), which is log(1 + warn) + 3.9 sd / sqrt(8) at R = 8.

Every control arm is kept as a `Control` and judged as though it were a candidate: what is said of it is false, so the
tolerances are widened where that happens too often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from scipy import stats

from profiles.schema import Budget, CheckSpec
from targets.harness.device import Fingerprint
from targets.harness.measurement import CONFIDENCE, CONTAMINATED, STOPPED, Interval, Measurement, Session, Statistic

BASELINE, AGAIN, CANDIDATE = "baseline", "baseline again", "candidate"

Outcome = Literal["pass", "warn", "fail", "improved", "undecided", "inconclusive"]
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "warn": 0, "fail": 3, "improved": 0, "undecided": 4, "inconclusive": 4}

PROCESSES = 3
"""Fewer give bounds that say nothing: t(.99, 1) is 32."""
POWER = 0.80
PLAIN = 10.0
"""A mean that is slower by so many times its tolerance, at its lower bound, is plainly slower."""
MISSES = "deadline misses"
MISS_P = 1e-3
"""Largest p-value of Fisher's exact test for a rise of the deadline misses."""
FALSE_ALARMS = 0.01
"""Share of control arms that may be taken for a change before the tolerances widen."""
CONTROLS = 20
"""Fewer controls show no rate."""
SURE = 0.05
"""A recorded rate counts as above `FALSE_ALARMS` where that many alarms are less likely than this at that rate."""


@dataclass(frozen=True)
class Tail:
    """One statistic of the tail, candidate over A'. name: mean, p99, deadline misses or budget; risen: see `_tails`.

    For deadline misses the interval holds the two ratios: center of B, low of A', high the p-value of the rise. For a
    budget ("budget 8ms@p90") it is the candidate's declared percentile with its bounds over the limit; shared: whether
    candidate and baseline are both above the limit.
    """

    name: str
    interval: Interval
    risen: bool
    shared: bool = False

    @property
    def unmeasured(self) -> bool:
        """Whether there were too few inferences to bound a budget's percentile."""
        return self.name.startswith("budget") and math.isinf(self.interval.high)

    @property
    def over(self) -> bool:
        """Whether the upper bound of a budget's percentile is above the limit."""
        return self.name.startswith("budget") and 1.0 < self.interval.high < math.inf

    @property
    def alone(self) -> bool:
        """Whether the candidate is above the limit and the baseline is not."""
        return self.over and not self.shared


@dataclass(frozen=True)
class Control:
    """What the ledger keeps of one stage's control arm: bounds of log(A' / A), n processes, number of the stage.

    center, low, high: at the median; p10_*: of the blocks' 10th percentiles; mean_low, p99_low: lower bounds of the
    tails, None where there were too few samples. missed of timed: deadline misses of A' and all its inferences;
    baseline_*: those of A; None back to back, and where they were not kept yet.
    """

    center: float
    low: float
    high: float
    p10_center: float
    p10_low: float
    p10_high: float
    mean_low: float | None
    p99_low: float | None
    n: int
    stage: int = 1
    missed: int | None = None
    timed: int | None = None
    baseline_missed: int | None = None
    baseline_timed: int | None = None

    @property
    def ratio(self) -> Interval:
        """A' / A at the median; its scatter is not kept."""
        return Interval(math.exp(self.center), math.exp(self.low), math.exp(self.high), 0.0, self.n)

    @property
    def low_ratio(self) -> Interval:
        """A' / A of the blocks' 10th percentiles."""
        return Interval(math.exp(self.p10_center), math.exp(self.p10_low), math.exp(self.p10_high), 0.0, self.n)

    def to_table(self) -> dict[str, Any]:
        """Plain form, for JSON."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Control:
        """Inverse of `to_table`."""
        return cls(**table)


@dataclass(frozen=True)
class Stage:
    """What one stage showed. Ratios are candidate / baseline; control is baseline again / baseline.

    low: of the blocks' 10th percentiles. tails: those with enough samples. detectable: smallest slowdown that this
    stage would have found, as a share. spoilt: why the stage says nothing, "" where it does. again: the control arm for
    the ledger, None where something else than the control itself spoilt the stage.
    """

    number: int
    ratio: Interval
    low: Interval
    control: Interval
    tails: tuple[Tail, ...]
    detectable: float
    spoilt: str
    seconds: float
    again: Control | None = None


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


# --- one stage -----------------------------------------------------------------------------------------------------


def stage(
    session: Session,
    number: int,
    spec: CheckSpec,
    budget: Budget | None,
    seconds: float,
    first: Fingerprint | None = None,
) -> Stage:
    """What a session of the three arms shows. budget: the device's, judged where it is absolute.

    first: the fingerprint of the check's first session; under another one the stage says nothing. Raises UsageError
    where an arm is missing.
    """
    ratio, control = session.ratio(CANDIDATE, BASELINE), session.ratio(AGAIN, BASELINE)
    disturbed = _moved(first, session.fingerprint) or _disturbed(session)
    return Stage(
        number=number,
        ratio=ratio,
        low=session.low_ratio(CANDIDATE, BASELINE),
        control=control,
        tails=_tails(session, spec, budget),
        detectable=detectable(ratio, control, spec),
        spoilt=disturbed or unlike(control, spec),
        seconds=seconds,
        again=None if disturbed else _control(session, control, number),
    )


def detectable(ratio: Interval, control: Interval, spec: CheckSpec) -> float:
    """Smallest slowdown that a stage warns of in four of five nights, as a share; infinite for one process."""
    if ratio.n < 2:
        return math.inf
    sd = max(ratio.sd, control.sd)
    return math.expm1(math.log1p(spec.warn) + _reach(ratio.n) * sd / math.sqrt(ratio.n))


def noticed(slowdown: float) -> str:
    """What `detectable` means, in words: four nights of five, and a warning rather than a fail."""
    share = _percent(slowdown, 2 if slowdown < 0.01 else 1)
    return f"a slowdown of {share} would have been noticed in four nights of five"


@cache
def _reach(processes: int) -> float:
    return float(stats.t.ppf(CONFIDENCE, processes - 1) + stats.t.ppf(POWER, processes - 1))


def unlike(control: Interval, spec: CheckSpec) -> str:
    """Why the baseline is too little like itself to judge by, "" where it is not."""
    if control.low > 1.0 + spec.control or control.high < 1.0 / (1.0 + spec.control):
        return f"the baseline differs from itself: {_shift(control)}, beyond {_percent(spec.control)}"
    if control.sd > spec.control_sd:
        return f"the baseline scatters by {_percent(control.sd)} between processes, beyond {_percent(spec.control_sd)}"
    return ""


def _moved(first: Fingerprint | None, now: Fingerprint) -> str:
    """Which fields of the fingerprint changed since the check began, "" where none did."""
    told = "" if first is None else first.changes(now)
    return f"the device changed during the check: {told}" if told else ""


def _disturbed(session: Session) -> str:
    """Why the session says nothing, whatever its ratios are, "" where it does.

    A quota that stops the candidate alone, and a warm-up of the candidate alone that never became steady, are its own
    trouble: they show in its tail and in its scatter. Those of a baseline arm leave nothing to compare with.
    """
    arms = {name: session.measurement(name) for name in (BASELINE, AGAIN, CANDIDATE)}
    fewest = min(len(arm.processes) for arm in arms.values())
    if fewest < PROCESSES:
        return f"{fewest} processes of an arm were measured, bounds need {PROCESSES}"
    # a guard: no target mixes runtimes in a session, and the check gives A and A' one file
    if arms[BASELINE].sha256 != arms[AGAIN].sha256 or len({arm.runtime for arm in arms.values()}) > 1:
        return "the arms were not measured under the same runtime, or the baseline's two are not the same file"
    for name in (BASELINE, AGAIN):
        if arms[name].stopped_share > STOPPED:
            return f"a processor quota stopped the {name} in {_percent(arms[name].stopped_share)} of its blocks"
    share = max(m.flagged_share for m in session.measurements.values())
    if share > CONTAMINATED:
        return f"{_percent(share)} of the blocks of an arm were disturbed, beyond {_percent(CONTAMINATED)}"
    if session.contamination:
        return session.contamination
    for name in (BASELINE, AGAIN):
        unsteady = arms[name].unsteady
        if unsteady > CONTAMINATED * len(arms[name].processes):
            return f"{unsteady} of {len(arms[name].processes)} processes of the {name} never became steady"
    return ""


def _control(session: Session, control: Interval, number: int) -> Control:
    low = session.low_ratio(AGAIN, BASELINE)
    mean, p99 = session.ratio(AGAIN, BASELINE, "mean").low, session.ratio(AGAIN, BASELINE, "p99").low
    misses, before = (session.measurement(arm).deadline_misses or (None, None) for arm in (AGAIN, BASELINE))
    return Control(
        center=math.log(control.center),
        low=math.log(control.low),
        high=math.log(control.high),
        p10_center=math.log(low.center),
        p10_low=math.log(low.low),
        p10_high=math.log(low.high),
        mean_low=math.log(mean) if mean > 0 else None,
        p99_low=math.log(p99) if p99 > 0 else None,
        n=control.n,
        stage=number,
        missed=misses[0],
        timed=misses[1],
        baseline_missed=before[0],
        baseline_timed=before[1],
    )


# --- the tail ------------------------------------------------------------------------------------------------------


def _tails(session: Session, spec: CheckSpec, budget: Budget | None) -> tuple[Tail, ...]:
    """Every tail with enough samples. Risen: mean and p99 where the lower bound over A' is beyond the tolerance."""
    b, again = session.measurement(CANDIDATE), session.measurement(AGAIN)
    limits: tuple[tuple[Statistic, float], ...] = (("mean", spec.tail_mean), ("p99", spec.tail_p99))
    ratios = [(name, session.ratio(CANDIDATE, AGAIN, name), limit) for name, limit in limits]
    tails = [Tail(name, ratio, ratio.low > 1.0 + limit) for name, ratio, limit in ratios if ratio.low > 0.0]
    misses, before = b.deadline_misses, again.deadline_misses
    if misses is not None and before is not None:
        tails.append(_miss_tail(misses, before, spec, len(b.processes)))
    if budget is not None and budget.limit_ms is not None:
        tails.append(_budget_tail(session, b, again, budget, budget.limit_ms))
    return tuple(tails)


def _miss_tail(misses: tuple[int, int], before: tuple[int, int], spec: CheckSpec, processes: int) -> Tail:
    """Deadline misses, (missed, inferences): risen where the rise is large enough and Fisher's exact test sees it."""
    share, old = misses[0] / misses[1], before[0] / before[1]
    p = _fisher(*misses, *before)
    return Tail(MISSES, Interval(share, old, p, 0.0, processes), p < MISS_P and share - old >= spec.miss_points)


@cache
def _fisher(missed: int, timed: int, old_missed: int, old_timed: int) -> float:
    """Probability that of all misses so many, or more, fall on the first network where both miss alike."""
    table = [[missed, timed - missed], [old_missed, old_timed - old_missed]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def _budget_tail(session: Session, b: Measurement, again: Measurement, budget: Budget, limit_ms: float) -> Tail:
    """The declared percentile against an absolute budget.

    Risen where the candidate's upper bound is above the limit, the baseline's is not, and the paired ratio shows the
    candidate slower: a limit that two equal networks straddle is no fault of the candidate's, and only `over`. One that
    the baseline misses too tonight is none either, and is shared. Where one of both has no bound it is unmeasured:
    infinite.
    """
    own, old = b.statistic(budget.percentile), again.statistic(budget.percentile)
    high = own.high_ms if math.isfinite(old.high_ms) else math.inf
    over = limit_ms < high < math.inf
    risen = over and old.high_ms <= limit_ms and session.ratio(CANDIDATE, AGAIN, budget.percentile).low > 1.0
    center = own.value_ms if own.value_ms is not None else own.low_ms
    interval = Interval(center / limit_ms, own.low_ms / limit_ms, high / limit_ms, 0.0, len(b.processes))
    return Tail(f"budget {budget}", interval, risen, over and old.high_ms > limit_ms)


# --- the verdict ---------------------------------------------------------------------------------------------------


def screen(stage1: Stage, spec: CheckSpec) -> Verdict | None:
    """Pass, a warning of a budget that the baseline misses too, or inconclusive; None where stage 2 has to decide.

    Inconclusive is worth one immediate retry with another seed: measure stage 1 again and screen that.
    """
    if stage1.spoilt:
        return _inconclusive(stage1, (stage1,))
    if _clear(stage1.ratio, spec) and not any(_unsettled(tail) for tail in stage1.tails):
        outcome = _with_budget("pass", stage1.tails)
        return Verdict(outcome, _reason("pass", stage1, spec), (stage1,))
    return None


def confirming(stage1: Stage, spec: CheckSpec) -> int:
    """Processes of stage 2: twice those of stage 1 as a rule, and as many where the candidate's mean is PLAIN.

    More processes only narrow the bounds, and a candidate that is stopped again and again takes minutes for them. That
    stage 1 decides how many there are does not bias stage 2, which is judged by its own samples.
    """
    plain = any(tail.name == "mean" and tail.interval.low > 1.0 + PLAIN * spec.tail_mean for tail in stage1.tails)
    return min(spec.screen_processes, spec.confirm_processes) if plain else spec.confirm_processes


def confirm(stage1: Stage, stage2: Stage, spec: CheckSpec) -> Verdict:
    """The verdict after both stages; stage 1 only adds that a tail rose there too.

    Inconclusive where stage 2 is spoilt: measure it again, once, and confirm with that.
    """
    stages = (stage1, stage2)
    for each in stages:
        if each.spoilt:
            return _inconclusive(each, stages)
    risen = _reproduced(stage1, stage2)
    outcome = _decide(stage2.ratio, stage2.low, bool(risen), spec)
    return Verdict(_with_budget(outcome, stage2.tails), _reason(outcome, stage2, spec, risen), stages)


def _unsettled(tail: Tail) -> bool:
    """Whether a tail of stage 1 needs more samples."""
    return tail.risen or tail.unmeasured or tail.alone


def _clear(ratio: Interval, spec: CheckSpec) -> bool:
    """Whether stage 1 alone suffices: surely no failure, no sign of a warning, none of an improvement."""
    return ratio.high < 1.0 + spec.fail and ratio.low <= 1.0 + spec.warn and ratio.high >= 1.0 / (1.0 + spec.warn)


def _decide(ratio: Interval, low: Interval, tail: bool, spec: CheckSpec) -> Outcome:
    if tail or (ratio.low > 1.0 + spec.fail and low.low > 1.0 + spec.fail_low):
        return "fail"
    if ratio.low > 1.0 + spec.warn:
        return "warn"
    if ratio.high < 1.0 / (1.0 + spec.warn):
        return "improved"
    return "pass" if ratio.high < 1.0 + spec.fail else "undecided"


def _with_budget(outcome: Outcome, tails: Sequence[Tail]) -> Outcome:
    """The outcome beside a budget: what was not measured decides nothing but a fail, what does not hold warns."""
    if outcome != "fail" and any(tail.unmeasured for tail in tails):
        return "undecided"
    return "warn" if outcome in ("pass", "improved") and any(tail.over for tail in tails) else outcome


def _reproduced(stage1: Stage, stage2: Stage) -> tuple[Tail, ...]:
    """Tails of stage 2 that rose in both stages."""
    before = {tail.name for tail in stage1.tails if tail.risen}
    return tuple(tail for tail in stage2.tails if tail.risen and tail.name in before)


# --- sentences -----------------------------------------------------------------------------------------------------


def _inconclusive(spoilt: Stage, stages: tuple[Stage, ...]) -> Verdict:
    return Verdict("inconclusive", f"stage {spoilt.number} says nothing: {spoilt.spoilt}.", stages)


def _reason(outcome: Outcome, last: Stage, spec: CheckSpec, risen: Sequence[Tail] = ()) -> str:
    budget = "" if outcome == "fail" else _budget_says(last.tails)
    says = {
        "pass": f"no slowdown beyond {_percent(spec.fail)}: {_shift(last.ratio)}",
        "warn": f"slower, though not shown to fail: {_shift(last.ratio)}, beyond {_percent(spec.warn)}",
        "fail": f"slower: {_shift(last.ratio)}, beyond {_percent(spec.fail)}, {_shift(last.low, 'the fastest tenth')}",
        "improved": f"faster: {_shift(last.ratio)}; accept it as the baseline to hold it to that",
        "undecided": f"not decided: {_shift(last.ratio)} may be beyond {_percent(spec.fail)} or not",
    }[outcome]
    if risen:
        says = f"slower in both stages: {', '.join(_tail_says(tail) for tail in risen)}; {_shift(last.ratio)}"
    alone = [tail.name for tail in last.tails if tail.risen and tail not in risen]
    once = f"; {' and '.join(alone)} rose in stage {last.number} alone" if alone else ""
    few = "" if any(tail.name == "p99" for tail in last.tails) else "; too few inferences to judge p99"
    return f"{budget}{says}{once}{few}; {noticed(last.detectable)}."


def _budget_says(tails: Sequence[Tail]) -> str:
    """What a budget adds to a verdict that is no fail, "" where nothing."""
    for tail in tails:
        if tail.unmeasured:
            return f"not decided: too few inferences to bound the {tail.name}; "
        if tail.over:
            kept = "which the baseline keeps, though not shown slower in both stages"
            beside = "as is the baseline" if tail.shared else kept
            return f"over its {tail.name} (upper bound at {tail.interval.high:.4f} of it), {beside}; "
    return ""


def _percent(share: float, digits: int = 2) -> str:
    return f"{round(100.0 * share, digits):g} %"


def _shift(ratio: Interval, what: str = "latency") -> str:
    low, high = (100.0 * (bound - 1.0) for bound in (ratio.low, ratio.high))
    return f"{what} {100.0 * (ratio.center - 1.0):+.2f} % (bounds {low:+.2f} to {high:+.2f} %)"


def _tail_says(tail: Tail) -> str:
    center, low, high = tail.interval.center, tail.interval.low, tail.interval.high
    if tail.name == MISSES:
        return f"deadline misses {_percent(low)} to {_percent(center)} (p = {high:.1g})"
    if tail.name.startswith("budget"):
        return f"upper bound at {high:.3f} of the {tail.name}, which the baseline keeps"
    return f"{tail.name} {100.0 * (center - 1.0):+.0f} % (at least {100.0 * (low - 1.0):+.0f} %)"


# --- the ledger of equal networks ----------------------------------------------------------------------------------


def control_arms(*stages: Stage | None) -> tuple[Control, ...]:
    """What the ledger keeps of one check, from every stage that was measured, in order.

    A stage that its own control spoilt belongs to it, and its retry too: leaving it out would hide the very alarms that
    are counted. Stages that something else spoilt give nothing.
    """
    return tuple(each.again for each in stages if each is not None and each.again is not None)


def judge_control(stage1: Stage, stage2: Stage | None, spec: CheckSpec) -> Outcome:
    """The baseline again, judged as though it were a candidate: warn, fail and improved are false alarms.

    The control rule is left out, for it would hide every alarm. Where stage 1 alone was measured and does not clear the
    control arm, it is judged by stage 1 as though that were stage 2, which counts some alarms that a second stage would
    have taken back. Inconclusive where something else spoilt a stage.
    """
    arms = control_arms(stage1, stage2)
    return _judge_arms(arms, spec) if len(arms) == (1 if stage2 is None else 2) else "inconclusive"


def widen(controls: Iterable[tuple[Control, ...]], spec: CheckSpec) -> tuple[CheckSpec, int, float]:
    """Tolerances that past control arms bear out: (spec, false alarms under the given spec, factor of the widening).

    controls: `control_arms` of each past check; empty ones do not count, and a check with an alarm in any of its
    attempts counts as one. Nothing is widened before there are `CONTROLS`
    of them and so many alarms that a true rate of `FALSE_ALARMS` would give them in fewer than 5 of 100 ledgers. Then
    miss_points, both tail tolerances, and fail, fail_low and warn grow, each of the three by the smallest factor of its
    own, in hundredths, that brings the recorded rate to `FALSE_ALARMS`; the largest is returned. Always start from the
    profile's own spec: what was widened narrows again as better nights are recorded.
    """
    past = [arms for arms in controls if arms]
    alarms, allowed = sum(_alarm(arms, spec) for arms in past), int(FALSE_ALARMS * len(past))
    if len(past) < CONTROLS or float(stats.binom.sf(alarms - 1, len(past), FALSE_ALARMS)) >= SURE:
        return spec, alarms, 1.0

    def kept(wider: CheckSpec, alarm: Callable[[tuple[Control, ...], CheckSpec], bool]) -> bool:
        return sum(alarm(arms, wider) for arms in past) <= allowed

    misses = _smallest(lambda factor: kept(_scaled(spec, 1.0, 1.0, factor), _miss_alarm))
    tail = _smallest(lambda factor: kept(_scaled(spec, 1.0, factor, misses), _tail_alarm))
    body = _smallest(lambda factor: kept(_scaled(spec, factor, tail, misses), _alarm))
    return _scaled(spec, body, tail, misses), alarms, max(body, tail, misses)


def _judge_arms(arms: tuple[Control, ...], spec: CheckSpec) -> Outcome:
    if _clear(arms[0].ratio, spec) and not _risen(arms[0], spec):
        return "pass"
    outcome = _decide(arms[-1].ratio, arms[-1].low_ratio, bool(_rose(arms, spec)), spec)
    return "undecided" if outcome == "pass" and len(arms) == 1 else outcome


def _attempts(arms: tuple[Control, ...]) -> list[tuple[Control, ...]]:
    """A check's control arms as the pairs (stage 1, stage 2) or the single stages that could have given a verdict."""
    attempts: list[tuple[Control, ...]] = []
    for arm in arms:
        if arm.stage == 1:
            attempts.append((arm,))
        elif attempts and len(attempts[-1]) == 1:
            attempts[-1] = (*attempts[-1], arm)
        elif attempts:
            attempts.append((attempts[-1][0], arm))
    return attempts


def _alarm(arms: tuple[Control, ...], spec: CheckSpec) -> bool:
    return any(_judge_arms(attempt, spec) in ("warn", "fail", "improved") for attempt in _attempts(arms))


def _miss_alarm(arms: tuple[Control, ...], spec: CheckSpec) -> bool:
    return any(MISSES in _rose(attempt, spec) for attempt in _attempts(arms))


def _tail_alarm(arms: tuple[Control, ...], spec: CheckSpec) -> bool:
    return any(_rose(attempt, spec) for attempt in _attempts(arms))


def _rose(arms: tuple[Control, ...], spec: CheckSpec) -> frozenset[str]:
    """Tails that rose in both stages; one stage alone reproduces nothing."""
    return _risen(arms[0], spec) & _risen(arms[1], spec) if len(arms) > 1 else frozenset()


def _risen(arm: Control, spec: CheckSpec) -> frozenset[str]:
    bounds = {"mean": (arm.mean_low, spec.tail_mean), "p99": (arm.p99_low, spec.tail_p99)}
    found = {name for name, (low, limit) in bounds.items() if low is not None and low > math.log1p(limit)}
    if arm.missed is not None and arm.timed and arm.baseline_missed is not None and arm.baseline_timed:
        misses, before = (arm.missed, arm.timed), (arm.baseline_missed, arm.baseline_timed)
        found |= {MISSES} if _miss_tail(misses, before, spec, arm.n).risen else set()
    return frozenset(found)


def _scaled(spec: CheckSpec, body: float, tail: float, misses: float) -> CheckSpec:
    wider = {name: body * float(getattr(spec, name)) for name in ("fail", "fail_low", "warn")}
    wider |= {name: tail * float(getattr(spec, name)) for name in ("tail_mean", "tail_p99")}
    wider["miss_points"] = misses * spec.miss_points
    return spec.model_copy(update=wider)


def _smallest(enough: Callable[[float], bool]) -> float:
    """Smallest factor from 1 on, in hundredths, that is enough; what is enough stays so for larger ones."""
    low, high = 99, 100
    while not enough(high / 100.0):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle / 100.0) else (middle, high)
    return high / 100.0
