"""What every solver promises, on made-up problems; the exact one against brute force, the others against the exact."""

from __future__ import annotations

import numpy as np
import pytest
from latency_problems import Device, block, brute_force, group, random_problem, rankings, site, table, topology

from pipeline.latency.program import narrowest
from pipeline.latency.solvers import exact, greedy
from pipeline.latency.solvers.base import added_loss
from pipeline.nouns import Dim, LatencyTable, Sensitivity, Site, SiteCost, Topology
from profiles import plugins
from profiles.errors import MissedError
from profiles.schema import PruneSpec

SPEC = PruneSpec()
NAMES = plugins.names("pipeline.latency.solvers")
SOLVERS = {name: plugins.load("pipeline.latency.solvers", name) for name in NAMES}
every_solver = pytest.mark.parametrize("name", NAMES)


def solve(name, problem, budget_ms, spec=SPEC, trial=None):
    costs, net, sensitivity = problem
    return SOLVERS[name].solve(rankings(net, sensitivity), sensitivity, costs, net, budget_ms, spec, trial)


def assert_keeps(found, problem, budget_ms):
    """On the grid, allowed, told as the table and the values tell it, and within the budget."""
    costs, net, sensitivity = problem
    assert found.predicted_ms == costs.predict(found.widths, found.dropped).ms <= budget_ms * (1 + 1e-6)
    assert found.loss == pytest.approx(added_loss(sensitivity, net, found.widths, found.dropped))
    assert set(found.widths) == {member.id for member in net.groups}
    assert all(found.widths[g.id] in costs.choices[g.id] for g in net.groups)
    assert all(found.widths[g.id] == g.size for g in net.groups if g.block in found.dropped)
    assert found.dropped <= {removable.id for removable in net.removable}


def test_the_solvers_are_found_by_file_name():
    assert NAMES == [
        "beam", "cumulative", "exact", "genetic", "greedy", "knapsack", "netadapt", "threshold", "uniform",
    ]  # fmt: skip
    assert [name for name in NAMES if SOLVERS[name].TRIES] == ["beam", "genetic", "netadapt"]


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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.75, 0.45])
@every_solver
def test_every_solver_stays_on_the_grid_and_under_the_budget(name, share, seed):
    problem = random_problem(seed)
    budget = problem[0].dense_ms * share
    try:
        best = solve("exact", problem, budget)
    except MissedError:
        with pytest.raises(MissedError):
            solve(name, problem, budget)
        return
    if name == "uniform" and share < 0.5:
        return  # removes no block, so that it may miss what others reach
    found = solve(name, problem, budget)
    assert_keeps(found, problem, budget)
    assert best.loss <= found.loss + 1e-4 * max(found.loss, 1e-6)


@pytest.mark.parametrize("off", [0.9, 1.1])
@every_solver
def test_a_trial_changes_nothing_of_what_a_solver_promises(name, off):
    problem = random_problem(1)
    budget = problem[0].dense_ms * 0.6
    device = Device(*problem, off=off)
    found = solve(name, problem, budget, trial=device)
    assert_keeps(found, problem, budget)
    asked = bool(device.losses or device.recoveries or device.measured)
    assert asked == SOLVERS[name].TRIES


@pytest.mark.parametrize("tried", [False, True])
@every_solver
def test_a_solver_gives_the_same_answer_again(name, tried):
    problem = random_problem(2)
    budget = problem[0].dense_ms * 0.55
    first, second = (solve(name, problem, budget, trial=Device(*problem) if tried else None) for _ in range(2))
    assert (first.widths, first.dropped, first.loss) == (second.widths, second.dropped, second.loss)


@every_solver
def test_a_budget_of_the_dense_network_leaves_it_dense(name):
    problem = random_problem(3)
    found = solve(name, problem, problem[0].dense_ms)
    assert found.loss == 0 and not found.dropped
    assert found.widths == {member.id: member.size for member in problem[1].groups}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_what_the_narrowest_network_keeps_is_kept(name, seed):
    problem = random_problem(seed)
    costs, net, sensitivity = problem
    least = narrowest(costs, net, SPEC, sensitivity).predicted_ms
    assert solve(name, problem, least).predicted_ms == pytest.approx(least)
    with pytest.raises(MissedError, match="the narrowest allowed network is predicted at"):
        solve(name, problem, least * 0.999)


@every_solver
def test_no_solver_removes_a_block_where_that_is_not_allowed(name):
    problem = random_problem(1)
    budget = problem[0].dense_ms * 0.6
    found = solve(name, problem, budget, PruneSpec(drop_blocks=False))
    assert_keeps(found, problem, budget)
    assert not found.dropped


WORSE = {"beam": 1.25, "genetic": 1.05, "knapsack": 1.25, "netadapt": 2.0, "greedy": 2.0}
"""Loss over the exact optimum that a solver stays below on these problems; the others go by scores or by one ratio."""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(WORSE))
def test_solvers_that_go_by_measured_values_end_near_the_optimum(name, seed):
    problem = random_problem(seed)
    budget = problem[0].dense_ms * 0.6
    assert solve(name, problem, budget).loss <= WORSE[name] * solve("exact", problem, budget).loss + 1e-9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(WORSE))
def test_solvers_that_go_by_measured_values_beat_one_ratio_for_all(name, seed):
    problem = random_problem(seed)
    budget = problem[0].dense_ms * 0.8
    assert solve(name, problem, budget).loss <= solve("uniform", problem, budget).loss


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_a_budget_below_the_narrowest_network_says_both_numbers(name):
    with pytest.raises(MissedError) as caught:
        solve(name, chain({16: 9.4, 32: 12.0}, {16: 1.0, 32: 0.0}), 8.0)
    assert caught.value.message == (
        "budget 8.0 ms cannot be met: the narrowest allowed network is predicted at 9.4 ms."
    )
    assert caught.value.hint == "lower prune.min_width or raise the budget."
    assert caught.value.exit_code == 3


def test_a_budget_below_the_fastest_uniform_network_says_that_others_may_be_faster():
    with pytest.raises(MissedError) as caught:
        solve("uniform", chain({16: 9.4, 32: 12.0}, {16: 1.0, 32: 0.0}), 8.0)
    assert caught.value.message == (
        "budget 8.0 ms cannot be met: the fastest network of one ratio for all groups is predicted at 9.4 ms."
    )
    assert "--solver exact" in str(caught.value.hint)


def test_an_infeasible_budget_close_to_the_floor_is_told_with_enough_digits():
    costs, net, sensitivity = chain({16: 0.412, 32: 0.8}, {16: 1.0, 32: 0.0})
    with pytest.raises(MissedError, match=r"budget 0\.40 ms cannot be met: .* predicted at 0\.41 ms\."):
        exact.solve([], sensitivity, costs, net, 0.401, SPEC)


def test_an_infeasible_budget_of_a_small_network_is_told_with_two_figures():
    costs, net, sensitivity = chain({16: 0.1642, 32: 0.25}, {16: 1.0, 32: 0.0})
    with pytest.raises(MissedError, match=r"budget 0\.13 ms cannot be met: .* predicted at 0\.16 ms\."):
        exact.solve([], sensitivity, costs, net, 0.1283, SPEC)


def test_between_equal_losses_the_faster_network_wins():
    costs, net, sensitivity = chain({16: 1.0, 32: 2.0, 48: 3.0}, {16: 0.5, 32: 0.5, 48: 0.0})
    assert exact.solve([], sensitivity, costs, net, 2.5, SPEC).widths == {"g": 16}


@every_solver
def test_a_wider_network_is_taken_where_it_is_the_faster_one(name):
    problem = chain({8: 2.0, 16: 1.0, 32: 3.0}, {8: 0.9, 16: 0.5, 32: 0.0})
    assert solve(name, problem, 2.5).widths == {"g": 16}


@every_solver
def test_the_correction_of_the_feedback_rounds_prices_every_choice(name):
    problem = chain({16: 1.0, 32: 2.0, 48: 3.0}, {16: 1.0, 32: 0.5, 48: 0.0}, correction=1.5)
    found = solve(name, problem, 2.9)
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


@every_solver
def test_the_grid_belongs_to_the_sum_of_groups(name):
    choices = {"a": (8, 16, 24, 32), "b": (8, 16, 24, 32)}
    joined = Dim((("a", 1), ("b", 1)))
    ms = {(v,): v / 16 for v in (16, 32, 48, 64)}
    costs = LatencyTable((SiteCost(Site("s", "test", (joined,), ("s",)), ms),), choices, 16, 4.0)
    net = topology([group("a", 32), group("b", 32)])
    losses = {"a": {8: 0.1, 16: 0.05, 24: 0.01, 32: 0.0}, "b": {8: 9.0, 16: 6.0, 24: 3.0, 32: 0.0}}
    found = solve(name, (costs, net, Sensitivity(losses, {})), 3.1)
    assert (found.widths["a"] + found.widths["b"]) % 16 == 0
    if name == "exact":
        assert found.widths == {"a": 16, "b": 32}


@every_solver
def test_a_group_that_was_never_valued_keeps_its_size(name):
    costs, net, _ = chain({16: 1.0, 32: 2.0}, {})
    with pytest.raises(MissedError):
        solve(name, (costs, net, Sensitivity({}, {})), 1.5)


@every_solver
def test_a_frozen_group_keeps_its_size(name):
    costs, _, sensitivity = chain({16: 1.0, 32: 2.0}, {16: 0.0, 32: 0.0})
    net: Topology = topology([group("g", 32, frozen="it is the output")])
    assert solve(name, (costs, net, sensitivity), 2.5).widths == {"g": 32}


@every_solver
def test_a_loss_that_is_infinite_is_avoided(name):
    problem = random_problem(1)
    costs, net, sensitivity = problem
    curves = {**sensitivity.groups, "mid2": {**sensitivity.groups["mid2"], 16: float("inf")}}
    broken = (costs, net, Sensitivity(curves, {**sensitivity.blocks, "b1": float("inf")}))
    budget = costs.dense_ms * 0.8
    found = SOLVERS[name].solve(rankings(net, sensitivity), broken[2], costs, net, budget, SPEC)
    assert found.predicted_ms <= budget * (1 + 1e-6)
    if name not in ("threshold", "cumulative", "uniform"):  # these do not look at the values
        assert np.isfinite(found.loss)


def broken(seed: int) -> tuple:
    """A problem some of whose narrower widths and blocks have infinite losses; not every width was measured."""
    costs, net, sensitivity = random_problem(seed)
    rng = np.random.default_rng(seed)
    curves = {}
    for name, curve in sensitivity.groups.items():
        between, ruined = sorted(curve)[1:-1], rng.integers(0, len(curve))
        known = {w: curve[w] if at >= ruined else float("inf") for at, w in enumerate(sorted(curve))}
        left_out = rng.choice(between) if between and rng.random() < 0.5 else None
        curves[name] = {w: loss for w, loss in known.items() if w != left_out}
    blocks = {name: float("inf") if rng.random() < 0.4 else loss for name, loss in sensitivity.blocks.items()}
    return costs, net, Sensitivity(curves, blocks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.4, 0.65])
@pytest.mark.parametrize("name", [name for name in NAMES if SOLVERS[name].VALUES])
def test_an_infinite_loss_is_chosen_only_where_no_other_fits_and_told_as_infinite(name, share, seed):
    problem = costs, net, sensitivity = broken(seed)
    budget = costs.dense_ms * share
    truth = brute_force(problem, budget)
    assert truth is not None
    found = SOLVERS[name].solve(rankings(net, random_problem(seed)[2]), sensitivity, costs, net, budget, SPEC)
    assert found.predicted_ms <= budget * (1 + 1e-6)
    assert found.loss == pytest.approx(added_loss(sensitivity, net, found.widths, found.dropped))
    assert np.isfinite(found.loss) == np.isfinite(truth.loss)


def test_the_exact_solver_takes_no_width_between_an_infinite_loss_and_a_finite_one():
    widths, sites = tuple(range(8, 257, 8)), []
    for name, ms in {"g": 100.0, "h": 1.0}.items():  # one step of g saves as much as all of h
        only = Site(name, "test", (Dim(((name, 1),)),), (name,))
        sites.append(SiteCost(only, {(width,): ms * width / 256 for width in widths}))
    costs, net = table(sites, {"g": widths, "h": widths}, 8), topology([group("g", 256), group("h", 256)])
    values = Sensitivity({"g": {8: float("inf"), 256: 0.0}, "h": {8: 5.0, 256: 0.0}}, {})
    found = exact.solve([], values, costs, net, costs.dense_ms - 0.5, SPEC)
    assert found.widths == {"g": 256, "h": 128} and found.loss == pytest.approx(values.loss("h", 128))


def test_a_cut_of_what_is_lost_already_adds_nothing_in_greedy_descent():
    costs, net, values = chain({16: 1.0, 32: 2.0, 48: 3.0}, {16: float("inf"), 32: float("inf"), 48: 0.0})
    state = greedy.Descent(values, costs, net, SPEC)
    assert state.gain((("g", 32),)) == greedy.Gain(1.0, float("inf"))
    state.apply((("g", 32),))
    assert state.gain((("g", 16),)) == greedy.Gain(1.0, 0.0)
