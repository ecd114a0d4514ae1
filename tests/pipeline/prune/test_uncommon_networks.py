"""Criteria and repairs where samples are folded, weights lie on other axes, and outputs are not one row of logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from prune_nets import Head, example, lived_in
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.nouns import ChannelGroup, KeepUnits, PruningPlan, Ranking
from pipeline.prune.capture import Network, capture
from pipeline.prune.criteria import _knockoffs, scop_generator
from pipeline.prune.criteria.activation_rank import map_ranks
from pipeline.prune.criteria.base import PACKAGE, ordered
from pipeline.prune.criteria.haste import agreements, patches
from pipeline.prune.evidence import Evidence, Samples, divergence
from pipeline.prune.groups import find_groups
from pipeline.prune.merge import merge
from pipeline.prune.ranking import rank
from pipeline.prune.repair import MODES, repair
from pipeline.prune.sensitivity import LossProbe
from pipeline.prune.surgery import prune
from profiles import plugins
from profiles.errors import DeployError, UsageError

CRITERIA = plugins.names(PACKAGE)


class Frames(nn.Module):
    """Four quarters of an image as frames, folded with the samples: sample 0's all come first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 6, 3, 1, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 3, 4, 2, 8).transpose(1, 2).flatten(0, 1)
        x = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        return self.head(x.reshape(-1, 4, 6).mean(1))


class Pair(nn.Module):
    """Two views joined along the samples: all of the first, then all of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 6, 3, 1, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x, x.flip(3) * 0.5], 0)
        one, two = torch.relu(self.b(torch.relu(self.a(both)))).mean((2, 3)).chunk(2, 0)
        return self.head((one - two).square())


class Up(nn.Module):
    """A transposed convolution in so many groups, with a norm behind it."""

    def __init__(self, groups: int = 8) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 8, 3, 1, 1), nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=groups)
        self.norm, self.head = nn.BatchNorm2d(8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.up(torch.relu(self.a(x))))))


class Product(nn.Module):
    """Channels that a product with a parameter makes, and no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(192, 12) * 0.1), nn.Parameter(torch.randn(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x.flatten(1) @ self.w1) @ self.w2


class NormOfMaps(nn.Module):
    """A layer norm over tokens and their positions together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(8, 12), nn.LayerNorm((8, 12)), nn.Linear(12, 5)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.a(x.mean(1))).mean(1))


class NormOfTokens(nn.Module):
    """A linear layer to so many channels, and a batch norm over its eight tokens, which lie on axis 1."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(8, width, bias), nn.BatchNorm1d(8), nn.Linear(width, 5)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.a(x.mean(1)))).mean(1))


class TwoHeads(nn.Module):
    """Five scores and one value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.one, self.two = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 6, 1), Head(6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.one(x), self.two(x.mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "frames": Frames, "pair": Pair, "up depthwise": Up, "up grouped": lambda: Up(2), "up": lambda: Up(1),
    "product": Product, "norm of maps": NormOfMaps, "two heads": TwoHeads,
    "norm of tokens": lambda: NormOfTokens(12), "norm of as many tokens as stay": lambda: NormOfTokens(10),
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scop_generator, "STEPS", 5)
    monkeypatch.setattr(_knockoffs, "STEPS", 5)


def network_of(name: str) -> Network:
    torch.manual_seed(0)
    return find_groups(capture(lived_in(NETS[name]()).eval(), example()))


def some(count: int = 24) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def evidence_of(network: Network, batch: int = 8, count: int = 24, *, targets: bool = True) -> Evidence:
    told = torch.arange(count) % 5 if targets else None
    return Evidence(network, Samples([(part,) for part in some(count).split(batch)], told))


def without_two_units(network: Network, rankings: dict[str, Ranking]) -> PruningPlan:
    """The plan that takes two units of every group."""
    edits = [KeepUnits(g.id, rankings[g.id].keep(g.size - 2)) for g in network.topology.offered]
    return PruningPlan(tuple(edits))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NETS)
def test_every_criterion_ranks_the_units_by_something(name: str, criterion: str):
    network = network_of(name)
    needs = plugins.load(PACKAGE, criterion).NEEDS
    evidence = evidence_of(network, targets=name != "two heads" or "targets" in needs)
    if (name, criterion) == ("product", "lda-deconv"):
        with pytest.raises(UsageError, match="needs a last layer"):
            rank(evidence, criterion)
        return
    rankings = rank(evidence, criterion)
    assert len(rankings) == len(network.topology.offered) > 0
    told = any(len(set(ranking.marginal_loss)) > 1 for ranking in rankings.values())
    assert told or criterion == "activation-rank"  # of maps that all have full rank


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETS)
def test_every_repair_takes_the_plan(name: str, mode: str):
    network = network_of(name)
    evidence = evidence_of(network, targets=False)
    rankings = rank(evidence, "red")
    plan = without_two_units(network, rankings)
    fixed = repair(prune(network, plan), network, plan, evidence.samples, mode, rankings=rankings)
    outputs = fixed(some(4))
    assert all(bool(each.isfinite().all()) for each in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("mode", ["layerwise", "least-squares"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [12, 10], ids=["more channels than tokens", "as many as stay"])
def test_a_norm_along_another_axis_than_the_channels_of_its_layer_is_no_part_of_it(width: int, bias: bool, mode: str):
    torch.manual_seed(0)
    network = find_groups(capture(lived_in(NormOfTokens(width, bias=bias)).eval(), example()))
    evidence = evidence_of(network, targets=False)
    plan = without_two_units(network, rank(evidence, "magnitude"))
    cut = prune(network, plan)
    fixed = repair(cut, network, plan, evidence.samples, mode)
    with torch.no_grad():
        before, after = (float(divergence((net(some()),), (network.graph(some()),)).mean()) for net in (cut, fixed))
    assert after < 0.7 * before
    assert torch.equal(fixed.norm.running_mean, network.graph.norm.running_mean)
    assert 0 <= LossProbe(network, evidence.samples).loss(plan) < math.inf


@pytest.mark.parametrize("name", ["frames", "pair"])
def test_gradients_of_folded_samples_are_those_of_each_sample_alone(name: str):
    network = network_of(name)
    together, alone = evidence_of(network, 24).gate_gradients, evidence_of(network, 1).gate_gradients
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_views_that_are_joined_behind_each_other_are_told_from_frames_of_a_sample():
    assert not network_of("frames").stacked
    assert {reader.op for reader in network_of("pair").readers if reader.stacked} == {"a", "b"}


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_red_merges_units_of_a_transposed_convolution_without_data(groups: int):
    torch.manual_seed(0)
    model = lived_in(Up(groups)).eval()
    with torch.no_grad():
        for value in (model.a.weight, model.a.bias):
            value[5] = value[4]
        if groups == 1:
            model.up.weight[:, 5] = model.up.weight[:, 4]
        else:
            model.up.weight[5] = model.up.weight[4]
        for value in (model.up.bias, *model.norm.parameters(), model.norm.running_mean, model.norm.running_var):
            value[5] = value[4]
    network = find_groups(capture(model, example()))
    rankings = rank(Evidence(network, Samples([])), "red")
    plan = without_two_units(network, rankings)
    assert bool(merge(network, plan, rankings, None)(some(4)).isfinite().all())
    if groups == 8:  # units 4 and 5 are one
        (group,) = network.topology.offered[:1]
        own = PruningPlan((KeepUnits(group.id, rankings[group.id].keep(7)),))
        assert {rankings[group.id].removal_order[0], rankings[group.id].twin[0]} == {4, 5}  # type: ignore[index]
        with torch.no_grad():
            assert float((merge(network, own, rankings, None)(some(4)) - model(some(4))).abs().max()) < 1e-5


def test_an_opposite_depthwise_kernel_is_no_duplicate():
    torch.manual_seed(0)
    model = lived_in(Up(8)).eval()
    with torch.no_grad():
        model.a.weight[3], model.a.bias[3] = model.a.weight[1], model.a.bias[1]
        model.up.weight[3] = -model.up.weight[1]
    network = find_groups(capture(model, example()))
    ranking = rank(Evidence(network, Samples([])), "red")[network.topology.offered[0].id]
    assert ranking.marginal_loss[0] > 0.01


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_a_last_batch_of_one_sample_is_as_good_as_any(criterion: str):
    network = network_of("two heads")
    for ranking in rank(evidence_of(network, 8, 9, targets=False), criterion).values():
        assert np.isfinite(ranking.marginal_loss).all() and max(ranking.marginal_loss) > 0


def test_outputs_weigh_alike_in_every_batch():
    network = network_of("two heads")
    evidence = evidence_of(network, 8, targets=False)
    assert evidence.gate_gradients.shape[0] == 24
    scaled = network_of("two heads")
    with torch.no_grad():
        scaled.graph.get_submodule("two").weight.mul_(1000)  # type: ignore[operator, union-attr]
        scaled.graph.get_submodule("two").bias.mul_(1000)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(
        evidence.gate_gradients, evidence_of(scaled, 8, targets=False).gate_gradients, rtol=1e-3, atol=1e-5
    )


def test_scores_that_are_not_finite_are_refused():
    group = ChannelGroup("g", "conv", (0, 1, 2), ())
    with pytest.raises(DeployError, match="scores of 2 of the 3 units of 'conv' are not finite"):
        ordered(group, [1.0, np.nan, np.inf])


def test_tiles_are_drawn_from_all_over_the_maps():
    torch.manual_seed(0)
    maps = torch.randn(64, 2, 128, 128)
    maps[:, 1, :, :8] = maps[:, 0, :, :8]  # alike in the leftmost tiles alone
    same, seen = agreements(patches(maps, 2), 0)
    assert 0.02 < float(same[0, 1] / seen[0, 1]) < 0.2  # 1 of 16 tiles, and some by chance


def test_the_rank_of_a_unit_of_several_channels_is_the_mean_of_theirs():
    torch.manual_seed(0)

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 8, 1, groups=4), Head(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x)))

    network = find_groups(capture(Grouped().eval(), example()))
    flat = (some()[:, :, :1] * some()[:, :1, :, :1]).expand(-1, 3, 8, 8).contiguous()  # every map of rank one
    evidence = Evidence(network, Samples([(flat,)]))
    group = next(g for g in network.topology.offered if g.name == "a")
    assert map_ranks(evidence, group) == pytest.approx(1 / 8)


def test_grams_of_frames_are_those_of_the_frames_as_samples():
    network = network_of("frames")
    evidence = evidence_of(network, 24)
    frames = some().reshape(-1, 3, 4, 2, 8).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        seen = torch.relu(network.graph.get_submodule("a")(frames))
    rows = F.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    wanted = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows)
    torch.testing.assert_close(evidence.grams["b"].covariance[0].double(), wanted, rtol=1e-3, atol=1e-5)
