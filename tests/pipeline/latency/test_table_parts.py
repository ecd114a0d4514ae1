"""The parts of the table: what is offered, what is measured, how the rest is fitted, how rounds correct it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import pytest
from latency_problems import group, topology

from pipeline.latency import fit
from pipeline.latency.calibrate import adjust, draw, how_many
from pipeline.latency.choices import Rule, find_choices
from pipeline.latency.feedback import KEPT, Residual, near, recalibrate, recall, remember, remember_corrected, residuals
from pipeline.latency.grid import WIDTHS, find_grid, judge
from pipeline.latency.reference import chain
from pipeline.latency.store import Store
from pipeline.latency.timing import Clock
from pipeline.nouns import Dim, LatencyTable, Site, SiteCost
from profiles.schema import load_profile
from targets.base import load_target


def stairs(step: int, narrow: float = 1.0) -> dict[int, float]:
    """A staircase; below the first step the time is `narrow` x width / step of it."""
    curve = {w: float((-(-w // step)) ** 2) for w in WIDTHS}
    curve.update({w: narrow * w / step for w in WIDTHS if w < step and narrow < 1.0})
    return curve


# --- the grid --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 8, 16, 32])
def test_the_grid_is_the_widest_step_that_no_kernel_pays_for(step):
    finer = {"3x3": stairs(step), "1x1": stairs(min(step * 2, 32))}
    assert judge({"3x3": stairs(step), "1x1": stairs(step)}).step == step
    assert judge(finer).step == step


def test_a_smooth_device_has_a_fine_grid():
    assert judge({"3x3": {w: float(w) for w in WIDTHS}}).step == 4


def test_noise_within_a_tread_does_not_hide_it():
    rng = np.random.default_rng(0)
    noisy = {w: t * float(rng.normal(1.0, 0.01)) for w, t in stairs(16).items()}
    assert judge({"3x3": noisy}).step == 16


def test_widths_below_a_step_count_only_for_kernels_that_they_speed_up():
    grid = judge({"3x3": stairs(16, narrow=0.99), "1x1": stairs(16) | {4: 1.4, 8: 1.8}})
    assert grid.step == 16
    assert grid.below == {"3x3": (4, 8), "1x1": ()}


def test_the_grid_of_half_precision_is_found_in_half_and_kept_beside_the_other(tmp_path):
    target = load_target(load_profile("simulated"), tmp_path)
    with Store(tmp_path / "latency.sqlite") as store:
        clock = Clock(target, store)
        exact = find_grid(clock)
        once = clock.tally.measured
        half = find_grid(clock, "fp16")
        assert exact.step == half.step == target.truth.grid
        assert (clock.tally.measured, clock.tally.reused) == (2 * once, 0) and once > 0
        assert (find_grid(clock), find_grid(clock, "fp16")) == (exact, half)
        assert clock.tally.measured == 2 * once, "both are known now"


def test_convolutions_of_the_grid_are_of_the_type_that_is_asked_for():
    graph = onnx.load_from_string(chain("depthwise", 8, 16, 2, onnx.TensorProto.FLOAT16)).graph
    kinds = {t.data_type for t in graph.initializer}
    kinds |= {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT16}


# --- choices ---------------------------------------------------------------------------------------------------------


def test_a_plain_group_gets_multiples_of_the_step_and_its_size():
    dim = Dim((("a", 1),))
    found = find_choices(topology([group("a", 40)]), [dim], Rule(16, 8, {}))
    assert found.widths == {"a": (16, 32, 40)} and found.values == {dim: (16, 32, 40)}


def test_a_wide_group_gets_at_most_a_dozen_widths():
    dim = Dim((("a", 1),))
    widths = find_choices(topology([group("a", 1024)]), [dim], Rule(16, 8, {})).widths["a"]
    assert len(widths) <= 12 and widths[-1] == 1024 and all(w % 16 == 0 for w in widths)


def test_a_padded_stream_is_on_the_grid_as_a_sum_and_its_own_part_may_vanish():
    first, second = Dim((("s1", 1),)), Dim((("s1", 1), ("s2", 1)))
    rule = Rule(16, 8, {first: (8,), second: (8,)})
    found = find_choices(topology([group("s1", 16), group("s2", 16)]), [first, second], rule)
    assert found.widths == {"s1": (8, 16), "s2": (0, 8, 16)}
    assert found.values == {first: (8, 16), second: (8, 16, 32)}


def test_a_group_that_is_alone_somewhere_never_vanishes():
    alone, joined = Dim((("a", 1),)), Dim((("a", 1), ("b", 1)))
    other = Dim((("b", 1),))
    found = find_choices(topology([group("a", 32), group("b", 32)]), [alone, joined, other], Rule(16, 1, {}))
    assert found.widths == {"a": (16, 32), "b": (16, 32)}


def test_odd_sizes_in_a_sum_are_cut_so_that_the_sum_lands_on_the_grid():
    joined = Dim((("a", 1), ("b", 1)))
    found = find_choices(topology([group("a", 24), group("b", 40)]), [joined], Rule(16, 8, {}))
    assert all(value % 16 == 0 for value in found.values[joined])
    for a, b in itertools.product(found.widths["a"], found.widths["b"]):
        assert a + b in found.values[joined] or (a + b) % 16 or a + b == 0
    assert 24 in found.widths["a"] and 8 in found.widths["a"]


def test_a_frozen_group_keeps_its_size():
    dim = Dim((("a", 1), ("b", 1)))
    net = topology([group("a", 20, frozen="it is the output"), group("b", 44)])
    found = find_choices(net, [dim], Rule(16, 8, {}))
    assert found.widths["a"] == (20,) and found.widths["b"] == (12, 28, 44)


def test_flattened_channels_do_not_bind_the_grid_beyond_their_group():
    conv, flat = Dim((("a", 1),)), Dim((("a", 49),))
    found = find_choices(topology([group("a", 48)]), [conv, flat], Rule(16, 8, {conv: (8,)}))
    assert found.widths["a"] == (8, 16, 32, 48)
    assert found.values[flat] == (392, 784, 1568, 2352)


def test_units_of_several_channels_count_as_channels():
    dim = Dim((("a", 2),))
    found = find_choices(topology([group("a", 24)]), [dim], Rule(16, 8, {}))
    assert found.widths["a"] == (8, 16, 24)


# --- the fit ---------------------------------------------------------------------------------------------------------


def work(widths):
    a, b, c = widths
    return {"conv3x3": 9.0 * 64 * (a * b + b * c), "conv1x1": 64.0 * a * c, "elements": 64.0 * (b + c)}


def truth(widths):
    w = work(widths)
    return 2e-3 + 1e-8 * w["conv3x3"] + 2e-8 * w["conv1x1"] + 1e-7 * w["elements"]


AXES = [tuple(range(16, 129, 16))] * 3


def test_a_site_of_three_widths_is_known_from_five_corners():
    measured = {key: truth(key) for key in fit.plan(AXES, 16)}
    assert len(measured) == 5
    found = fit.fit(AXES, 16, work, measured)
    assert len(found.times) == 512
    errors = [abs(found.times[key] / truth(key) - 1) for key in found.times]
    assert np.median(errors) < 0.01 and max(errors) < 0.05


def test_narrow_widths_are_slices_with_corners_of_their_own():
    axes = [(8, 16, 32, 48), (16, 32, 48), (48,)]

    def odd(widths):
        return truth(widths) * (1.7 if widths[0] == 8 else 1.0)

    keys = fit.plan(axes, 16)
    assert sum(key[0] == 8 for key in keys) == 2
    found = fit.fit(axes, 16, work, {key: odd(key) for key in keys})
    assert found.times[8, 16, 48] == odd((8, 16, 48))
    assert found.times[8, 32, 48] == pytest.approx(odd((8, 32, 48)), rel=0.2)
    assert found.times[16, 32, 48] == pytest.approx(odd((16, 32, 48)), rel=0.02)


def test_few_combinations_are_all_measured_and_kept_as_they_are():
    axes = [(16, 32), (16, 32), (10,)]
    keys = fit.plan(axes, 16)
    assert sorted(keys) == sorted(itertools.product(*axes))
    times = {key: float(i + 1) for i, key in enumerate(keys)}
    assert fit.fit(axes, 16, work, times).times == {key: times[key] for key in itertools.product(*axes)}


def test_a_thousand_combinations_ask_for_the_work_of_a_few():
    asked = []

    def counted(widths):
        asked.append(widths)
        return work(widths)

    axes = [tuple(range(16, 161, 16))] * 3
    found = fit.fit(axes, 16, counted, {key: truth(key) for key in fit.plan(axes, 16)})
    assert len(found.times) == 1000 and len(asked) < 40


def test_work_that_is_no_polynomial_is_not_interpolated():
    axes = [tuple(range(16, 321, 16))] * 2

    def steps(widths):
        return {"conv": float((widths[0] // 32) ** 3 * widths[1])}

    measured = {key: 1.0 + steps(key)["conv"] for key in fit.plan(axes, 16)}
    found = fit.fit(axes, 16, steps, measured)
    assert all(time == pytest.approx(1.0 + steps(key)["conv"], rel=1e-6) for key, time in found.times.items())


def test_noisy_corners_show_in_the_misfit():
    rng = np.random.default_rng(1)
    clean = {key: truth(key) for key in fit.plan(AXES, 16)}
    noisy = {key: value * float(rng.normal(1.0, 0.1)) for key, value in clean.items()}
    assert fit.fit(AXES, 16, work, clean).misfit < 0.01 < fit.fit(AXES, 16, work, noisy).misfit


# --- whole networks and rounds -------------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_candidates_and_not_of_a_dense_network_that_outgrew_its_cache():
    rows, times = np.array([[10.0], [5.0], [4.0], [3.0], [2.0]]), [14.1, 5.6, 4.5, 3.4, 2.3]
    scale = adjust(rows, times, 0.1)
    assert scale.factors == pytest.approx([1.1]) and scale.error < 1e-6
    alone = adjust(rows[:1], times[:1], 0.1)
    assert alone.factors == pytest.approx([1.4]) and alone.error == 0.0


def some_networks(noise: float, count: int = 16):
    rng = np.random.default_rng(3)
    rows = np.vstack([np.full(4, 2.0), rng.uniform(0.2, 2.0, (count, 4))])
    true = np.array([1.1, 1.2, 1.0, 1.1])
    return rows, true, 0.1 + rows @ true * np.exp(rng.normal(0.0, noise, count + 1))


def test_a_site_whose_row_was_off_gets_a_factor_of_its_own():
    rows, true, times = some_networks(0.0)
    common = 1.0 / np.median(rows[1:].sum(axis=1) / (times[1:] - 0.1))
    found = np.abs(adjust(rows, times, 0.1).factors - true)
    assert np.all(found < 0.5 * np.abs(common - true) + 0.01) and np.abs(common - true).max() > 0.08


def test_the_error_of_a_scale_is_what_a_network_left_out_is_missed_by():
    rows, _, times = some_networks(0.02, 60)
    found = adjust(rows, times, 0.1)
    rest, _, fresh = some_networks(0.02, 400)
    missed = np.abs((0.1 + rest @ found.factors) / fresh - 1.0)
    assert 0.012 < found.error < 0.03 and np.sqrt(np.mean(missed**2)) == pytest.approx(found.error, rel=0.4)


def test_one_disturbed_network_moves_the_factors_little():
    rows, _, times = some_networks(0.003)
    before = adjust(rows, times, 0.1).factors
    times[5] *= 1.5
    assert adjust(rows, times, 0.1).factors == pytest.approx(before, rel=0.02)


def test_large_networks_are_timed_seldom():
    assert how_many(40e6, 12) == 20 and how_many(4e9, 12) == 3


def test_drawn_candidates_are_on_the_grid_and_the_same_for_the_same_seed():
    first, second = Dim((("s1", 1),)), Dim((("s1", 1), ("s2", 1)))
    net = topology([group("s1", 64), group("s2", 64)])
    sites = [Site("x", "test", (first, second), ("x",))]
    choices = find_choices(net, [first, second], Rule(16, 8, {}))
    samples = draw(net, sites, choices, 12, 5)
    assert samples == draw(net, sites, choices, 12, 5) != draw(net, sites, choices, 12, 6)
    for sample in samples:
        assert first.size(sample.widths) in choices.values[first]
        assert second.size(sample.widths) in choices.values[second]


def flat_table() -> LatencyTable:
    site = SiteCost(Site("x", "test", (Dim((("g", 1),)),), ("x",)), {(w,): w / 16 for w in range(16, 161, 16)})
    return LatencyTable((site,), {"g": tuple(range(16, 161, 16))}, 16, 10.0)


def recalibrated(table: LatencyTable, seen: list, ratio: float) -> LatencyTable:
    return recalibrate(table, residuals(table, seen), ratio)


def test_recalibration_takes_the_measured_candidates_nearest_to_the_budget():
    table = flat_table()
    near = [({"g": 16 * k}, (), 0.11 * k) for k in range(1, 7)]
    assert recalibrated(table, [*near, ({"g": 160}, (), 2.0)], 0.2).predict({"g": 32}).ms == pytest.approx(2.2)
    assert recalibrated(table, [({"g": 160}, (), 2.0)], 0.2).correction == pytest.approx(2.0)


def test_recalibrating_twice_is_recalibrating_once_and_candidates_off_the_grid_tell_nothing():
    measured = [({"g": 32}, (), 0.26), ({"g": 48}, (), 0.36)]
    once = recalibrated(flat_table(), measured, 0.3)
    assert recalibrated(once, measured, 0.3) == once == recalibrated(once, [*measured, ({"g": 17}, (), 5.0)], 0.3)
    assert recalibrated(once, [], 0.3) == once


def test_a_correction_is_that_of_the_candidates_most_alike():
    seen = [Residual({"a": 8, "b": 8}, frozenset(), 0.5, 0.1), Residual({"a": 8, "b": 64}, frozenset({"x"}), 0.5, -0.1)]
    table = flat_table()
    for choice, log in (((8, frozenset()), (0.1 - 0.1 / 9) / (1 + 1 / 9)), ((32, frozenset({"x"})), 0.1 / 9 - 0.1 / 4)):
        width, dropped = choice
        weight = 1.0 if width == 8 else 1 / 9 + 1 / 4
        wanted = log if width == 8 else log / weight
        found = near(table, seen, {"a": 8, "b": width}, dropped)
        assert math.log(found.correction) == pytest.approx(wanted)
    assert near(table, [], {"a": 8}, frozenset()) == table


def test_candidates_are_remembered_once_by_device_protocol_and_network_and_the_latest_are_kept(tmp_path):
    seen = [({"g": 32}, frozenset({"b", "a"}), 0.25)]
    with Store(tmp_path / "latency.sqlite") as store:
        for _ in range(2):
            remember(store, "device", "p50", "dense", seen)
        assert recall(store, "device", "p50", "dense") == [({"g": 32}, ("a", "b"), 0.25)]
        assert recall(store, "device", "p99", "dense") == recall(store, "other", "p50", "dense") == []
        remember(store, "device", "p50", "dense", [({"g": k}, (), 0.5) for k in range(KEPT)])
        assert recall(store, "device", "p50", "dense") == [({"g": k}, (), 0.5) for k in range(KEPT)]
        remember(store, "device", "p50", "dense", [({"g": 3}, (), 0.45), ({"g": 3}, (), 0.46)])
        remember_corrected(store, "device", "p50", "dense", ({"g": 3}, frozenset(), 0.6))
        found = recall(store, "device", "p50", "dense")
        assert [ratio for widths, _, ratio in found if widths == {"g": 3}] == [0.6] and len(found) == KEPT - 2
