"""Benchmarks of published claims decide by what their pages say: shares of scores, orders, and two limits at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import ccm, qsfm, red
from pipeline.latency.operations import Operations
from pipeline.nouns import Ranking, Sensitivity
from pipeline.prune.capture import Network, capture
from pipeline.prune.groups import find_groups
from profiles.errors import MissedError
from profiles.schema import PruneSpec


@pytest.fixture(scope="module")
def network() -> Network:
    """Wide early, where operations are spent, and wider late, where parameters are."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, stride=4), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return find_groups(capture(model.eval(), (torch.randn(1, 3, 32, 32),)))


def bent(network: Network, table: qsfm.Figures) -> Sensitivity:
    """Losses that grow with the square of what is gone."""
    offered = network.topology.offered
    return Sensitivity({g.id: {w: (1 - w / g.size) ** 2 for w in table.choices[g.id]} for g in offered}, {})


def test_tau_keeps_the_fewest_units_that_hold_more_than_it():
    ranking = Ranking("g", (3, 1, 0, 2), (1.0, 2.0, 3.0, 4.0))  # the last to go holds 0.4, the last two 0.7
    assert [ccm.width(ranking, tau) for tau in (0.1, 0.39, 0.41, 0.69, 0.71, 0.95, 1.0)] == [1, 1, 2, 2, 3, 4, 4]


def test_units_go_by_score_over_all_groups_in_the_order_of_their_own():
    first = Ranking("a", (0, 1, 2), (0.1, 0.9, 5.0))
    second = Ranking("b", (0, 1, 2, 3), (0.5, 0.2, 0.95, 7.0))  # the second falls: it goes right behind the first
    assert list(red.removals([first, second])) == ["a", "b", "b", "a", "b"]


def test_what_was_removed_counts_up_to_the_first_point_that_loses_too_much():
    def point(units: float, lost: float) -> dict[str, float]:
        return {"units": units, "lost": lost, "parameters": units, "macs": units}

    assert red.most([point(0.1, 0.2), point(0.2, 0.6), point(0.3, 0.1)])["units"] == 0.1
    assert red.most([point(0.1, 0.6)])["units"] == 0.0


def test_the_figures_of_the_claim_are_counted_and_the_larger_is_predicted(network: Network):
    counted = Operations(network.topology)
    table = qsfm.figures(network.topology, counted)
    widths = {id: choices[len(choices) // 2] for id, choices in table.choices.items()}
    macs, parameters = table.both(widths)
    counts = qsfm.shares(counted, widths)
    assert (macs * qsfm.MACS, parameters * qsfm.PARAMETERS) == pytest.approx(counts, rel=0.02)  # biases count there
    assert table.predict(widths).ms == max(macs, parameters)


def test_a_plan_under_two_limits_keeps_both_and_leaves_neither_unused(network: Network):
    table = qsfm.figures(network.topology, Operations(network.topology))
    found = qsfm.Both.solve([], bent(network, table), table, network.topology, 1.0, PruneSpec(solver_seconds=2))
    figures = table.both(found.widths, found.dropped)
    assert max(figures) <= 1.0
    assert min(figures) > 0.9
    assert found.predicted_ms == max(figures)


def test_limits_below_the_narrowest_network_are_an_error(network: Network):
    table = qsfm.figures(network.topology, Operations(network.topology))
    with pytest.raises(MissedError, match="cannot be met"):
        qsfm.Both.solve([], bent(network, table), table, network.topology, 1e-6, PruneSpec(solver_seconds=2))


@pytest.mark.parametrize("criterion", qsfm.PLAIN)
def test_of_the_pair_most_alike_the_smaller_filter_goes_first(criterion: str):
    maps = torch.rand(6, 5, 9, generator=torch.Generator().manual_seed(0)).double()
    maps[:, 3] = maps[:, 1] + 0.01
    distance = qsfm.apart(maps, criterion)
    assert (distance >= 0).all() and np.allclose(distance, distance.T)
    for norms, goes, stays in (([1, 2, 1, 1, 1], 3, 1), ([1, 2, 1, 3, 1], 1, 3)):
        ranking = qsfm.alike("g", distance, np.array(norms, float))
        assert (ranking.removal_order[0], ranking.twin[0]) == (goes, stays)
        assert sorted(ranking.removal_order) == list(range(5)) and min(ranking.marginal_loss) >= 0


def test_plain_similarity_of_maps_is_structural_similarity_and_the_error_of_the_peak_ratio():
    maps = torch.rand(4, 2, 16, generator=torch.Generator().manual_seed(1)).double()
    top, (a, b) = float(maps.max()), maps.unbind(1)
    ratio = (10 * (top**2 / (a - b).square().mean(1)).log10()).mean()
    assert qsfm.apart(maps, "plain-psnr")[0, 1] == pytest.approx(10 ** (-float(ratio) / 10))
    level, contrast = (0.01 * top) ** 2, (0.03 * top) ** 2
    both = ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).mean(1)
    up = (2 * a.mean(1) * b.mean(1) + level) * (2 * both + contrast)
    down = (a.mean(1) ** 2 + b.mean(1) ** 2 + level) * (a.var(1, correction=0) + b.var(1, correction=0) + contrast)
    assert 1 - qsfm.apart(maps, "plain-ssim")[0, 1] == pytest.approx(float((up / down).mean()))
