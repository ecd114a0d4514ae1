"""Whether equal networks pass and slower ones do not: on devices of known truth, and rule by rule."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simulated_nights as nights
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from simulated_nights import BUSY, DEVICES, QUIET, SPEC

from profiles.schema import Budget
from targets.harness.compare import (
    AGAIN,
    BASELINE,
    CANDIDATE,
    EXIT_CODES,
    Control,
    Stage,
    Tail,
    confirm,
    confirming,
    control_arms,
    judge_control,
    screen,
    stage,
    widen,
)
from targets.harness.measurement import Interval, Warmup

RULES_FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "rules.py"
ORDER = ("improved", "pass", "undecided", "warn", "fail")


def peers():
    """The rules of others by name, from benchmarks/rules.py."""
    spec = importlib.util.spec_from_file_location("peers_rules", RULES_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RULES


def interval(center, half=0.002, sd=0.002, n=8):
    return Interval(1 + center, 1 + center - half, 1 + center + half, sd, n)


def shown(center=0.0, half=0.002, low=None, number=1, tails=(), spoilt="", again=None):
    """A stage whose candidate is 1 + center of the baseline."""
    ratio = interval(center, half)
    at_p10 = interval(center if low is None else low, half)
    return Stage(number, ratio, at_p10, interval(0.0), tails, 0.011, spoilt, 20.0, again)


def risen(name="mean"):
    return Tail(name, Interval(1.5, 1.3, 1.7, 0.1, 8), True)


def control(center=0.0, half=0.002, low=None, mean_low=-0.01, p99_low=-0.1, number=1):
    at_p10 = center if low is None else low
    return Control(
        center, center - half, center + half, at_p10, at_p10 - half, at_p10 + half, mean_low, p99_low, 8, number
    )


def outcomes(device, count, slower=0.0, seed=3):
    return Counter(verdict.outcome for verdict in nights.check(np.random.default_rng(seed), device, count, slower))


def drawn(seed=5, device=QUIET, processes=8, slower=0.0, night=0):
    return nights.session(nights.draw(np.random.default_rng(seed), device, 1, processes, slower), night)


def judged(session, number=1, spec=SPEC, budget=None):
    return stage(session, number, spec, budget, 20.0)


def tail(session, name, budget=None):
    return next(each for each in judged(session, budget=budget).tails if each.name == name)


# --- nights of known truth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEVICES)
def test_equal_networks_never_fail_and_hardly_ever_warn(name):
    told = outcomes(DEVICES[name], 600)
    assert told["fail"] == 0
    assert told["warn"] + told["improved"] + told["undecided"] <= 2
    assert told["pass"] >= 594


def test_a_thousand_nights_of_equal_networks_on_a_device_too_noisy_to_judge_give_no_alarm():
    told = outcomes(replace(BUSY, layout=0.01, block=0.12), 1000)
    assert told["fail"] == told["warn"] == told["improved"] == 0
    assert told["inconclusive"] > 100


@pytest.mark.parametrize("name", DEVICES)
def test_three_per_cent_fails_in_95_of_100_nights_and_five_in_all(name):
    assert outcomes(DEVICES[name], 200, 0.03)["fail"] >= 190
    assert outcomes(DEVICES[name], 100, 0.05)["fail"] == 100


@pytest.mark.parametrize("name", DEVICES)
def test_one_and_a_half_per_cent_warns_in_90_of_100_nights_and_hardly_ever_fails(name):
    told = outcomes(DEVICES[name], 200, 0.015)
    assert told["warn"] >= 180
    assert told["fail"] <= 2


def test_a_faster_network_is_improved_and_a_tenth_of_a_per_cent_passes():
    assert outcomes(QUIET, 100, -0.03)["improved"] == 100
    assert outcomes(QUIET, 100, 0.001)["pass"] == 100


def test_the_slowdown_said_to_be_detectable_is_seen_in_about_four_of_five_stages():
    rng, seen, said = np.random.default_rng(9), 0, []
    for each in nights.stages(nights.draw(rng, QUIET, 300, 8), 1):
        said.append(each.detectable)
    slower = float(np.mean(said))
    for each in nights.stages(nights.draw(rng, QUIET, 300, 8, slower), 1):
        seen += each.ratio.low > 1 + SPEC.warn
    assert 0.7 <= seen / 300 <= 0.99


def test_the_peers_rules_alarm_on_equal_networks_where_this_one_does_not():
    rng = np.random.default_rng(4)
    device = replace(DEVICES["alternating tenants"], drift=0.03)
    samples = nights.draw(rng, device, 80, 1)[BASELINE].reshape(80, -1).astype(np.int64)
    pairs = list(zip(samples[:40], samples[40:], strict=True))
    alarms = {name: sum(rule(stored, tonight) for stored, tonight in pairs) for name, rule in peers().items()}
    floor = alarms.pop("stored p99 + 10 % and + 0.5 ms (edgegate)")
    assert 1 <= floor <= min(alarms.values())
    assert min(alarms.values()) >= 8, alarms
    assert outcomes(device, 40)["pass"] >= 39


# --- a session becomes a stage -------------------------------------------------------------------------------------


def test_a_session_gives_the_stage_that_its_arrays_give():
    samples = nights.draw(np.random.default_rng(2), QUIET, 1, 8, 0.02)
    samples = {arm: np.floor(ns) for arm, ns in samples.items()}
    whole, bare = judged(nights.session(samples)), nights.stages(samples, 1)[0]
    assert whole.ratio.center == pytest.approx(bare.ratio.center, rel=1e-6)
    assert whole.low.low == pytest.approx(bare.low.low, rel=1e-6)
    assert whole.control.high == pytest.approx(bare.control.high, rel=1e-6)
    assert whole.detectable == pytest.approx(bare.detectable, rel=1e-3)
    assert whole.again is not None and bare.again is not None
    assert whole.again.p10_high == pytest.approx(bare.again.p10_high, abs=1e-6)
    assert whole.spoilt == ""


def test_what_is_detectable_is_the_warning_plus_3_9_standard_errors_of_eight_processes():
    each = judged(drawn())
    sd = max(each.ratio.sd, each.control.sd)
    assert math.log1p(each.detectable) == pytest.approx(math.log1p(SPEC.warn) + 3.9 * sd / math.sqrt(8), rel=0.01)


def test_a_baseline_that_differs_from_itself_or_scatters_spoils_the_stage():
    samples = nights.draw(np.random.default_rng(1), QUIET, 1, 8)
    samples[AGAIN] = samples[AGAIN] * np.float32(1.02)
    assert judged(nights.session(samples)).spoilt.startswith("the baseline differs from itself: latency +")
    samples[AGAIN] = samples[AGAIN] / np.float32(1.04)
    assert judged(nights.session(samples)).spoilt.startswith("the baseline differs from itself: latency -1.")
    samples[AGAIN] = samples[BASELINE] * np.linspace(0.95, 1.05, 8, dtype=np.float32)[None, :, None, None]
    assert "scatters by" in judged(nights.session(samples)).spoilt


def test_two_processes_are_too_few_to_say_anything():
    assert judged(drawn(processes=2)).spoilt == "2 processes of an arm were measured, bounds need 3"
    assert judged(drawn(processes=3)).spoilt == ""


def test_a_quota_on_every_arm_is_inconclusive():
    session = drawn(slower=0.5)
    for arm in nights.ARMS:
        session = nights.changed(session, arm, quota_stops=np.ones(60, np.int64))
    assert session.contaminated
    verdict = screen(judged(session), SPEC)
    assert verdict is not None and verdict.outcome == "inconclusive"
    assert verdict.exit_code == EXIT_CODES["inconclusive"] == 4
    assert verdict.reason == "stage 1 says nothing: a processor quota stopped the baseline in 100 % of its blocks."


def test_a_quota_on_one_arm_of_the_baseline_alone_is_inconclusive_too():
    session = nights.changed(drawn(), AGAIN, quota_stops=np.ones(60, np.int64))
    assert not session.contaminated
    assert judged(session).spoilt.startswith("a processor quota stopped the baseline again")


def test_a_quota_on_the_candidate_alone_fails_by_the_mean_and_the_p99_though_its_median_is_the_same():
    stages = []
    for number, processes in ((1, 8), (2, 16)):
        samples = nights.draw(np.random.default_rng(number), QUIET, 1, processes)
        samples[CANDIDATE][..., ::3, 5] += np.float32(6e7)
        stops = np.zeros(60, np.int64)
        stops[::3] = 1
        session = nights.changed(nights.session(samples), CANDIDATE, quota_stops=stops)
        stages.append(judged(session, number))
    assert [each.name for each in stages[0].tails if each.risen] == ["mean", "p99"]
    assert screen(stages[0], SPEC) is None
    verdict = confirm(*stages, SPEC)
    assert abs(verdict.stages[1].ratio.center - 1) < 0.005
    assert verdict.outcome == "fail" and verdict.exit_code == 3
    assert verdict.reason.startswith("slower in both stages: mean +")
    assert "p99 +" in verdict.reason


def test_the_tails_of_equal_networks_do_not_rise_in_both_stages():
    rng = np.random.default_rng(8)
    device = DEVICES["heavy tails"]
    first, second = nights.draw(rng, device, 8, 8), nights.draw(rng, device, 8, 8)
    both = 0
    for night in range(8):
        one, two = (judged(nights.session(samples, night)) for samples in (first, second))
        both += bool({t.name for t in one.tails if t.risen} & {t.name for t in two.tails if t.risen})
        assert judge_control(one, two, SPEC) in ("pass", "undecided")
    assert both == 0


def test_a_warm_up_that_never_became_steady_spoils_the_baseline_and_not_the_candidate():
    restless = Warmup(5000, 10.0, (800_000, 900_000), False)
    assert judged(nights.changed(drawn(), BASELINE, warmup=restless)).spoilt == (
        "8 of 8 processes of the baseline never became steady"
    )
    assert judged(nights.changed(drawn(), CANDIDATE, warmup=restless)).spoilt == ""


def test_blocks_that_were_disturbed_spoil_the_stage_and_keep_the_control_out_of_the_ledger():
    flagged = np.arange(60) % 4 == 0
    each = judged(nights.changed(drawn(), CANDIDATE, flagged=flagged))
    assert each.spoilt == "25 % of the blocks of an arm were disturbed, beyond 20 %"
    assert each.again is None
    assert control_arms(each, None) == ()
    assert judge_control(each, None, SPEC) == "inconclusive"


def test_arms_under_two_runtimes_say_nothing():
    session = drawn()
    other = replace(session.measurements[CANDIDATE], runtime="simulated 2")
    mixed = replace(session, measurements={**session.measurements, CANDIDATE: other})
    assert "not measured under the same runtime" in judged(mixed).spoilt


def test_a_device_that_changes_during_a_check_spoils_the_stage_that_sees_it():
    session, first = drawn(), replace(nights.PRINT, power="performance")
    moved = replace(session, fingerprint=replace(first, power="powersave", runtime_build="cc" * 32))
    each = stage(moved, 2, SPEC, None, 20.0, first)
    assert each.spoilt == ("the device changed during the check: power was performance, is powersave, runtime build")
    assert each.again is None
    assert confirm(shown(0.05), each, SPEC).outcome == "inconclusive"
    assert stage(replace(session, fingerprint=first), 2, SPEC, None, 20.0, first).spoilt == ""
    assert stage(moved, 2, SPEC, None, 20.0).spoilt == "", "there is nothing to compare with"


def test_too_few_inferences_leave_p99_out_and_the_reason_says_so():
    verdict = screen(judged(drawn(processes=4)), SPEC)
    assert verdict is not None and verdict.outcome == "pass"
    assert [each.name for each in verdict.stages[0].tails] == ["mean"]
    assert "; too few inferences to judge p99; a slowdown of " in verdict.reason


def paced(session, missed, before):
    """The session at a control period, with so many misses a process of the candidate and of the baseline again."""
    spec = session.spec.model_copy(update={"paced_ms": 33.0})
    for arm, count in ((CANDIDATE, missed), (AGAIN, before), (BASELINE, before)):
        misses = np.zeros(60, np.int64)
        misses[:count] = 1
        session = nights.changed(session, arm, misses=misses)
    measured = {name: replace(m, paced_ms=33.0) for name, m in session.measurements.items()}
    return replace(session, spec=spec, measurements=measured)


def test_deadline_misses_rise_by_fishers_test_and_by_a_smallest_number():
    many = tail(paced(drawn(), 6, 1), "deadline misses")
    assert many.risen
    assert (many.interval.center, many.interval.low) == (48 / 4800, 8 / 4800)
    table = [[48, 4752], [8, 4792]]
    assert many.interval.high == pytest.approx(float(stats.fisher_exact(table, alternative="greater").pvalue))
    assert not tail(paced(drawn(), 2, 1), "deadline misses").risen
    lax = SPEC.model_copy(update={"miss_points": 0.02})
    assert not next(t for t in judged(paced(drawn(), 6, 1), spec=lax).tails if t.name == "deadline misses").risen
    assert all(t.name != "deadline misses" for t in judged(drawn()).tails)


def test_a_budget_is_broken_only_where_the_baseline_keeps_it_and_the_candidate_is_slower():
    slower = drawn(slower=0.10)
    high = {arm: slower.measurements[arm].p90.high_ms for arm in nights.ARMS}
    between = Budget(limit_ms=(high[AGAIN] + high[CANDIDATE]) / 2, percentile="p90")
    name = f"budget {between}"
    assert tail(slower, name, between).risen
    below, above = (Budget(limit_ms=x, percentile="p90") for x in (high[AGAIN] * 0.9, high[CANDIDATE] * 1.1))
    assert not tail(slower, f"budget {below}", below).risen
    assert not tail(slower, f"budget {above}", above).risen
    relative = Budget(ratio=0.5)
    assert not [t for t in judged(slower, budget=relative).tails if t.name.startswith("budget")]


def test_a_budget_whose_percentile_has_too_few_inferences_is_never_passed():
    budget = Budget(limit_ms=1e6, percentile="p99")
    still = replace(QUIET, noise=0.01, block=0.002, layout=0.0002)
    few = [nights.first_rounds(drawn(seed, still), 5) for seed in (5, 6)]
    one, two = (judged(each, number, budget=budget) for number, each in enumerate(few, 1))
    assert math.isinf(tail(few[0], "budget 1e+06ms@p99", budget).interval.high)
    assert screen(one, SPEC) is None, "more samples may tell"
    unasked = screen(judged(few[0]), SPEC)
    assert unasked is not None and unasked.outcome == "pass"
    verdict = confirm(one, two, SPEC)
    assert (verdict.outcome, verdict.exit_code) == ("undecided", 4)
    assert verdict.reason.startswith("not decided: too few inferences to bound the budget 1e+06ms@p99; no slowdown")
    enough = judged(drawn(), 2, budget=budget)
    assert confirm(one, enough, SPEC).outcome == "pass"


@pytest.mark.parametrize("center", [0.03, 0.012, -0.03, 0.0])
def test_an_unmeasured_budget_leaves_nothing_decided_but_a_fail(center):
    open_ended = Tail("budget 8ms@p99", Interval(0.9, 0.8, math.inf, 0.0, 16), False)
    verdict = confirm(shown(center), shown(center, number=2, tails=(open_ended,)), SPEC)
    assert verdict.outcome == ("fail" if center == 0.03 else "undecided")


def test_a_budget_that_the_baseline_misses_too_warns_and_says_so():
    equal = drawn()
    budget = Budget(limit_ms=0.9 * min(equal.measurements[arm].p50.low_ms for arm in nights.ARMS))
    first = judged(equal, budget=budget)
    assert [t.shared for t in first.tails if t.name.startswith("budget")] == [True]
    early = screen(first, SPEC)
    assert early is not None and (early.outcome, early.exit_code) == ("warn", 0)
    assert early.reason.startswith(f"over its budget {budget} (upper bound at 1.1")
    assert " of it), as is the baseline; no slowdown beyond 2 %: latency " in early.reason
    second = judged(drawn(6, processes=16), 2, budget=budget)
    assert confirm(shown(0.01, 0.012), second, SPEC).outcome == "warn"
    slow = judged(drawn(6, processes=16, slower=0.05), 2, budget=budget)
    assert confirm(shown(0.05), slow, SPEC).outcome == "fail"
    kept = Budget(limit_ms=2 * float(budget.limit_ms or 0))
    passed = screen(judged(equal, budget=kept), SPEC)
    assert passed is not None and passed.outcome == "pass" and "budget" not in passed.reason


@pytest.mark.parametrize(("percentile", "slower"), [("p90", 0.004), ("p99", 0.006)])
def test_a_candidate_over_its_budget_is_never_a_silent_pass(percentile, slower):
    told = Counter()
    for seed in range(8):
        one, two = drawn(2 * seed, slower=slower), drawn(2 * seed + 1, processes=16, slower=slower)
        limit = 1.0001 * max(each.measurements[AGAIN].statistic(percentile).high_ms for each in (one, two))
        budget = Budget(limit_ms=limit, percentile=percentile)
        first, second = judged(one, budget=budget), judged(two, 2, budget=budget)
        over = tail(two, f"budget {budget}", budget).interval.high > 1.0
        assert screen(first, SPEC) is None or not tail(one, f"budget {budget}", budget).over
        verdict = confirm(first, second, SPEC)
        told[over, verdict.outcome] += 1
        if over and verdict.outcome == "warn":
            assert verdict.reason.startswith(f"over its budget {budget} (upper bound at 1.0")
            assert " of it), which the baseline keeps, though not shown slower in both stages; " in verdict.reason
    assert told[True, "pass"] == 0 and told[True, "warn"] >= 1, told


def test_a_budget_that_two_equal_networks_straddle_breaks_nothing():
    for seed in range(20):
        equal = drawn(seed)
        high = {arm: equal.measurements[arm].p50.high_ms for arm in (AGAIN, CANDIDATE)}
        if high[AGAIN] < high[CANDIDATE]:
            budget = Budget(limit_ms=(high[AGAIN] + high[CANDIDATE]) / 2)
            assert not tail(equal, f"budget {budget}", budget).risen
            return
    pytest.fail("no pair straddles")


# --- the rule ------------------------------------------------------------------------------------------------------


def test_stage_1_passes_only_what_is_surely_no_failure_and_shows_no_sign_of_a_change():
    assert screen(shown(0.004, 0.005), SPEC) is not None
    assert screen(shown(0.01, 0.012), SPEC) is None, "U above 2 %"
    assert screen(shown(0.01, 0.002), SPEC) is None, "L above 0.5 %"
    assert screen(shown(-0.01, 0.002), SPEC) is None, "an improvement is confirmed before it is said"
    assert screen(shown(0.0, tails=(risen(),)), SPEC) is None, "a tail that rose"


@pytest.mark.parametrize(
    ("center", "half", "low", "outcome"),
    [
        (0.03, 0.005, None, "fail"),
        (0.03, 0.005, 0.012, "warn"),
        (0.03, 0.012, None, "warn"),
        (0.012, 0.005, None, "warn"),
        (0.0, 0.005, None, "pass"),
        (0.01, 0.012, None, "undecided"),
        (-0.012, 0.005, None, "improved"),
        (-0.006, 0.005, None, "pass"),
    ],
)
def test_stage_2_decides_by_both_bounds_and_by_the_fastest_tenth(center, half, low, outcome):
    verdict = confirm(shown(center, half), shown(center, half, low, 2), SPEC)
    assert verdict.outcome == outcome
    assert verdict.reason.endswith("; a slowdown of 1.1 % would have been noticed in four nights of five.")
    assert f"latency {100 * center:+.2f} %" in verdict.reason


def test_a_tail_fails_only_when_the_same_one_rose_in_both_stages():
    both = confirm(shown(tails=(risen(),)), shown(number=2, tails=(risen(),)), SPEC)
    assert both.outcome == "fail"
    assert both.reason.startswith("slower in both stages: mean +50 % (at least +30 %); latency +0.00 %")
    other = confirm(shown(tails=(risen("p99"),)), shown(number=2, tails=(risen(),)), SPEC)
    assert other.outcome == "pass"
    assert "mean rose in stage 2 alone" in other.reason


def test_what_is_plainly_slower_in_the_mean_is_confirmed_by_as_few_processes_as_stage_1_had():
    def mean(low: float) -> Tail:
        return Tail("mean", Interval(1.1 * low, low, 1.2 * low, 0.0, 8), True)

    assert confirming(shown(tails=(mean(1.51),)), SPEC) == SPEC.screen_processes == 8
    assert confirming(shown(tails=(mean(1.49),)), SPEC) == SPEC.confirm_processes == 16
    assert confirming(shown(0.5), SPEC) == SPEC.confirm_processes, "no tail could be judged"
    fewer = SPEC.model_copy(update={"confirm_processes": 4})
    assert confirming(shown(tails=(mean(1.51),)), fewer) == 4


def test_a_spoilt_stage_never_passes_and_never_fails_and_the_next_one_may():
    for number in (1, 2):
        stages = [shown(0.05, number=1), shown(0.05, number=2)]
        stages[number - 1] = shown(0.05, number=number, spoilt="the link was lost")
        verdict = confirm(*stages, SPEC)
        assert verdict.outcome == "inconclusive"
        assert verdict.reason == f"stage {number} says nothing: the link was lost."
    first = screen(shown(spoilt="the link was lost"), SPEC)
    retried = screen(shown(), SPEC)
    assert first is not None and retried is not None
    assert (first.outcome, retried.outcome) == ("inconclusive", "pass")


SHIFTS = st.floats(-0.2, 0.2)
HALVES = st.floats(1e-5, 0.1)


@given(SHIFTS, st.floats(0.0, 0.1), HALVES, SHIFTS, HALVES)
def test_a_slower_candidate_is_never_judged_more_mildly(center, more, half, first, first_half):
    before, after = (
        confirm(shown(first, first_half), shown(x, half, number=2), SPEC).outcome for x in (center, center + more)
    )
    assert ORDER.index(before) <= ORDER.index(after)
    if screen(shown(center, half), SPEC) is None and center > 0:
        assert screen(shown(center + more, half), SPEC) is None


@given(SHIFTS, HALVES, st.floats(1.0, 10.0))
def test_more_scatter_never_makes_a_fail_a_warning_or_a_pass(center, half, factor):
    narrow, wide = (confirm(shown(center, h), shown(center, h, number=2), SPEC).outcome for h in (half, half * factor))
    if wide in ("fail", "improved"):
        assert narrow == wide
    if wide == "warn":
        assert narrow in ("warn", "fail")
    if wide == "pass":
        assert narrow in ("pass", "improved", "warn")


# --- the ledger ----------------------------------------------------------------------------------------------------


def test_a_control_that_would_be_taken_for_a_change_is_an_alarm_though_the_control_rule_stops_the_night():
    samples = nights.draw(np.random.default_rng(1), QUIET, 1, 8)
    samples[AGAIN] = samples[AGAIN] * np.float32(1.04)
    each = judged(nights.session(samples))
    assert each.spoilt and each.again is not None
    assert judge_control(each, None, SPEC) == "fail"
    assert judge_control(judged(drawn()), None, SPEC) == "pass"


def test_a_control_is_judged_by_both_stages_where_both_were_measured():
    odd, even = shown(again=control(0.01)), shown(number=2, again=control())
    assert judge_control(odd, None, SPEC) == "warn"
    assert judge_control(odd, even, SPEC) == "pass"
    assert judge_control(odd, shown(number=2, again=control(-0.01)), SPEC) == "improved"
    assert judge_control(even, odd, SPEC) == "pass", "stage 1 clears it"
    once = shown(again=control(mean_low=0.2))
    assert judge_control(once, None, SPEC) == "undecided"
    assert judge_control(once, shown(number=2, again=control(mean_low=0.2)), SPEC) == "fail"
    assert judge_control(once, shown(number=2, again=None), SPEC) == "inconclusive"


def test_a_control_survives_plain_json():
    kept = judged(drawn(processes=4)).again
    assert kept is not None and kept.p99_low is None
    assert Control.from_table(json.loads(json.dumps(kept.to_table(), allow_nan=False))) == kept


def with_misses(missed, before, number=1):
    return replace(control(number=number), missed=missed, timed=4800, baseline_missed=before, baseline_timed=4800)


def test_the_misses_of_a_control_are_kept_and_judged():
    kept = judged(paced(drawn(), 6, 2)).again
    assert kept is not None and (kept.missed, kept.timed, kept.baseline_missed) == (16, 4800, 16)
    assert Control.from_table(json.loads(json.dumps(kept.to_table(), allow_nan=False))) == kept
    back_to_back = judged(drawn()).again
    assert back_to_back is not None and back_to_back.missed is None
    stages = [shown(number=n, again=with_misses(48, 8, n)) for n in (1, 2)]
    assert judge_control(*stages, SPEC) == "fail"
    assert judge_control(shown(again=with_misses(8, 8)), None, SPEC) == "pass"
    assert judge_control(stages[0], shown(number=2, again=with_misses(8, 8, 2)), SPEC) == "pass"


def test_a_control_that_was_kept_before_misses_were_is_read():
    table = control().to_table()
    for name in ("missed", "timed", "baseline_missed", "baseline_timed"):
        del table[name]
    assert Control.from_table(table) == control()


def test_false_alarms_of_misses_widen_miss_points_alone():
    record = [(with_misses(48, 8), with_misses(48, 8, 2))] * 5 + [(control(),)] * 95
    wider, alarms, factor = widen(record, SPEC)
    assert alarms == 5
    assert wider.miss_points == pytest.approx(factor * SPEC.miss_points)
    assert factor == pytest.approx(40 / 4800 / SPEC.miss_points, abs=0.02)
    assert wider == SPEC.model_copy(update={"miss_points": wider.miss_points})
    every = [(with_misses(4800, 0), with_misses(4800, 0, 2))] * 100
    assert widen(every, SPEC)[1] == 100, "ends all the same"


def test_one_false_alarm_of_each_kind_of_tail_is_brought_to_one_in_all():
    tails = [(control(mean_low=0.10), control(mean_low=0.10, number=2)), (with_misses(48, 8), with_misses(48, 8, 2))]
    record = [*tails, (control(0.02),), (control(0.02),)] + [(control(),)] * 96
    wider, alarms, _ = widen(record, SPEC)
    assert alarms == 4 and widen(record, wider)[1] <= 1


def test_a_stage_that_its_control_spoilt_stays_in_the_ledger_beside_its_retry():
    spoilt, retry, second = control(0.02), control(0.001), control(0.03, number=2)
    stages = [shown(again=spoilt, spoilt="the baseline differs"), shown(spoilt="the link was lost"), shown(again=retry)]
    assert control_arms(*stages) == (spoilt, retry)
    assert widen([(spoilt, retry)], SPEC)[1] == 1
    assert widen([(retry, second)], SPEC)[1] == 0, "stage 1 clears it"
    doubtful = control(0.012, 0.010)
    assert widen([(doubtful, control(number=2))], SPEC)[1] == 0
    assert widen([(doubtful, control(number=2), second)], SPEC)[1] == 1, "stage 2 measured again"


def test_one_unlucky_night_widens_nothing():
    assert widen([], SPEC) == (SPEC, 0, 1.0)
    assert widen([(control(0.02),)], SPEC) == (SPEC, 1, 1.0)
    assert widen([(control(0.02),)] + [(control(),)] * 40, SPEC) == (SPEC, 1, 1.0)
    assert widen([(control(0.02),)] * 15 + [()] * 40, SPEC) == (SPEC, 15, 1.0), "fewer than 20 that count"


def test_tolerances_widen_just_so_far_that_the_recorded_rate_is_one_per_cent_and_narrow_again():
    record = [(control(0.012, low=0.0),)] * 4 + [(control(),)] * 96
    wider, alarms, factor = widen(record, SPEC)
    assert alarms == 4
    assert wider.warn == pytest.approx(factor * SPEC.warn)
    assert (wider.fail / SPEC.fail, wider.fail_low / SPEC.fail_low) == (pytest.approx(factor), pytest.approx(factor))
    assert wider.tail_mean == SPEC.tail_mean and wider.control == SPEC.control
    needed = math.expm1(0.010) / SPEC.warn
    assert needed <= factor < needed + 0.01
    assert sum(judge_control(shown(again=arms[0]), None, wider) == "warn" for arms in record) <= 1
    assert widen(record + [(control(),)] * 400, SPEC) == (SPEC, 4, 1.0)


def test_one_alarm_in_a_hundred_may_stay_and_the_worst_one_is_it():
    record = [(control(0.5),), (control(0.011),), (control(0.012),), (control(-0.011),)] + [(control(),)] * 96
    _, alarms, factor = widen(record, SPEC)
    assert alarms == 4
    assert factor == pytest.approx(math.expm1(0.010) / SPEC.warn, abs=0.01), "the second worst is silenced"


def test_false_alarms_of_the_tail_widen_the_tail_alone():
    record = [(control(mean_low=0.10), control(mean_low=0.10, number=2))] * 5 + [(control(),)] * 95
    wider, alarms, factor = widen(record, SPEC)
    assert alarms == 5
    assert wider.tail_mean == pytest.approx(factor * SPEC.tail_mean) and factor > 2
    assert (wider.fail, wider.warn) == (SPEC.fail, SPEC.warn)


ARMS = st.builds(
    control,
    st.floats(-0.05, 0.05),
    st.floats(0.0001, 0.02),
    st.none() | st.floats(-0.05, 0.05),
    number=st.sampled_from([1, 2]),
)


@given(st.lists(ARMS.map(lambda arm: (arm,)) | st.tuples(ARMS, ARMS), min_size=20, max_size=60))
def test_what_was_widened_leaves_at_most_one_false_alarm_in_a_hundred(record):
    wider, alarms, factor = widen(record, SPEC)
    left = widen(record, wider)[1]
    assert factor >= 1 and left <= alarms
    if factor > 1:
        assert left <= len(record) / 100
        smaller = SPEC.model_copy(
            update={name: (factor - 0.01) * getattr(SPEC, name) for name in ("fail", "fail_low", "warn")}
        )
        assert widen(record, smaller)[1] > len(record) / 100


# --- others' rules -------------------------------------------------------------------------------------------------


def test_the_peers_rules_are_what_their_sources_say():
    rng = np.random.default_rng(3)
    stored = (8e5 * np.exp(rng.normal(0, 0.05, 4000))).astype(np.int64)
    scaled = {percent: stored * (100 + percent) // 100 for percent in (3, 6, 12, 80)}
    rules = list(peers().values())
    told = {percent: [rule(stored, ns) for rule in rules] for percent, ns in scaled.items()}
    assert told[3] == [False, False, False, True]
    assert told[6] == [False, False, True, True]
    assert told[12] == [True, False, True, True]
    assert told[80] == [True, True, True, True]
    assert not any(rule(scaled[12], stored) for rule in rules)
    assert not any(rule(stored, stored) for rule in rules)
