"""What each of the searching solvers does beyond the contract: its own rule, against a plain reading of it."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from latency_problems import Device, block, group, random_problem, rankings, site, table, topology

from pipeline.latency.solvers import beam, cumulative, exact, genetic, greedy, knapsack, netadapt, threshold, uniform
from pipeline.latency.solvers._lattice import WORST, Lattice
from pipeline.nouns import Dim, LatencyTable, Layer, Ranking, Sensitivity, Site, SiteCost, Topology
from profiles.errors import MissedError
from profiles.schema import PruneSpec

SPEC = PruneSpec()


def layered(ms: dict[str, float], size: int = 8, block_of: dict[str, str] | None = None) -> tuple:
    """Groups of the same size, each with a site of its own of so many ms a unit, at every width; values are 0."""
    homes, choices, sites = block_of or {}, {}, []
    for name, each in ms.items():
        choices[name] = tuple(range(1, size + 1))
        costs = {(width,): each * width for width in choices[name]}
        gone = dict.fromkeys(costs, 0.0) if name in homes else {}
        sites.append(SiteCost(Site(name, "test", (Dim(((name, 1),)),), (name,), homes.get(name)), costs, gone))
    costs = LatencyTable(tuple(sites), choices, 1, sum(ms.values()) * size)
    net = topology([group(name, size, homes.get(name)) for name in ms], [block(name) for name in set(homes.values())])
    curves = {name: {1: 0.0, size: 0.0} for name in ms}
    return costs, net, Sensitivity(curves, dict.fromkeys(homes.values(), 0.0))


def scored(name: str, scores: list[float], weight: float = 1.0) -> Ranking:
    return Ranking(name, tuple(range(len(scores))), tuple(scores), weight=weight)


# --- points ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_points_cost_what_the_table_and_the_values_say(seed):
    costs, net, sensitivity = random_problem(seed)
    lattice = Lattice(sensitivity, costs, net, SPEC)
    rng = np.random.default_rng(seed)
    flags = [(0, 1)] * len(lattice.blocks)
    every = np.array(list(itertools.product(*(range(count) for count in lattice.counts), *flags)))
    points = np.unique(lattice.settle(every[rng.choice(len(every), 400, replace=False)]), axis=0)
    known = 0
    for point, ms, loss in zip(points, lattice.ms(points), lattice.loss(points), strict=True):
        widths, dropped = lattice.choice(point)
        assert (lattice.point(widths, dropped) == point).all()
        try:
            predicted = costs.predict(widths, dropped).ms
        except KeyError:
            assert np.isinf(ms)
            continue
        known += 1
        assert ms == pytest.approx(predicted)
        assert loss == pytest.approx(lattice.solution(point).loss)
    assert 50 < known < len(points)


def test_moves_are_all_single_changes_on_the_grid_with_what_they_save_and_add():
    costs, net, sensitivity = random_problem(1)
    lattice = Lattice(sensitivity, costs, net, SPEC)
    moves = lattice.moves(lattice.dense)
    found = {tuple(point) for point in moves.points}
    expected = set()
    for column, entry in ((c, e) for c in range(len(lattice.dense)) for e in range(4)):
        point = lattice.dense.copy()
        point[column] = entry
        inside = entry < (lattice.counts[column] if column < len(lattice.groups) else 2)
        if inside and (point != lattice.dense).any() and np.isfinite(lattice.ms(point[None])[0]):
            expected.add(tuple(point))
    assert found == expected
    dense_ms = costs.predict({member.id: member.size for member in net.groups}).ms
    assert moves.saved + moves.ms == pytest.approx(dense_ms)
    assert moves.added == pytest.approx(lattice.loss(moves.points))


def test_groups_that_cannot_move_alone_move_in_pairs():
    joined = Dim((("a", 1), ("b", 1)))
    costs = LatencyTable(
        (SiteCost(Site("s", "test", (joined,), ("s",)), {(16,): 1.0, (32,): 2.0}),),
        {"a": (8, 16), "b": (8, 16)},
        16,
        2.0,
    )
    losses = Sensitivity({name: {8: 1.0, 16: 0.0} for name in "ab"}, {})
    lattice = Lattice(losses, costs, topology([group("a", 16), group("b", 16)]), SPEC)
    moves = lattice.moves(lattice.dense)
    assert {tuple(point) for point in moves.points} == {(0, 0)} and moves.saved.tolist() == [1.0, 1.0]


def test_infinite_values_become_large_numbers():
    costs, net, _ = layered({"a": 1.0})
    lattice = Lattice(Sensitivity({"a": {1: float("inf"), 8: 0.0}}, {}), costs, net, SPEC)
    assert lattice.losses.max() == WORST and lattice.losses[0, -1] == 0


# --- threshold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_the_threshold_is_the_lowest_whose_network_fits(share):
    problem = costs, net, sensitivity = layered({"a": 1.0, "b": 0.5, "c": 2.0})
    rng = np.random.default_rng(4)
    ranked = [scored(name, sorted(rng.random(8).tolist())) for name in "abc"]
    budget = share * costs.dense_ms
    found = threshold.solve(ranked, sensitivity, costs, net, budget, SPEC)
    expected = None
    for limit in sorted({score for ranking in ranked for score in ranking.marginal_loss}):
        widths = {r.group: max(1, sum(score > limit for score in r.marginal_loss)) for r in ranked}
        if costs.predict(widths).ms <= budget:
            expected = widths
            break
    assert expected is not None and found.widths == expected
    assert found.predicted_ms < problem[0].dense_ms


def test_a_ranking_s_weight_raises_the_scores_of_its_group():
    costs, net, sensitivity = layered({"a": 1.0, "b": 1.0})
    scores = [float(i) for i in range(1, 9)]

    def widths(weight: float) -> dict[str, int]:
        ranked = [scored("a", scores, weight), scored("b", scores)]
        return dict(threshold.solve(ranked, sensitivity, costs, net, 12.0, SPEC).widths)

    assert widths(1.0) == {"a": 6, "b": 6}
    assert widths(100.0) == {"a": 8, "b": 4}


def test_a_unit_goes_only_after_those_that_rank_below_it():
    costs, net, sensitivity = layered({"a": 1.0, "b": 1.0})
    rising = scored("a", [5.0, 0.0, 0.0, 0.0, 6.0, 7.0, 8.0, 9.0])
    flat = scored("b", [1.0, 2.0, 3.0, 4.0, 10.0, 11.0, 12.0, 13.0])
    found = threshold.solve([rising, flat], sensitivity, costs, net, 12.0, SPEC)
    assert found.widths == {"a": 8, "b": 4}


def test_scores_are_divided_by_what_a_unit_costs():
    costs, net, sensitivity = layered({"slow": 3.0, "fast": 1.0})
    scores = [float(i) for i in range(1, 9)]
    ranked = [scored("slow", scores), scored("fast", scores)]

    def widths(normalise: str) -> dict[str, int]:
        spec = PruneSpec(normalise=normalise)
        return dict(threshold.solve(ranked, sensitivity, costs, net, 23.0, spec).widths)

    assert widths("none") == {"slow": 5, "fast": 6}
    assert widths("ms") == {"slow": 5, "fast": 7}


def test_the_cost_of_a_unit_is_counted_or_read_from_the_table():
    costs, net, sensitivity = layered({"a": 0.25, "b": 0.5})
    first, second = np.arange(8, dtype=np.int32), np.arange(8, 16, dtype=np.int32)
    groups = (group("a", 8), type(net.groups[0])("b", "b", tuple(range(8, 16)), ()))
    layers = (
        Layer("one", (8, 3, 3, 3), 100, 0, 100),
        Layer("two", (8, 8, 1, 1), 25, 0, 25),
        Layer("head", (10, 8), 1, 0, 1),
    )
    params = {"one": {0: first}, "two": {0: second, 1: first}, "head": {1: second}}
    lattice = Lattice(sensitivity, costs, Topology(groups, (), params, (), (), layers), SPEC)
    assert threshold.unit_costs(lattice, "none").tolist() == [1, 1]
    assert threshold.unit_costs(lattice, "macs").tolist() == [27 * 100 + 8 * 25, 8 * 25 + 10]
    assert threshold.unit_costs(lattice, "memory").tolist() == [100, 25]
    assert threshold.unit_costs(lattice, "ms") == pytest.approx([0.25, 0.5])


def test_a_cost_within_the_noise_of_its_own_rows_is_that_of_what_is_written():
    """The median of the other groups: 0.01 ms for each of its elements."""
    costs, net, sensitivity = layered({"a": 0.25, "b": 0.5, "c": 0.0})
    rng, sites = np.random.default_rng(0), []
    for cost in costs.sites:
        noisy = {key: ms + float(rng.normal(0, 0.05)) if cost.site.id == "c" else ms for key, ms in cost.ms.items()}
        sites.append(dataclasses.replace(cost, ms=noisy))
    own = {id: np.arange(8 * i, 8 * i + 8, dtype=np.int32) for i, id in enumerate("abc")}
    groups = tuple(type(net.groups[0])(id, id, tuple(units.tolist()), ()) for id, units in own.items())
    layers = tuple(Layer(id, (8, 3, 3, 3), 1, 0, written) for id, written in {"a": 25, "b": 50, "c": 10}.items())
    known = Topology(groups, (), {id: {0: units} for id, units in own.items()}, (), (), layers)
    lattice = Lattice(sensitivity, dataclasses.replace(costs, sites=tuple(sites)), known, SPEC)
    assert threshold.unit_costs(lattice, "ms") == pytest.approx([0.25, 0.5, 0.1])


def test_a_unit_that_saves_nothing_stays():
    costs, net, sensitivity = layered({"a": 0.0, "b": 1.0})
    ranked = [scored("a", [0.1] * 8), scored("b", [1.0 + i for i in range(8)])]
    found = threshold.solve(ranked, sensitivity, costs, net, 3.0, PruneSpec(normalise="ms"))
    assert found.widths == {"a": 8, "b": 3}


def test_the_slope_of_groups_that_move_in_pairs_is_that_of_the_pair():
    joined = Dim((("a", 1), ("b", 1)))
    ms = {(16,): 1.0, (32,): 2.0}
    costs = LatencyTable((SiteCost(Site("s", "test", (joined,), ("s",)), ms),), {"a": (8, 16), "b": (8, 16)}, 16, 2.0)
    losses = Sensitivity({name: {8: 1.0, 16: 0.0} for name in "ab"}, {})
    lattice = Lattice(losses, costs, topology([group("a", 16), group("b", 16)]), SPEC)
    assert threshold.unit_costs(lattice, "ms") == pytest.approx([1 / 16, 1 / 16])


def test_a_block_goes_only_when_every_unit_inside_lies_under_the_threshold():
    costs, net, sensitivity = layered({"in1": 1.0, "in2": 1.0, "out": 1.0}, block_of={"in1": "b", "in2": "b"})
    low, high = [0.1 * i for i in range(1, 9)], [1.0 + 0.1 * i for i in range(8)]
    both = [scored("in1", low), scored("in2", low), scored("out", high)]
    found = threshold.solve(both, sensitivity, costs, net, 8.5, SPEC)
    assert found.dropped == {"b"} and found.widths == {"in1": 8, "in2": 8, "out": 8}
    kept = threshold.solve(both, sensitivity, costs, net, 8.5, PruneSpec(drop_blocks=False))
    assert not kept.dropped and kept.widths == {"in1": 1, "in2": 1, "out": 6}
    one = [scored("in1", low), scored("in2", [*low[:-1], 9.0]), scored("out", high)]
    assert not threshold.solve(one, sensitivity, costs, net, 8.5, SPEC).dropped


@pytest.mark.parametrize("solver", [threshold, cumulative])
def test_a_group_without_a_ranking_keeps_its_size(solver):
    costs, net, sensitivity = layered({"a": 1.0, "b": 1.0})
    found = solver.solve([scored("b", [1.0] * 7 + [2.0])], sensitivity, costs, net, 10.0, SPEC)
    assert found.widths == {"a": 8, "b": 2}


@pytest.mark.parametrize("solver", [threshold, cumulative])
@pytest.mark.parametrize("scores", [[1.0] * 8, [0.0] * 7 + [1.0], [0.0] * 8])
def test_of_units_with_equal_scores_no_more_go_than_the_budget_needs(solver, scores):
    costs, net, sensitivity = layered({"a": 1.0, "b": 1.0, "c": 1.0})
    ranked = [scored(name, scores) for name in "cab"]
    for budget, left in ((23.0, (7, 8, 8)), (15.0, (5, 5, 5)), (14.5, (4, 5, 5)), (13.0, (4, 4, 5))):
        found = solver.solve(ranked, sensitivity, costs, net, budget, SPEC)
        assert tuple(found.widths[name] for name in "abc") == left


@pytest.mark.parametrize("solver", [threshold, cumulative])
def test_groups_of_unequal_size_and_equal_scores_lose_equal_shares(solver):
    choices = {"small": tuple(range(1, 5)), "large": tuple(range(1, 17))}
    sites = [
        SiteCost(Site(name, "test", (Dim(((name, 1),)),), (name,)), {(width,): float(width) for width in widths})
        for name, widths in choices.items()
    ]
    costs, net = LatencyTable(tuple(sites), choices, 1, 20.0), topology([group("small", 4), group("large", 16)])
    values = Sensitivity({name: {1: 0.0, widths[-1]: 0.0} for name, widths in choices.items()}, {})
    ranked = [scored("small", [1.0] * 4), scored("large", [1.0] * 16)]
    assert solver.solve(ranked, values, costs, net, 10.0, SPEC).widths == {"small": 2, "large": 8}


@pytest.mark.parametrize("solver", [threshold, cumulative])
def test_the_narrowest_network_is_taken_where_scores_do_not_reach_the_budget(solver):
    costs, net, sensitivity = layered({"a": 1.0, "b": 1.0})
    found = solver.solve([], sensitivity, costs, net, 3.0, SPEC)
    assert found.widths == {"a": 1, "b": 1}


@pytest.mark.parametrize("solver", [threshold, cumulative])
@pytest.mark.parametrize("seed", range(4))
def test_widths_off_the_grid_of_a_sum_are_moved_to_the_nearest_choice_on_it(solver, seed):
    costs, net, sensitivity = random_problem(seed)
    ranked = rankings(net, sensitivity, seed)
    for share in (0.9, 0.8, 0.7, 0.6, 0.5):
        try:
            found = solver.solve(ranked, sensitivity, costs, net, share * costs.dense_ms, SPEC)
        except MissedError:
            continue
        padded = found.widths["stem"] + found.widths["wide"]
        assert padded % 16 == 0 and (padded + found.widths["cat"]) % 16 == 0
        assert uniform.on_grid(costs, found.widths)


def test_the_nearest_choice_on_the_grid_counts_as_the_network_of_a_threshold():
    choices = {"a": (8, 16, 24, 28, 32), "b": (16, 32)}
    ms = {(total,): total / 16 for total in (16, 32, 48, 64)}
    only = SiteCost(Site("s", "test", (Dim((("a", 1), ("b", 1))),), ("s",)), ms)
    costs, net = LatencyTable((only,), choices, 16, 4.0), topology([group("a", 32), group("b", 32)])
    values = Sensitivity({name: {8: 1.0, 32: 0.0} for name in "ab"}, {})
    ranked = [scored("a", [1.0] * 4 + [3.0] * 12 + [9.0] * 16), scored("b", [2.0] * 16 + [9.0] * 16)]
    found = threshold.solve(ranked, values, costs, net, 3.1, SPEC)
    assert found.widths == {"a": 32, "b": 16}, "28 + 16 is nearest to 48, which fits; 16 + 16 is the next on the grid"


# --- cumulative ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_each_group_keeps_the_fewest_top_units_that_hold_more_than_tau(share):
    costs, net, sensitivity = layered({"a": 1.0, "b": 0.5, "c": 2.0})
    rng = np.random.default_rng(5)
    ranked = [
        scored(name, sorted(rng.lognormal(0, spread, 8).tolist()))
        for name, spread in zip("abc", (0.2, 1, 2), strict=True)
    ]
    budget = share * costs.dense_ms
    found = cumulative.solve(ranked, sensitivity, costs, net, budget, SPEC)

    def kept(ranking: Ranking, tau: float) -> int:
        top = ranking.marginal_loss[::-1]
        return next((k for k in range(1, 9) if sum(top[:k]) > tau * sum(top)), 8)

    for tau in np.linspace(1.0, 0.0, 5001):
        widths = {ranking.group: kept(ranking, tau) for ranking in ranked}
        if costs.predict(widths).ms <= budget:
            assert found.widths == widths
            return
    raise AssertionError("no tau fits")


def test_only_shares_of_the_scores_count():
    costs, net, sensitivity = layered({"a": 1.0, "b": 1.0})
    scores = [float(i) ** 2 for i in range(1, 9)]
    answers = []
    for scale, weight, normalise in ((1.0, 1.0, "none"), (1e6, 1.0, "none"), (1.0, 50.0, "ms")):
        ranked = [scored("a", [scale * score for score in scores], weight), scored("b", scores)]
        spec = PruneSpec(normalise=normalise)
        answers.append(dict(cumulative.solve(ranked, sensitivity, costs, net, 10.0, spec).widths))
    assert answers[0] == answers[1] == answers[2] == {"a": 5, "b": 5}


def test_a_group_of_no_scores_is_shared_out_by_count_and_strong_units_stay_alone():
    costs, net, sensitivity = layered({"none": 1.0, "few": 1.0})
    ranked = [scored("none", [0.0] * 8), scored("few", [0.01] * 6 + [5.0, 5.0])]
    found = cumulative.solve(ranked, sensitivity, costs, net, 10.0, SPEC)
    assert found.widths == {"none": 8, "few": 2}
    assert cumulative.solve(ranked, sensitivity, costs, net, 7.0, SPEC).widths == {"none": 5, "few": 2}


# --- knapsack --------------------------------------------------------------------------------------------------------


def separable(seed: int) -> tuple:
    """Groups whose sites see them alone, so that prices do not interact, and two removable blocks."""
    rng = np.random.default_rng(seed)
    homes = {"b": "one", "c": "one", "e": "two"}
    costs, net, _ = layered(dict.fromkeys("abcdef", 1.0), size=6, block_of=homes)
    sites = []
    for cost in costs.sites:
        ms = {key: float(key[0] * rng.uniform(0.7, 1.3)) for key in cost.ms}
        sites.append(SiteCost(cost.site, ms, cost.dropped_ms))
    table = LatencyTable(tuple(sites), costs.choices, 1, sum(cost.ms[(6,)] for cost in sites))
    curves = {
        name: {width: float(rng.uniform(0.2, 2.0) * (1 - width / 6) ** 1.5) for width in range(1, 7)}
        for name in "abcdef"
    }
    return table, net, Sensitivity(curves, {"one": float(rng.uniform(0.5, 3)), "two": float(rng.uniform(0.2, 1.5))})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.7, 0.4])
def test_where_prices_do_not_interact_the_knapsack_is_exact(seed, share):
    costs, net, sensitivity = separable(seed)
    budget = share * costs.dense_ms
    found = knapsack.solve([], sensitivity, costs, net, budget, SPEC)
    best = exact.solve([], sensitivity, costs, net, budget, SPEC)
    assert found.loss == pytest.approx(best.loss, rel=5e-3)


def test_the_knapsack_removes_a_block_that_is_worth_more_gone():
    costs, net, sensitivity = separable(0)
    cheap = Sensitivity(sensitivity.groups, {"one": 0.01, "two": 9.0})
    found = knapsack.solve([], cheap, costs, net, 0.6 * costs.dense_ms, SPEC)
    assert found.dropped == {"one"} and found.widths["b"] == found.widths["c"] == 6
    lattice = Lattice(cheap, costs, net, SPEC)
    packed = knapsack._packed(lattice, lattice.dense, 0.6 * costs.dense_ms)
    assert lattice.choice(packed)[1] == {"one"}, "the programme itself, before single moves"


def test_options_that_leave_the_grid_together_end_on_it():
    choices, ms = {"a": (16, 32), "b": (16, 32)}, {(48,): 3.0, (64,): 4.0}
    only = SiteCost(Site("s", "test", (Dim((("a", 1), ("b", 1))),), ("s",)), ms)
    costs, net = LatencyTable((only,), choices, 16, 4.0), topology([group("a", 32), group("b", 32)])
    values = Sensitivity({name: {16: 1.0, 32: 0.0} for name in "ab"}, {})
    lattice = Lattice(values, costs, net, SPEC)
    items = knapsack._items(lattice, lattice.dense)
    packed = knapsack._taken(lattice, lattice.dense, items, [0, 0])
    assert sum(lattice.choice(packed)[0].values()) == 48, "16 + 16 is not in the table"


def test_options_that_another_one_beats_are_left_out():
    start = knapsack.STAY.also(
        np.array([-1.0, -1.0, -2.0]), np.array([0.5, 0.4, 0.4]), [((0, 1),), ((0, 2),), ((0, 3),)]
    )
    assert start.ms.tolist() == [-2, 0] and start.loss.tolist() == [0.4, 0] and start.entries == (((0, 3),), ())
    other = knapsack.STAY.also(np.array([-1.0]), np.array([0.3]), [((1, 0),)])
    both = start.joined(other)
    assert both.ms.tolist() == [-3, -2, -1, 0] and both.loss.tolist() == pytest.approx([0.7, 0.4, 0.3, 0])
    assert both.entries == (((0, 3), (1, 0)), ((0, 3),), ((1, 0),), ())


# --- netadapt --------------------------------------------------------------------------------------------------------


def test_a_group_proposes_its_widest_choice_that_saves_enough():
    costs, net, sensitivity = layered({"a": 1.0, "b": 0.4, "c": 0.1})
    lattice = Lattice(sensitivity, costs, net, SPEC)
    proposals = netadapt._proposals(lattice, lattice.dense, 1.5)
    widths = [lattice.choice(point)[0] for point in proposals.points]
    assert sorted(w["a"] for w in widths) == [6, 8] and sorted(w["b"] for w in widths) == [4, 8]
    assert all(w["c"] == 8 for w in widths), "its narrowest width saves 0.7 ms"
    assert len(netadapt._proposals(lattice, lattice.dense, 50.0).points) == 1, "what saves most, where none reaches"


def test_the_best_proposal_is_found_by_trying():
    costs, net, _ = layered({"a": 1.0, "b": 1.0})
    believed = Sensitivity({"a": {1: 0.7, 8: 0.0}, "b": {1: 1.4, 8: 0.0}}, {})
    device = Device(costs, net, believed)
    device.true = Sensitivity({"a": {1: 9.0, 8: 0.0}, "b": {1: 0.1, 8: 0.0}}, {})
    assert netadapt.solve([], believed, costs, net, 12.0, SPEC).widths == {"a": 4, "b": 8}
    assert netadapt.solve([], believed, costs, net, 11.0, SPEC, device).widths == {"a": 8, "b": 3}
    assert device.recoveries and not device.losses


@pytest.mark.parametrize("seed", range(4))
def test_netadapt_goes_on_while_the_target_does_not_keep_the_budget(seed):
    costs, net, sensitivity = random_problem(seed)
    budget = 0.7 * costs.dense_ms
    device = Device(costs, net, sensitivity, off=1.15)
    found = netadapt.solve([], sensitivity, costs, net, budget, SPEC, device)
    assert device.measure([found])[0] <= budget * (1 + 1e-6)
    assert 2 <= len(device.measured) <= netadapt.CHECKS + 1
    most = (netadapt.ROUNDS + netadapt.CHECKS * netadapt.FURTHER) * netadapt.JUDGED + netadapt.CHECKS + 1
    assert len(device.recoveries) <= most


# --- beam ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0.9, 1.0, 1.15])
@pytest.mark.parametrize("seed", [1, 3, 5])
def test_the_beam_ends_with_a_network_that_was_measured_to_keep_the_budget(seed, off):
    costs, net, sensitivity = random_problem(seed)
    budget = 0.7 * costs.dense_ms
    device = Device(costs, net, sensitivity, seed, off, wobble=0.08)
    found = beam.solve([], sensitivity, costs, net, budget, SPEC, device)
    assert len(device.measured) <= (beam.LEVELS + beam.FURTHER) * beam.MEASURED
    assert len(device.losses) <= ((beam.LEVELS + beam.FURTHER) * beam.BEAM + 1) * beam.CHILDREN
    assert device._key(found) in device.measured
    assert device.measure([found])[0] <= budget * (1 + 1e-6)


def test_the_beam_finds_what_the_values_do_not_know():
    better = []
    for seed in range(6):
        costs, net, sensitivity = random_problem(seed)
        budget, device = 0.6 * costs.dense_ms, Device(costs, net, sensitivity, seed)
        blind = beam.solve([], sensitivity, costs, net, budget, SPEC)
        found = beam.solve([], sensitivity, costs, net, budget, SPEC, device)
        better.append(device.loss(blind) - device.loss(found))
    assert np.mean(better) > 0 and max(better) > 0.05


def test_the_beam_is_no_worse_than_greedy_by_the_values():
    for seed in range(8):
        costs, net, sensitivity = random_problem(seed)
        budget = 0.6 * costs.dense_ms
        one = greedy.solve([], sensitivity, costs, net, budget, SPEC)
        assert beam.solve([], sensitivity, costs, net, budget, SPEC).loss <= one.loss + 1e-9


# --- genetic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_trying_the_best_few_never_ends_with_a_worse_one_than_the_values_choose(seed):
    costs, net, sensitivity = random_problem(seed)
    budget, device = 0.6 * costs.dense_ms, Device(costs, net, sensitivity, seed)
    blind = genetic.solve([], sensitivity, costs, net, budget, SPEC)
    found = genetic.solve([], sensitivity, costs, net, budget, SPEC, device)
    assert 1 < len(device.losses) <= genetic.TURNS * genetic.JUDGED
    assert device.loss(found) == min(device.losses.values()) <= device.loss(blind)


def test_every_generation_keeps_the_budget_and_improves():
    costs, net, sensitivity = random_problem(5)
    lattice, budget = Lattice(sensitivity, costs, net, SPEC), 0.6 * costs.dense_ms
    search = genetic.Search(lattice, budget, np.random.default_rng(0))
    first = search._repaired(search._first(), lattice.last_resort(budget)[None])
    last = search.run(lattice.last_resort(budget)[None])
    for points in (first, last):
        assert (lattice.ms(points) <= budget * (1 + 1e-6)).all() and (lattice.settle(points) == points).all()
    assert lattice.loss(last).min() <= lattice.loss(first).min()
    assert len(np.unique(last, axis=0)) == len(last)


class Crossed:
    """Losses of choices whose cuts hurt each other: the quadratic form with one rho for all pairs."""

    def __init__(self, lattice: Lattice, rho: float) -> None:
        self.lattice, self.rho, self.seen = lattice, rho, []

    def loss(self, choice) -> float:
        point = self.lattice.point(choice.widths, choice.dropped)[None]
        alone, size = float(self.lattice.loss(point)[0]), float(self.lattice.roots(point)[0])
        self.seen.append((1 - self.rho) * alone + self.rho * size**2)
        return self.seen[-1]


@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0, 1.5])
def test_how_alike_the_errors_of_cuts_are_is_learnt_from_what_was_tried(rho):
    costs, net, sensitivity = random_problem(2)
    lattice = Lattice(sensitivity, costs, net, SPEC)
    search = genetic.Search(lattice, 0.6 * costs.dense_ms, np.random.default_rng(0))
    points = search.run(lattice.last_resort(0.6 * costs.dense_ms)[None])[:6]
    device = Crossed(lattice, rho)
    losses = np.array([device.loss(lattice.solution(point)) for point in points])
    assert genetic.alikeness(lattice, points, losses) == pytest.approx(rho, abs=1e-9)
    search.rho = rho
    assert search.fitness(points) == pytest.approx(losses)
    spoilt = np.concatenate([losses[:-1], [WORST]])
    assert genetic.alikeness(lattice, points, spoilt) == pytest.approx(rho, abs=1e-9)
    lattice.losses[lattice.losses == lattice.losses[0, 0]] = WORST  # a cut whose own loss is not finite
    beyond = np.concatenate([points, [[0, *points[0, 1:]]]])
    assert lattice.loss(beyond[-1:])[0] >= WORST
    known = lattice.loss(beyond) < WORST
    assert genetic.alikeness(lattice, beyond[known], np.append(losses, 1.0)[known]) == pytest.approx(
        genetic.alikeness(lattice, beyond, np.append(losses, 1.0))
    )


def wide_chain() -> tuple:
    """36 groups of ten widths in a row, 35 sites of two groups each: about ResNet-50's size."""
    rng = np.random.default_rng(0)
    choices = {f"g{i}": tuple(range(16, 161, 16)) for i in range(36)}
    dims = [Dim(((name, 1),)) for name in choices]
    costs = table([site(rng, f"s{i}", [dims[i], dims[i + 1]], choices, 16) for i in range(35)], choices)
    curves = {n: {w: float(rng.lognormal() * (1 - w / 160) ** 1.7) for w in options} for n, options in choices.items()}
    return costs, topology([group(name, 160) for name in choices]), Sensitivity(curves, {})


def test_a_fitness_that_knows_how_cuts_hurt_each_other_finds_what_their_sum_does_not(monkeypatch):
    """Against as many evolutions and tries of what the plain sum ranks first."""
    costs, net, sensitivity = wide_chain()
    budget, lattice = 0.5 * costs.dense_ms, Lattice(sensitivity, costs, net, SPEC)
    learnt, plain = Crossed(lattice, 1.0), Crossed(lattice, 1.0)
    genetic.solve([], sensitivity, costs, net, budget, SPEC, learnt)
    monkeypatch.setattr(genetic, "alikeness", lambda *_: 0.0)
    genetic.solve([], sensitivity, costs, net, budget, SPEC, plain)
    assert min(learnt.seen) < 0.95 * min(plain.seen)


def test_the_seed_of_the_spec_leads_the_genetic_search(monkeypatch):
    monkeypatch.setattr(genetic, "GENERATIONS", 5)
    costs, net, sensitivity = wide_chain()
    budget = 0.5 * costs.dense_ms
    zero, again, one = (
        genetic.solve([], sensitivity, costs, net, budget, PruneSpec(seed=seed)).widths for seed in (0, 0, 1)
    )
    assert zero == again != one


def test_a_large_problem_is_solved_in_seconds():
    costs, net, sensitivity = wide_chain()
    ranked = rankings(net, sensitivity)
    for solver in (threshold, cumulative, knapsack, netadapt):
        found = solver.solve(ranked, sensitivity, costs, net, 0.5 * costs.dense_ms, SPEC)
        assert found.seconds < 5 and found.predicted_ms <= 0.5 * costs.dense_ms * (1 + 1e-6)
