"""The contract of criteria, run over every file of the folder."""

import copy
from types import ModuleType

import numpy as np
import pytest
import torch
from prune_nets import NETS, example
from torch import nn

from pipeline.nouns import ChannelGroup, Ranking
from pipeline.prune.capture import Network, capture
from pipeline.prune.criteria import _knockoffs, scop_generator
from pipeline.prune.criteria.base import PACKAGE
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.ranking import rank
from profiles import plugins
from profiles.errors import UsageError

NAMES = plugins.names(PACKAGE)
TRAINED = {"scop", "scop-generator"}
"""Criteria that train what they rank by: sums in another order, rounded, end a little elsewhere."""
CONTROLS = {"random"}
"""Criteria that look at nothing but the seed."""


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract is that of any number of steps; what many of them learn is test_gradient_criteria's to say."""
    monkeypatch.setattr(scop_generator, "STEPS", 20)
    monkeypatch.setattr(_knockoffs, "STEPS", 20)


@torch.no_grad()
def lived_in() -> nn.Module:
    """A residual network whose norms have statistics of real inputs, and scales and shifts of their own."""
    torch.manual_seed(0)
    model = NETS["residual pad"]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.3, 0.3)
            module.momentum = None
    model.train()(torch.randn(64, 3, 8, 8))
    return model.eval()


def captured(model: nn.Module) -> Network:
    return find_groups(capture(model, example()), prove=False)


def evidence_of(network: Network, *, seed: int = 0) -> Evidence:
    inputs = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return Evidence(network, Samples([(batch,) for batch in inputs.split(8)], torch.arange(24) % 5), seed=seed)


def plugin(name: str) -> ModuleType:
    return plugins.load(PACKAGE, name)


def inner(network: Network) -> ChannelGroup:
    return next(group for group in network.topology.offered if group.name == "conv1")


@torch.no_grad()
def rewired(network: Network, model: nn.Module, group: ChannelGroup, sources: list[int], *, readers: bool) -> nn.Module:
    """A copy of the model in which unit i of the group is unit sources[i]; readers: in what reads it as well."""
    changed = copy.deepcopy(model)
    state = changed.state_dict()
    for name, axes in network.topology.params.items():
        for axis, units in axes.items():
            if axis == 0 or readers:
                moved = state[name].movedim(axis, 0)
                at = [np.flatnonzero(units == unit) for unit in group.units]
                if len(at[0]):
                    rows = torch.from_numpy(np.stack(at))
                    moved[rows] = moved[rows[sources]].clone()
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_ranks_every_unit_of_every_offered_group_once(name):
    network = captured(lived_in())
    evidence = evidence_of(network)
    rankings = rank(evidence, name)
    assert set(rankings) == {group.id for group in network.topology.offered}
    for group in network.topology.offered:
        ranking = rankings[group.id]
        assert sorted(ranking.removal_order) == list(range(group.size))
        assert len(ranking.marginal_loss) == group.size and min(ranking.marginal_loss) >= 0
        assert np.isfinite(ranking.marginal_loss).all() and np.isfinite(ranking.weight) and ranking.weight >= 0
        assert ranking.keep(group.size) == tuple(range(group.size))
        assert all(type(unit) is int for unit in ranking.removal_order), "plain numbers, for the cache"
        assert all(type(loss) is float for loss in ranking.marginal_loss), "plain numbers, for the cache"
        if ranking.twin is not None:
            assert len(ranking.twin) == group.size and all(type(twin) is int for twin in ranking.twin)
            gone: set[int] = set()
            for unit, twin in zip(ranking.removal_order, ranking.twin, strict=True):
                assert twin == -1 or (twin in range(group.size) and twin != unit and twin not in gone)
                gone.add(unit)
    assert rank(evidence, name) == rankings


@pytest.mark.parametrize("name", NAMES)
def test_the_same_evidence_and_seed_give_the_same_ranking_again(name):
    network = captured(lived_in())
    assert rank(evidence_of(network, seed=5), name) == rank(evidence_of(network, seed=5), name)


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_leaves_the_network_as_it_was(name):
    network = captured(lived_in())
    before = {key: value.clone() for key, value in network.graph.state_dict().items()}
    modes = [module.training for module in network.graph.modules()]
    rank(evidence_of(network), name)
    assert all(torch.equal(before[key], value) for key, value in network.graph.state_dict().items())
    assert [module.training for module in network.graph.modules()] == modes
    assert all(value.requires_grad for value in network.graph.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONTROLS])
def test_permuted_units_give_permuted_rankings(name):
    """Unit i of the second network is unit order[i] of the first, and both compute the same."""
    model = lived_in()
    network = captured(model)
    group, order = inner(network), [7, 2, 9, 0, 11, 4, 1, 10, 3, 8, 5, 6]
    other = captured(rewired(network, model, group, order, readers=True))
    (x,) = evidence_of(network).samples.first(4).joined()
    assert torch.allclose(other.graph(x), network.graph(x), atol=1e-5)
    rankings = [rank(evidence_of(net), name) for net in (network, other)]
    for own in network.topology.offered:
        first, second = (found[own.id] for found in rankings)
        names = order if own.id == group.id else list(range(own.size))
        if name in TRAINED:
            pairs = (dict(zip(r.removal_order, r.marginal_loss, strict=True)) for r in (first, second))
            before, after = pairs
            assert np.corrcoef([after[i] for i in after], [before[names[i]] for i in after])[0, 1] > 0.8, own.name
            continue
        assert [names[unit] for unit in second.removal_order] == list(first.removal_order), own.name
        assert np.allclose(second.marginal_loss, first.marginal_loss, rtol=1e-2, atol=1e-5), own.name
        if first.twin is not None and second.twin is not None:
            assert [names[twin] if twin >= 0 else -1 for twin in second.twin] == list(first.twin), own.name


def promises(name: str) -> bool:
    return bool(getattr(plugin(name), "DUPLICATES_FIRST", False))


@pytest.mark.parametrize("name", [name for name in NAMES if promises(name)])
def test_what_promises_to_take_duplicates_first_does_so(name):
    """Units 3 and 8 are copies of unit 1, and read by other weights than it."""
    model = lived_in()
    network = captured(model)
    group = inner(network)
    assert not duplicates_first(rank(evidence_of(network), name)[group.id])
    copies = [0, 1, 2, 1, 4, 5, 6, 7, 1, 9, 10, 11]
    changed = captured(rewired(network, model, group, copies, readers=False))
    assert duplicates_first(rank(evidence_of(changed), name)[group.id])


def duplicates_first(ranking: Ranking) -> bool:
    """Two of the units 1, 3 and 8 go first, at no loss, and each to another one of them where twins are named."""
    first, loss = set(ranking.removal_order[:2]), ranking.marginal_loss
    twins = set() if ranking.twin is None else set(ranking.twin[:2])
    return first <= {1, 3, 8} and max(loss[:2]) < 1e-2 * loss[2] and twins <= {1, 3, 8}


def test_an_unknown_criterion_names_its_near_miss():
    network = captured(NETS["chain"]())
    with pytest.raises(UsageError, match=r"^no criterion named 'fischer'\. Did you mean 'fisher'\?"):
        rank(Evidence(network, Samples([(torch.zeros(2, 3, 8, 8),)])), "fischer")
