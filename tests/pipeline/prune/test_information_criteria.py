"""Criteria from weights, activations and information: lamp to information, on every small network and by hand."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from prune_nets import NETS, Chain, Flat, Residual, SqueezeExcite, example, lively
from torch import nn

from pipeline.nouns import ChannelGroup, KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.criteria import entropic, genetic, information
from pipeline.prune.criteria._quadratic import eliminate, quadratic, readings
from pipeline.prune.criteria.independence import independence
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.merge import RIDGE
from pipeline.prune.ranking import rank
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune

DATA_FREE = ("lamp", "bn-scale")
CRITERIA = (*DATA_FREE, "activation-rank", "independence", "obs", "genetic", "entropic", "information")


def evidence_of(model: nn.Module, count: int = 24) -> Evidence:
    network = find_groups(capture(model, example()))
    inputs = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return Evidence(network, Samples([(batch,) for batch in inputs.split(16)]))


@cache
def shared(name: str) -> Evidence:
    torch.manual_seed(0)
    return evidence_of(lively(NETS[name]()))


def group_of(network: Network, name: str) -> ChannelGroup:
    return next(group for group in network.topology.offered if group.name == name)


def chain() -> nn.Module:
    torch.manual_seed(0)
    return lively(Chain())


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NETS)
def test_every_offered_group_of_every_network_is_ranked(name, criterion):
    evidence = shared(name)
    rankings = rank(evidence, criterion)
    assert set(rankings) == {group.id for group in evidence.topology.offered}
    for group in evidence.topology.offered:
        ranking = rankings[group.id]
        assert sorted(ranking.removal_order) == list(range(group.size))
        assert len(ranking.marginal_loss) == group.size
        assert np.isfinite(ranking.marginal_loss).all() and min(ranking.marginal_loss) >= 0
        assert sum(ranking.marginal_loss) > 0 and ranking.weight > 0


@pytest.mark.parametrize("criterion", ["activation-rank", "independence", "obs", "genetic", "entropic"])
def test_a_silent_channel_goes_first(criterion):
    model = chain()
    with torch.no_grad():
        model.a[1].weight[3], model.a[1].bias[3] = 0.0, -1.0
    evidence = evidence_of(model)
    group = group_of(evidence.network, "a.0")
    ranking = rank(evidence, criterion)[group.id]
    assert ranking.removal_order[0] == 3
    assert ranking.marginal_loss[0] == pytest.approx(0.0, abs=1e-3)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_lamp_divides_a_square_by_those_of_all_that_are_not_smaller():
    evidence = shared("residual projection")
    plain, layered = rank(evidence, "magnitude"), rank(evidence, "lamp")
    for id, ranking in layered.items():
        squares = np.square(plain[id].marginal_loss)
        wanted = [square / squares[i:].sum() for i, square in enumerate(squares)]
        assert ranking.removal_order == plain[id].removal_order
        assert np.allclose(ranking.marginal_loss, wanted)
        assert ranking.marginal_loss[-1] == 1.0


def test_bn_scale_is_the_root_mean_square_over_the_norms_of_a_stream():
    torch.manual_seed(0)
    model = Residual("identity").eval()
    with torch.no_grad():
        model.stem[1].weight.copy_(torch.linspace(-2, 1, 8))
        model.bn2.weight.copy_(torch.linspace(1, 3, 8))
    evidence = evidence_of(model)
    ranking = rank(evidence, "bn-scale")[group_of(evidence.network, "stem.0").id]
    wanted = torch.stack([model.stem[1].weight, model.bn2.weight]).square().mean(0).sqrt().detach().numpy()
    assert list(ranking.removal_order) == np.argsort(wanted).tolist()
    assert np.allclose(ranking.marginal_loss, np.sort(wanted))


def test_a_unit_without_a_norm_is_scaled_by_its_filter():
    torch.manual_seed(0)
    model = SqueezeExcite().eval()
    evidence = evidence_of(model)
    ranking = rank(evidence, "bn-scale")[group_of(evidence.network, "down").id]
    wanted = model.down.weight.detach().flatten(1).norm(dim=1).numpy()
    assert list(ranking.removal_order) == np.argsort(wanted).tolist()
    assert np.allclose(ranking.marginal_loss, np.sort(wanted))


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Chain, Flat])
def test_activation_rank_counts_the_directions_of_a_map_also_behind_a_flattening(build):
    """A silent map has rank 0, a constant one 1, the others more; a fainter one of two constants goes first."""
    torch.manual_seed(0)
    model = lively(build())
    with torch.no_grad():
        model.a[1].weight[[1, 4, 6]] = 0.0
        model.a[1].bias[[1, 4, 6]] = torch.tensor([2.0, -1.0, 1.0])
    evidence = evidence_of(model)
    ranking = rank(evidence, "activation-rank")[group_of(evidence.network, "a.0").id]
    side = 4 if build is Flat else 8
    assert ranking.removal_order[:3] == (4, 6, 1)
    assert ranking.marginal_loss[:3] == pytest.approx((0, 1 / side, 1 / side))
    assert min(ranking.marginal_loss[3:]) > 2 / side


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 1), (12, 12)])
def test_independence_is_what_a_row_adds_to_the_nuclear_norm(shape):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.double).relu()
    rows[2] = 0
    rows[3] = rows[1] + rows[4]
    whole = torch.linalg.matrix_norm(rows, "nuc")
    wanted = []
    for row in range(len(rows)):
        without = rows.clone()
        without[row] = 0
        wanted.append(float(whole - torch.linalg.matrix_norm(without, "nuc")))
    assert np.allclose(independence(rows), wanted, atol=1e-6 * float(whole))
    assert independence(torch.zeros(3, 4, dtype=torch.double)).tolist() == [0, 0, 0]


# --- quadratic forms -------------------------------------------------------------------------------------------------


def test_the_quadratic_form_is_the_error_that_masked_units_leave_in_a_layer():
    """A convolution that reads the stream and a shortcut that reads it too: relative errors add up."""
    evidence = shared("residual projection")
    graph, group = evidence.network.graph, group_of(evidence.network, "stem.0")
    table = quadratic(readings(evidence, group))
    (x,) = evidence.samples.joined()
    gone = [1, 2, 6]
    seen: dict[str, torch.Tensor] = {}
    wanted = 0.0
    for name in ("conv1", "project"):
        layer = graph.get_submodule(name)
        handle = layer.register_forward_hook(lambda m, args, y, name=name: seen.update({name: args[0]}))
        with torch.no_grad():
            graph(x)
            handle.remove()
            masked = torch.zeros_like(seen[name])
            masked[:, gone] = seen[name][:, gone]
            lost, whole = (layer(part).movedim(1, 0).flatten(1) for part in (masked, seen[name]))
        wanted += float(lost.var(1, correction=0).sum() / whole.var(1, correction=0).sum())
    assert float(table[gone][:, gone].sum()) == pytest.approx(wanted, rel=1e-3)


def test_a_layer_that_is_called_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.head((self.b(y) + self.b(y.tanh())).mean((2, 3)))

    evidence = evidence_of(Twice().eval())
    (reading,) = readings(evidence, group_of(evidence.network, "a"))
    assert float(quadratic([reading]).sum()) == pytest.approx(1.0)


def direct_error(reading, gone: list[int]) -> float:
    """Relative error of a layer after ridge least squares of what stays."""
    ridged = reading.covariance + torch.eye(len(reading.covariance)) * (
        RIDGE * reading.covariance.diagonal().mean() + 1e-8
    )
    lost = reading.at[gone].reshape(-1)
    stays = torch.tensor([c for c in range(len(ridged)) if c not in lost.tolist()], dtype=torch.long)
    inner = ridged[lost][:, lost]
    inner = inner - ridged[lost][:, stays] @ torch.linalg.solve(ridged[stays][:, stays], ridged[stays][:, lost])
    weight = reading.weight[:, lost]
    return float((weight @ inner * weight).sum())


@pytest.mark.parametrize("name", ["residual projection", "concat", "flat", "grouped", "transposed"])
def test_elimination_takes_the_cheapest_unit_each_time_at_the_price_of_solving_again(name):
    evidence = shared(name)
    for group in evidence.topology.offered:
        found = readings(evidence, group)
        order, added = eliminate(found)
        gone: list[int] = []
        for unit, price in zip(order[:4], added[:4], strict=True):
            before = sum(direct_error(reading, gone) for reading in found)
            open_ = [u for u in range(group.size) if u not in gone]
            prices = {u: sum(direct_error(r, [*gone, u]) for r in found) - before for u in open_}
            assert price == pytest.approx(prices[unit], rel=1e-4, abs=1e-7)
            assert price == pytest.approx(min(prices.values()), rel=1e-4, abs=1e-7)
            gone.append(unit)
        again, repriced = eliminate(found, order)
        assert again == order and np.allclose(added, repriced)


def test_what_obs_and_entropic_tell_is_what_the_repair_layerwise_leaves():
    evidence = evidence_of(chain(), 96)
    network, group = evidence.network, group_of(evidence.network, "a.0")
    (x,) = evidence.samples.joined()

    def given(graph: nn.Module) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = graph.get_submodule("b.0").register_forward_hook(lambda m, args, y: seen.append(y))
        with torch.no_grad():
            graph(x)
        handle.remove()
        return seen[0].movedim(1, 0).flatten(1)

    dense = given(network.graph)
    for criterion in ("obs", "entropic"):
        ranking = rank(evidence, criterion)[group.id]
        plan = PruningPlan((KeepUnits(group.id, ranking.keep(5)),))
        fixed = repair(prune(network, plan), network, plan, evidence.samples, "layerwise")
        left = (given(fixed) - dense).var(1).sum() / dense.var(1).sum()
        assert float(left) == pytest.approx(sum(ranking.marginal_loss[:3]), rel=0.02)


def test_a_copy_of_a_channel_costs_nothing_after_solving_again():
    model = chain()
    with torch.no_grad():
        for part in (model.a[0].weight, model.a[1].weight, model.a[1].bias):
            part[6] = part[2]
    evidence = evidence_of(model)
    ranking = rank(evidence, "obs")[group_of(evidence.network, "a.0").id]
    assert ranking.removal_order[0] in (2, 6)
    assert ranking.marginal_loss[0] < 0.002 < 0.02 < ranking.marginal_loss[1]


def test_the_genetic_choice_is_the_best_of_all_where_all_can_be_tried():
    source = np.random.default_rng(0)
    factor = source.normal(size=(10, 5))
    table = factor @ factor.T + 0.1 * np.eye(10)
    none = np.zeros(0, dtype=np.int64)
    for fixed, quota in itertools.product((none, np.asarray([0, 9])), (4, 5, 8)):
        found = genetic.evolve(table, fixed, quota, np.random.default_rng(1))
        allowed = [s for s in itertools.combinations(range(10), quota) if set(fixed.tolist()) <= set(s)]
        assert found.tolist() == list(min(allowed, key=lambda s: table[np.ix_(s, s)].sum()))


def test_genetic_quotas_are_nested_and_no_worse_than_greedy():
    factor = np.random.default_rng(3).normal(size=(48, 12))
    table = factor @ factor.T
    order = genetic.nested(table, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(48))
    first = order[:6]
    greedy: list[int] = []
    for _ in range(6):
        rest = [u for u in range(48) if u not in greedy]
        greedy.append(min(rest, key=lambda u: table[np.ix_([*greedy, u], [*greedy, u])].sum()))
    assert table[np.ix_(first, first)].sum() < table[np.ix_(greedy, greedy)].sum()


def objective(reading, log: torch.Tensor) -> float:
    """What entropic regression minimises, at the best Λ for these weights; one reading."""
    own, scale = reading.own, len(log) * log.exp()
    covariance = reading.covariance[own][:, own]
    columns = scale.repeat_interleave(reading.at.shape[1])
    across = covariance @ reading.weight[:, own].T
    ridge = entropic.RIDGE * covariance.diagonal().mean() + 1e-8
    inner = columns[:, None] * covariance * columns + ridge * torch.eye(len(own))
    solved = torch.linalg.solve(inner, columns[:, None] * across)
    misfit = 1 - 2 * (columns[:, None] * solved * across).sum() + (solved * (inner @ solved)).sum()
    return float(misfit + entropic.ENTROPY * (log.exp() * log).sum())


def test_entropic_regression_never_rises_and_lightens_what_the_layer_does_not_need():
    model = chain()
    with torch.no_grad():
        model.b[0].weight[:, [1, 5]] *= 0.01
    evidence = evidence_of(model)
    (reading,) = readings(evidence, group_of(evidence.network, "a.0"))
    log = torch.full((8,), -np.log(8.0), dtype=torch.double)
    values = [objective(reading, log)]
    for _ in range(entropic.ROUNDS):
        log = entropic.lighten(*entropic.form(reading, 8 * log.exp()), log)
        assert float(log.exp().sum()) == pytest.approx(1.0)
        values.append(objective(reading, log))
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values)) and values[-1] < values[0] - 0.01
    assert torch.equal(log, entropic.regress([reading]))
    assert set(log.argsort()[:2].tolist()) == {1, 5}
    assert float(log[[1, 5]].exp().max()) * 20 < 1 / 8


# --- information -----------------------------------------------------------------------------------------------------


def test_shapley_values_of_units_that_do_not_interact_are_told_apart_though_they_go_in_pairs():
    values = torch.linspace(-0.1, 1, 12, dtype=torch.double)
    walks = torch.rand(64, 12, generator=torch.Generator().manual_seed(0)).argsort(1)
    steps = [torch.zeros(64, 12, dtype=torch.double).scatter_(1, walks[:, k : k + 2], 1.0) for k in (0, 2, 4)]
    masks = torch.cat(steps)
    found = information.regressed(masks, masks @ values)
    assert torch.equal(found.argsort(), values.argsort())
    assert float((found * values).sum() / (found.norm() * values.norm())) > 0.99


def test_shapley_values_tell_how_much_the_outputs_depend_on_a_unit():
    model = chain()
    with torch.no_grad():
        model.head.fc.weight[:, 4] *= 8
        model.head.fc.weight[:, 7] = 0
    evidence = evidence_of(model)
    group = group_of(evidence.network, "b.0")
    values = information.shapley(evidence, group, tuple(range(12)))
    assert int(values.argmax()) == 4 and float(values[4]) > 3 * float(values.sort().values[-2])
    shrunk = information.RIDGE / (1 + information.RIDGE) * float(values.mean())
    assert float(values[7]) == pytest.approx(shrunk, rel=0.2)
    ranking = rank(evidence, "information")[group.id]
    assert ranking.removal_order[-1] == 4 and 7 in ranking.removal_order[:6]


def test_groups_are_weighted_by_what_their_maps_hold():
    model = chain()
    with torch.no_grad():
        model.b[1].weight.zero_()
        model.b[1].bias.fill_(1.0)
    evidence = evidence_of(model)
    rankings = rank(evidence, "information")
    first, second = (rankings[group_of(evidence.network, name).id].weight for name in ("a.0", "b.0"))
    assert first + second == pytest.approx(2.0)
    assert second < 0.01 and first > 1.9
