"""The solvers against brute force, and what each of them promises."""

from __future__ import annotations

import numpy as np
import pytest
from latency_problems import block, brute_force, group, random_problem, site, table, topology

from pipeline.latency.program import narrowest
from pipeline.latency.solvers import exact
from pipeline.nouns import Dim, LatencyTable, Sensitivity, Site, SiteCost, Topology
from profiles import plugins
from profiles.errors import MissedError
from profiles.schema import PruneSpec

SPEC = PruneSpec()
SOLVERS = [plugins.load("pipeline.latency.solvers", name) for name in plugins.names("pipeline.latency.solvers")]


def test_the_three_solvers_are_found_by_file_name():
    assert plugins.names("pipeline.latency.solvers") == ["exact", "greedy", "uniform"]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.35, 0.6, 0.85])
def test_the_exact_solver_finds_what_brute_force_finds(seed, share):
    costs, net, sensitivity = random_problem(seed)
    budget = costs.dense_ms * share
    truth = brute_force((costs, net, sensitivity), budget)
    if truth is None:
        with pytest.raises(MissedError):
            exact.solve([], sensitivity, costs, net, budget, SPEC)
        return
    found = exact.solve([], sensitivity, costs, net, budget, SPEC)
    assert found.predicted_ms <= budget * (1 + 1e-6)
    assert found.loss == pytest.approx(truth.loss, rel=2e-4, abs=1e-6)
    assert found.gap is not None and found.gap <= 1e-4
    assert found.predicted_ms == costs.predict(found.widths, found.dropped).ms


@pytest.mark.parametrize("seed", range(6))
def test_without_block_removal_the_exact_solver_keeps_every_block(seed):
    costs, net, sensitivity = random_problem(seed)
    spec = PruneSpec(drop_blocks=False)
    truth = brute_force((costs, net, sensitivity), costs.dense_ms * 0.6, blocks=False)
    found = exact.solve([], sensitivity, costs, net, costs.dense_ms * 0.6, spec)
    assert truth is not None and not found.dropped
    assert found.loss == pytest.approx(truth.loss, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_every_solver_stays_on_the_grid_and_under_the_budget(solver, seed):
    costs, net, sensitivity = random_problem(seed)
    budget = costs.dense_ms * 0.75
    found = solver.solve([], sensitivity, costs, net, budget, SPEC)
    assert found.predicted_ms <= budget * (1 + 1e-6)
    assert found.predicted_ms == costs.predict(found.widths, found.dropped).ms
    best = exact.solve([], sensitivity, costs, net, budget, SPEC)
    assert best.loss <= found.loss + 1e-4 * max(found.loss, 1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_narrowest_network_is_the_least_latency_of_all(seed):
    costs, net, sensitivity = random_problem(seed)
    least = narrowest(costs, net, SPEC, sensitivity)
    assert brute_force((costs, net, sensitivity), least.predicted_ms * (1 - 1e-6)) is None
    assert brute_force((costs, net, sensitivity), least.predicted_ms * (1 + 1e-6)) is not None


def chain(ms: dict[int, float], losses: dict[int, float], correction: float = 1.0) -> tuple:
    only = SiteCost(Site("only", "test", (Dim((("g", 1),)),), ("only",)), {(w,): t for w, t in ms.items()})
    costs = LatencyTable((only,), {"g": tuple(sorted(ms))}, 16, max(ms.values()), correction=correction)
    return costs, topology([group("g", max(ms))]), Sensitivity({"g": losses}, {})


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda module: module.__name__.rsplit(".", 1)[-1])
def test_a_budget_below_the_narrowest_network_says_both_numbers(solver):
    costs, net, sensitivity = chain({16: 9.4, 32: 12.0}, {16: 1.0, 32: 0.0})
    with pytest.raises(MissedError) as caught:
        solver.solve([], sensitivity, costs, net, 8.0, SPEC)
    assert caught.value.message == (
        "budget 8.0 ms cannot be met: the narrowest allowed network is predicted at 9.4 ms."
    )
    assert caught.value.hint == "lower prune.min_width or raise the budget."
    assert caught.value.exit_code == 3


def test_an_infeasible_budget_close_to_the_floor_is_told_with_enough_digits():
    costs, net, sensitivity = chain({16: 0.412, 32: 0.8}, {16: 1.0, 32: 0.0})
    with pytest.raises(MissedError, match=r"budget 0\.40 ms cannot be met: .* predicted at 0\.41 ms\."):
        exact.solve([], sensitivity, costs, net, 0.401, SPEC)


def test_between_equal_losses_the_faster_network_wins():
    costs, net, sensitivity = chain({16: 1.0, 32: 2.0, 48: 3.0}, {16: 0.5, 32: 0.5, 48: 0.0})
    assert exact.solve([], sensitivity, costs, net, 2.5, SPEC).widths == {"g": 16}


def test_a_wider_network_is_taken_where_it_is_the_faster_one():
    costs, net, sensitivity = chain({8: 2.0, 16: 1.0, 32: 3.0}, {8: 0.9, 16: 0.5, 32: 0.0})
    for solver in SOLVERS:
        assert solver.solve([], sensitivity, costs, net, 2.5, SPEC).widths == {"g": 16}


def test_the_correction_of_the_feedback_rounds_prices_every_choice():
    costs, net, sensitivity = chain({16: 1.0, 32: 2.0, 48: 3.0}, {16: 1.0, 32: 0.5, 48: 0.0}, correction=1.5)
    for solver in SOLVERS:
        found = solver.solve([], sensitivity, costs, net, 2.9, SPEC)
        assert found.widths == {"g": 16} and found.predicted_ms == pytest.approx(1.5)


def test_groups_inside_a_removed_block_cost_nothing():
    rng = np.random.default_rng(0)
    choices = {"s": (16,), "m": (16, 32)}
    stream, mid = Dim((("s", 1),)), Dim((("m", 1),))
    costs = table([site(rng, "b", [stream, mid], choices, 16, "b")], choices)
    net = topology([group("s", 16), group("m", 32, "b")], [block("b")])
    sensitivity = Sensitivity({"s": {16: 0.0}, "m": {16: 5.0, 32: 0.0}}, {"b": 1.0})
    found = exact.solve([], sensitivity, costs, net, 0.2, SPEC)
    assert found.dropped == {"b"} and found.loss == 1.0 and found.widths["m"] == 32


def test_the_grid_belongs_to_the_sum_of_groups():
    choices = {"a": (8, 16, 24, 32), "b": (8, 16, 24, 32)}
    joined = Dim((("a", 1), ("b", 1)))
    ms = {(v,): v / 16 for v in (16, 32, 48, 64)}
    costs = LatencyTable((SiteCost(Site("s", "test", (joined,), ("s",)), ms),), choices, 16, 4.0)
    net = topology([group("a", 32), group("b", 32)])
    losses = {"a": {8: 0.1, 16: 0.05, 24: 0.01, 32: 0.0}, "b": {8: 9.0, 16: 6.0, 24: 3.0, 32: 0.0}}
    for solver in SOLVERS:
        found = solver.solve([], Sensitivity(losses, {}), costs, net, 3.1, SPEC)
        assert (found.widths["a"] + found.widths["b"]) % 16 == 0
    assert exact.solve([], Sensitivity(losses, {}), costs, net, 3.1, SPEC).widths == {"a": 16, "b": 32}


def test_a_group_that_was_never_valued_keeps_its_size():
    costs, net, _ = chain({16: 1.0, 32: 2.0}, {})
    with pytest.raises(MissedError):
        exact.solve([], Sensitivity({}, {}), costs, net, 1.5, SPEC)


def test_a_frozen_group_keeps_its_size():
    costs, _, sensitivity = chain({16: 1.0, 32: 2.0}, {16: 0.0, 32: 0.0})
    net: Topology = topology([group("g", 32, frozen="it is the output")])
    assert exact.solve([], sensitivity, costs, net, 2.5, SPEC).widths == {"g": 32}
