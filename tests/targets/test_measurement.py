"""What may be said of raw samples: bounds, ratios, verdicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import Budget, MeasureSpec
from targets.harness.device import Condition, Fingerprint, Preflight
from targets.harness.measurement import (
    Blocks,
    Measurement,
    Session,
    Warmup,
    block_from_table,
    judge,
    percentile_bounds,
    verdict,
)

PRINT = Fingerprint(
    "board",
    "cpu",
    "f",
    2,
    None,
    "Linux 6",
    1024,
    "",
    "hidden",
    "onnxruntime",
    "1.31.1",
    "b",
    "3.11",
    ("CPU",),
    1,
    False,
)


def blocks(ns, flagged=None, stops=None):
    ns = np.asarray(ns, dtype=np.int64)
    rounds = len(ns)
    return Blocks(
        ns,
        np.zeros(rounds, bool) if flagged is None else np.asarray(flagged, bool),
        np.arange(rounds, dtype=np.int64),
        np.zeros(rounds, np.int64) if stops is None else np.asarray(stops, np.int64),
        Warmup(50, 1.25, (100, 101), True),
    )


def session(**networks):
    measured = {
        name: Measurement(name, "00" * 32, "onnxruntime 1.31.1", tuple(parts)) for name, parts in networks.items()
    }
    order = tuple(tuple(tuple(networks) for _ in part.ns) for part in next(iter(networks.values())))
    state = Preflight((Condition("load", "0.1 on 2 cores", True),))
    return Session(
        measured, PRINT, state, MeasureSpec(), "rank", 7, order,
        "2026-01-01T00:00:00+00:00", "2026-01-01T00:01:00+00:00",
        "ada@board", "protocol", "ab" * 32, {"steal_percent": 0.25},
    )  # fmt: skip


def noisy(rng, ms, processes=8, rounds=60, timed=10, layout=0.003, drift=None):
    """Blocks about `ms` with a drift that is handed in, so that two networks can share it."""
    parts = []
    for i in range(processes):
        walk = np.zeros(rounds) if drift is None else drift[i]
        logs = rng.normal(0, 0.03, (rounds, timed)) + walk[:, None] + rng.normal(0, layout)
        parts.append(blocks(ms * 1e6 * np.exp(logs)))
    return parts


def test_a_90th_percentile_has_no_upper_bound_below_64_samples():
    ordered = np.arange(1, 65, dtype=np.int64) * 1_000_000
    assert percentile_bounds(ordered[:63], 0.9)[1] == math.inf
    assert percentile_bounds(ordered, 0.9)[1] == 64.0


def test_a_99th_percentile_has_no_upper_bound_below_662_samples():
    ordered = np.arange(1, 663, dtype=np.int64)
    assert percentile_bounds(ordered[:661], 0.99)[1] == math.inf
    assert percentile_bounds(ordered, 0.99)[1] == pytest.approx(662e-6)


@pytest.mark.parametrize(
    ("count", "share", "reported"),
    [(1024, 0.90, 92.2), (4096, 0.90, 91.1), (1024, 0.99, 99.71), (4096, 0.99, 99.37), (24576, 0.99, 99.15)],
)
def test_the_upper_bound_is_the_sample_percentile_of_the_early_stopping_rule(count, share, reported):
    high = percentile_bounds(np.arange(1, count + 1, dtype=np.int64) * 1_000_000, share)[1]
    assert 100.0 * (round(high) - 1) / count == pytest.approx(reported, abs=0.06 if share == 0.9 else 0.006)


def test_both_bounds_of_a_percentile_hold_in_99_of_100_draws():
    rng = np.random.default_rng(1)
    truth = float(stats.expon.ppf(0.9)) * 1e-6 * 1e6
    held_high = held_low = 0
    for _ in range(400):
        low, high = percentile_bounds((rng.exponential(1.0, 1024) * 1e6).astype(np.int64), 0.9)
        held_high += high >= truth
        held_low += low <= truth
    assert held_high >= 392 and held_low >= 392


def test_a_percentile_with_too_few_samples_is_none_with_the_reason():
    measurement = Measurement("net", "", "", (blocks(np.full((10, 10), 1_000_000)),))
    assert measurement.p90.value_ms is None
    assert measurement.p90.reason == "p90 needs 1024 inferences, there are 100"
    assert measurement.p99.reason == "p99 needs 4096 inferences, there are 100"
    assert measurement.p50.value_ms == 1.0


def test_statistics_are_in_milliseconds_and_pool_all_processes():
    measurement = Measurement("net", "", "", (blocks([[1_000_000, 3_000_000]]), blocks([[2_000_000, 10_000_000]])))
    assert measurement.p50_ms == 2.5
    assert measurement.mean_ms == 4.0
    assert measurement.spread == pytest.approx(math.log(3) / math.sqrt(2))
    assert measurement.mean.low_ms <= 4.0 <= measurement.mean.high_ms


def test_the_ratio_at_the_median_is_a_t_bound_over_processes():
    ratios = [0.50, 0.51, 0.52]
    a = [blocks(np.full((5, 4), 1_000_000 * r)) for r in ratios]
    b = [blocks(np.full((5, 4), 1_000_000)) for _ in ratios]
    interval = session(a=a, b=b).ratio("a", "b")
    logs = np.log(ratios)
    half = float(stats.t.ppf(0.99, 2)) * logs.std(ddof=1) / math.sqrt(3)
    assert interval.center == pytest.approx(math.exp(logs.mean()))
    assert interval.low == pytest.approx(math.exp(logs.mean() - half))
    assert interval.high == pytest.approx(math.exp(logs.mean() + half))
    assert interval.sd == pytest.approx(logs.std(ddof=1))
    assert interval.n == 3


def test_process_ratios_are_what_the_ratio_at_the_median_is_the_mean_of():
    rng = np.random.default_rng(11)
    measured = session(a=noisy(rng, 0.5), b=noisy(rng, 1.0))
    each = measured.process_ratios("a", "b")
    interval = measured.ratio("a", "b")
    assert len(each) == interval.n
    assert math.exp(np.log(each).mean()) == pytest.approx(interval.center)


def test_process_ratios_of_a_tail_are_not_given_where_a_process_is_too_short():
    rng = np.random.default_rng(12)
    few, many = (session(a=noisy(rng, 0.5, 3, n), b=noisy(rng, 1.0, 3, n)) for n in (5, 200))
    assert few.process_ratios("a", "b", "p99") == ()
    assert many.process_ratios("a", "b", "p99") == pytest.approx((0.5, 0.5, 0.5), rel=0.2)
    assert few.process_ratios("a", "b", "mean") == pytest.approx((0.5, 0.5, 0.5), rel=0.2)


def test_drift_between_rounds_cancels_in_the_interleaved_ratio():
    rng = np.random.default_rng(2)
    drift = np.cumsum(rng.normal(0, 0.1, (8, 60)), axis=1)
    measured = session(a=noisy(rng, 0.5, drift=drift), b=noisy(rng, 1.0, drift=drift))
    interval = measured.ratio("a", "b")
    assert interval.low < 0.5 < interval.high
    assert interval.high - interval.low < 0.01


def test_bounds_of_two_equal_networks_hold_one():
    rng = np.random.default_rng(3)
    both = [session(a=noisy(rng, 1.0), b=noisy(rng, 1.0)).ratio("a", "b") for _ in range(150)]
    inside = sum(i.low <= 1.0 <= i.high for i in both)
    assert inside >= 142


@pytest.mark.parametrize("statistic", ["mean", "p90", "p99"])
def test_bounds_of_pooled_statistics_hold_the_truth(statistic):
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(4):
        interval = session(a=noisy(rng, 0.7), b=noisy(rng, 1.0)).ratio("a", "b", statistic)
        inside += interval.low <= 0.7 <= interval.high
        assert interval.high < 0.75
    assert inside >= 3


def test_a_tail_ratio_without_enough_samples_has_no_bounds():
    rng = np.random.default_rng(5)
    interval = session(a=noisy(rng, 1.0, 2, 5), b=noisy(rng, 1.0, 2, 5)).ratio("a", "b", "p99")
    assert (interval.low, interval.high) == (0.0, math.inf)


def test_one_process_alone_bounds_no_ratio():
    rng = np.random.default_rng(5)
    interval = session(a=noisy(rng, 0.5, 1), b=noisy(rng, 1.0, 1)).ratio("a", "b")
    assert interval.center == pytest.approx(0.5, rel=0.02)
    assert (interval.low, interval.high, interval.n) == (0.0, math.inf, 1)


def test_the_median_is_blind_to_a_stopped_process_and_the_mean_is_not():
    rng = np.random.default_rng(6)
    plain, stopped = noisy(rng, 1.0), noisy(rng, 1.0)
    slow = [blocks(np.where(rng.random(p.ns.shape) < 0.05, p.ns * 40, p.ns)) for p in stopped]
    measured = session(a=slow, b=plain)
    assert measured.ratio("a", "b").center == pytest.approx(1.0, abs=0.02)
    assert measured.ratio("a", "b", "mean").low > 1.5
    assert measured.ratio("a", "b", "p99").low > 20


def test_a_round_with_a_flagged_block_leaves_the_ratio_of_both():
    flags = [True, False, False, False, False, False]
    a = [blocks([[9_000_000]] + [[500_000]] * 5, flags) for _ in range(3)]
    b = [blocks([[1_000_000]] * 6) for _ in range(3)]
    measured = session(a=a, b=b)
    assert measured.ratio("a", "b").center == pytest.approx(0.5)
    assert measured.ratio("a", "b", "mean").center == pytest.approx(0.5)
    assert measured.measurement("a").mean_ms == 0.5


def test_a_session_is_contaminated_above_a_fifth_of_flagged_blocks_and_not_at_a_fifth():
    fifth, more = [True] * 2 + [False] * 8, [True] * 3 + [False] * 7
    assert not session(a=[blocks(np.full((10, 2), 5), fifth)]).contaminated
    assert session(a=[blocks(np.full((10, 2), 5), more)], b=[blocks(np.full((10, 2), 5))]).contaminated


def test_a_quota_that_stops_one_network_shows_in_it_and_one_that_stops_all_contaminates():
    calm, stopped = blocks(np.full((10, 2), 5)), blocks(np.full((10, 2), 5), stops=[1] + [0] * 9)
    assert not session(a=[stopped], b=[calm]).contaminated
    assert session(a=[stopped], b=[stopped]).contaminated


def busy(rng, ms, every_ms=8.0, slice_ms=4.0, processes=3):
    """Blocks of a network on a core that something else takes in slices, none of which is flagged."""
    shape = (40, 12)
    hit = [rng.random(shape) < min(1.0, (ms + 0.1) / every_ms * 2) for _ in range(processes)]
    return [blocks(1e6 * (ms + slice_ms * each) * rng.normal(1.0, 0.01, shape)) for each in hit]


def test_a_core_that_something_else_takes_in_slices_contaminates_a_session_although_no_block_stands_out():
    rng = np.random.default_rng(21)
    measured = session(a=busy(rng, 1.0), b=busy(rng, 2.0))
    assert measured.ratio("a", "b").center < 0.4, "the longer one is hit more often, and the truth is 0.5"
    assert measured.measurement("b").flagged_share == 0
    told = "something else held the processor between inferences, in "
    assert measured.contamination is not None and measured.contamination.startswith(told)
    assert judge(measured, "a", "b", Budget(ratio=0.5)).verdict == "undecided"


def test_a_network_that_alone_takes_now_long_and_now_short_is_its_own_trouble():
    rng = np.random.default_rng(22)
    assert not session(a=busy(rng, 2.0), b=noisy(rng, 1.0)).contaminated
    assert not session(a=busy(rng, 2.0)).contaminated


def test_runs_that_lie_a_little_apart_contaminate_nothing():
    rng = np.random.default_rng(23)
    wide = [blocks(1e6 * rng.normal(1.0, 0.1, (40, 12))) for _ in range(3)]
    assert not session(a=wide, b=wide).contaminated


def halves(center, spread=0.002):
    rng = np.random.default_rng(8)
    scatter = np.exp(np.linspace(-spread, spread, 8))
    a = [blocks(np.full((5, 20), 1_000_000 * center * s) + rng.integers(0, 50, (5, 20))) for s in scatter]
    return session(cut=a, dense=[blocks(np.full((5, 20), 1_000_000)) for _ in scatter])


@pytest.mark.parametrize(("center", "outcome"), [(0.49, "met"), (0.5, "undecided"), (0.51, "missed")])
def test_a_relative_budget_is_judged_by_the_bounds_of_the_ratio(center, outcome):
    assert verdict(halves(center), "cut", "dense", Budget(ratio=0.5)) == outcome


def test_a_judgement_carries_its_numbers():
    judged = judge(halves(0.49), "cut", "dense", Budget(ratio=0.5))
    assert (judged.verdict, judged.limit, judged.unit) == ("met", 0.5, "x")
    assert judged.value == pytest.approx(0.49, rel=1e-3)
    assert judged.low < judged.value < judged.high <= 0.5
    assert judged.reason == "p50 is 0.490x of 'dense', bounds 0.489 to 0.491, budget 0.5x"


def test_an_absolute_budget_must_hold_in_every_process():
    rng = np.random.default_rng(9)
    good = noisy(rng, 1.0)
    late = noisy(rng, 1.2, processes=1)
    assert verdict(session(cut=good), "cut", "cut", Budget(limit_ms=1.1)) == "met"
    assert verdict(session(cut=good[1:] + late), "cut", "cut", Budget(limit_ms=1.1)) == "undecided"
    assert verdict(session(cut=good), "cut", "cut", Budget(limit_ms=0.9)) == "missed"


@pytest.mark.parametrize("at", ["mean", "p90"])
def test_an_absolute_budget_may_stand_at_another_statistic(at):
    measured = session(cut=noisy(np.random.default_rng(10), 1.0))
    assert verdict(measured, "cut", "cut", Budget(limit_ms=1.2, percentile=at)) == "met"
    assert verdict(measured, "cut", "cut", Budget(limit_ms=0.8, percentile=at)) == "missed"


def test_a_tail_budget_without_enough_samples_is_undecided_and_says_why():
    measured = session(cut=noisy(np.random.default_rng(11), 1.0, 2, 10))
    judged = judge(measured, "cut", "cut", Budget(limit_ms=100.0, percentile="p99"))
    assert judged.verdict == "undecided"
    assert judged.reason == "p99 needs 4096 inferences, there are 200"


def test_nothing_is_said_of_a_contaminated_session():
    a = [blocks(np.full((10, 4), 100_000), [True] * 5 + [False] * 5) for _ in range(4)]
    b = [blocks(np.full((10, 4), 1_000_000)) for _ in range(4)]
    judged = judge(session(a=a, b=b), "a", "b", Budget(ratio=0.5))
    assert judged.verdict == "undecided"
    assert judged.reason == "the session is contaminated: more than 20 % of the blocks of a network were disturbed"


def test_a_session_comes_back_from_its_text_without_loss():
    rng = np.random.default_rng(12)
    first = session(a=noisy(rng, 1.0, 2, 6), b=noisy(rng, 0.5, 2, 6))
    again = Session.from_json(first.to_json())
    assert again.to_json() == first.to_json()
    assert again.fingerprint == first.fingerprint and again.preflight == first.preflight and again.spec == first.spec
    assert again.order == first.order and again.telemetry == first.telemetry
    assert all(
        (x.ns == y.ns).all()
        for x, y in zip(again.measurements["b"].processes, first.measurements["b"].processes, strict=True)
    )
    assert again.ratio("a", "b", "mean") == first.ratio("a", "b", "mean")


def test_what_is_no_measurement_record_is_refused():
    with pytest.raises(DeployError) as error:
        Session.from_json('{"version": 1}')
    assert str(error.value) == "not a measurement record: KeyError 'names'."
    with pytest.raises(DeployError) as error:
        Session.from_json('{"version": 9}')
    assert str(error.value) == "the measurement has version 9, this tool reads versions 1 and 2."


def test_a_session_of_version_1_is_read_with_no_misses_and_no_start_times():
    table = json.loads(session(a=[blocks(np.full((3, 2), 5))]).to_json())
    assert table["version"] == 2
    table["version"] = 1
    del table["spec"]["paced_ms"], table["spec"]["sustained_s"]
    for process in table["measurements"][0]["processes"]:
        del process["misses"], process["started_ns"]
    old = Session.from_json(json.dumps(table)).measurement("a")
    assert old.processes[0].misses.tolist() == old.processes[0].started_ns.tolist() == [0, 0, 0]
    assert old.deadline_misses is None and old.miss_ratio is None and old.drift is None


def paced(parts, period=33.0, **changes):
    made = session(a=parts)
    spec = made.spec.model_copy(update={"paced_ms": period})
    measured = {"a": replace(made.measurements["a"], paced_ms=period)}
    return replace(made, measurements=measured, spec=spec, **changes)


def test_deadline_misses_are_counted_over_usable_blocks():
    flagged = [False, True, False]
    one = replace(blocks(np.full((3, 10), 5), flagged), misses=np.array([1, 9, 0]))
    two = replace(blocks(np.full((3, 10), 5)), misses=np.array([0, 0, 2]))
    measured = paced([one, two]).measurement("a")
    assert measured.deadline_misses == (3, 50)
    assert measured.miss_ratio == pytest.approx(0.06)


def test_misses_start_times_and_the_period_come_back_from_their_text():
    part = replace(blocks(np.full((2, 3), 5)), misses=np.array([2, 0]), started_ns=np.array([10, 20]))
    again = Session.from_json(paced([part]).to_json()).measurement("a")
    assert again.paced_ms == 33.0 and again.deadline_misses == (2, 6)
    assert again.processes[0].started_ns.tolist() == [10, 20]


def test_sessions_taken_in_different_ways_are_not_joined():
    plain = session(a=[blocks(np.full((2, 3), 5))])
    with pytest.raises(UndecidedError) as error:
        plain.joined(paced([blocks(np.full((2, 3), 5))]))
    assert error.value.message == (
        "two sessions were measured differently: 'protocol rank back-to-back' and 'protocol rank paced=33ms'."
    )
    with pytest.raises(UndecidedError, match="'protocol rank paced=33ms' and 'protocol rank paced=20ms'"):
        paced([blocks([[5]])]).joined(paced([blocks([[5]])], 20.0))


def test_sessions_that_differ_in_their_counts_alone_are_joined_one_after_the_other():
    first = replace(blocks(np.full((2, 3), 5)), started_ns=np.array([100, 200]))
    later = replace(blocks(np.full((2, 4), 5)), started_ns=np.array([50, 60]))
    one, two = paced([first], protocol="ort 2x2 of 3"), paced([later], protocol="ort 2x2 of 4")
    both = one.joined(two).measurement("a")
    assert [part.started_ns.tolist() for part in both.processes] == [[100, 200], [265, 275]]
    assert both.deadline_misses == (0, 14)


def heating(last, seconds=90.0):
    """One process of 0.1 s blocks that takes 1 ms until half time and `last` ms from then on."""
    starts = np.arange(0, int(seconds * 10)) * 100_000_000
    ms = np.where(starts < starts[-1] / 2, 1.0, last)
    return replace(blocks(np.repeat(ms[:, None] * 1e6, 5, axis=1)), started_ns=starts)


def test_drift_is_the_last_half_minute_over_the_first():
    assert Measurement("a", "", "", (heating(1.25),)).drift == pytest.approx(1.25)
    assert Measurement("a", "", "", (heating(1.0),)).drift == pytest.approx(1.0)
    assert Measurement("a", "", "", (heating(1.21), heating(1.0))).drift == pytest.approx(1.1)


def test_a_short_process_has_no_drift():
    assert Measurement("a", "", "", (heating(1.25, 59.0),)).drift is None
    assert Measurement("a", "", "", (heating(1.25, 59.0), heating(1.25))).drift == pytest.approx(1.25)


def test_start_times_that_do_not_fit_the_rounds_are_refused():
    table = json.loads(session(a=[blocks(np.full((3, 2), 5))]).to_json())
    table["measurements"][0]["processes"][0]["started_ns"] = [0]
    with pytest.raises(DeployError, match="3 rounds, but 3 counts of misses and 1 start times"):
        Session.from_json(json.dumps(table))


def test_times_on_the_gpu_are_kept_beside_wall_times_and_judged_by_nobody():
    ns = np.array([[50, 60], [70, 80], [90, 900]])
    part = replace(blocks(ns, flagged=[False, False, True]), gpu_ns=ns - 40)
    first = session(a=[part], b=[blocks(ns)])
    again = Session.from_json(first.to_json())
    gpu = again.measurement("a").on_gpu
    assert gpu is not None and gpu.pooled_ns.tolist() == [10, 20, 30, 40] and gpu.p50_ms == pytest.approx(25e-6)
    assert again.measurement("b").on_gpu is None and '"gpu_ns"' not in session(b=[blocks(ns)]).to_json()
    assert again.ratio("a", "b").center == 1.0
    assert first.joined(again).measurement("a").on_gpu.pooled_ns.size == 8
    table = json.loads(first.to_json())
    table["measurements"][0]["processes"][0]["gpu_ns"] = [[1, 2]]
    with pytest.raises(DeployError, match=r"times on the GPU of shape \(1, 2\).* beside samples of shape \(3, 2\)"):
        Session.from_json(json.dumps(table))


def test_samples_that_do_not_fit_their_flags_are_refused():
    table = json.loads(session(a=[blocks(np.full((3, 2), 5))]).to_json())
    table["measurements"][0]["processes"][0]["flagged"] = [0]
    with pytest.raises(DeployError, match="3 rounds, but 1 flags, 3 switches and 3 stops"):
        Session.from_json(json.dumps(table))


def test_raw_samples_that_were_read_cannot_be_changed():
    warmup = {"inferences": 1, "seconds": 0.1, "windows_ns": [5], "steady": True}
    read = block_from_table({"ns": [[5]], "flagged": [0], "switches": [0], "quota_stops": [0], "warmup": warmup})
    with pytest.raises(ValueError, match="read-only"):
        read.ns[0, 0] = 1


def test_an_unknown_name_in_a_session_names_its_near_miss():
    with pytest.raises(UsageError) as error:
        halves(0.5).ratio("cut", "dence")
    assert str(error.value) == "no network named 'dence' in this session. Did you mean 'dense'?"


def test_networks_that_never_became_steady_are_named_with_how_many_of_their_processes():
    rng = np.random.default_rng(0)
    whole = session(calm=noisy(rng, 1.0, 4), restless=noisy(rng, 1.0, 4))
    assert whole.unstable == {} and whole.measurement("restless").steady
    never = Warmup(5000, 10.0, (100, 140), False)
    parts = whole.measurement("restless").processes
    shaken = replace(whole.measurement("restless"), processes=(*parts[:3], replace(parts[3], warmup=never)))
    told = replace(whole, measurements={**whole.measurements, "restless": shaken})
    assert told.unstable == {"restless": (1, 4)}
    assert not shaken.steady and shaken.unsteady == 1


# --- numbers taken under different protocols -----------------------------------------------------------------------

PYTHON = "tensorrt-python-1/clock=wall/cuda_graph=0/spin=0/copies=1"
TRTEXEC = "tensorrt-trtexec-1/clock=event/cuda_graph=0/spin=0/copies=1"


def timed_through(python, trtexec):
    rng = np.random.default_rng(3)
    base = session(a=noisy(rng, 1.0, processes=3), b=noisy(rng, 2.0, processes=3))
    named = {
        "a": replace(base.measurement("a"), protocol=python),
        "b": replace(base.measurement("b"), protocol=trtexec),
    }
    return replace(base, measurements=named)


@pytest.mark.parametrize("statistic", ["p50", "mean", "p90", "p99"])
def test_a_ratio_across_protocols_is_refused(statistic):
    assert timed_through(PYTHON, PYTHON).ratio("b", "a", statistic).center == pytest.approx(2.0, rel=0.05)
    mixed = timed_through(PYTHON, TRTEXEC)
    for ask in (mixed.ratio, mixed.process_ratios):
        with pytest.raises(UndecidedError) as error:
            ask("b", "a", statistic)
        assert f"different protocols, '{TRTEXEC}' and '{PYTHON}'" in str(error.value) and error.value.exit_code == 4
    with pytest.raises(UndecidedError):
        mixed.low_ratio("b", "a")
    with pytest.raises(UndecidedError):
        judge(mixed, "b", "a", Budget(ratio=0.5))


def test_sessions_of_different_protocols_are_not_joined():
    first, later = timed_through(PYTHON, PYTHON), timed_through(PYTHON, TRTEXEC)
    assert len(first.joined(timed_through(PYTHON, PYTHON)).measurement("a").processes) == 6
    with pytest.raises(UndecidedError, match="timed their networks under different protocols"):
        first.joined(later)
    renamed = replace(first, protocol=f"{TRTEXEC} rank"), replace(first, protocol=f"{PYTHON} rank")
    with pytest.raises(UndecidedError, match="measured differently"):
        renamed[0].joined(renamed[1])


def test_the_protocol_of_a_measurement_is_kept_in_its_record():
    mixed = timed_through(PYTHON, TRTEXEC)
    again = Session.from_json(mixed.to_json())
    assert [m.protocol for m in again.measurements.values()] == [PYTHON, TRTEXEC]
    assert "protocol" not in json.loads(session(a=[blocks([[1]])]).to_json())["measurements"][0]
