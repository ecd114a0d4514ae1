"""The contract of criteria, run over every file of the folder."""

import copy
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from prune_nets import NETS, example, lively
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
def copied(network: Network, model: nn.Module, group: ChannelGroup, sources: list[int]) -> nn.Module:
    """A copy of the model in which unit i of the group is made as unit sources[i] is."""
    changed = copy.deepcopy(model)
    state = changed.state_dict()
    for name, axes in network.topology.params.items():
        at = [np.flatnonzero(axes[0] == unit) for unit in group.units] if 0 in axes else [()]
        if len(at[0]):
            rows = torch.from_numpy(np.stack(at))
            state[name][rows] = state[name][rows[sources]].clone()
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


@cache
def shared(name: str) -> Evidence:
    torch.manual_seed(0)
    return evidence_of(find_groups(capture(lively(NETS[name]()), example())))


@cache
def permuted(name: str, seed: int = 5) -> tuple[Evidence, dict[int, int]]:
    """The same function with the units of every offered group reordered, and unit -> the one in its new place."""
    evidence, source, goes = shared(name), np.random.default_rng(seed), {}
    for group in evidence.topology.offered:
        goes |= dict(zip(group.units, source.permutation(group.units).tolist(), strict=True))
    network = capture(evidence.network.graph, evidence.network.example)
    state = network.graph.state_dict()
    for parameter, axes in evidence.topology.params.items():
        for axis, units in axes.items():
            comes = np.arange(len(units))
            for unit, place in goes.items():
                comes[units == place] = np.flatnonzero(units == unit)
            state[parameter].copy_(state[parameter].clone().index_select(axis, torch.from_numpy(comes)))
    return evidence_of(find_groups(network)), goes


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONTROLS])
@pytest.mark.parametrize(
    "net",
    [
        "flat", "residual pad", "depthwise multiplier", "grouped", "shuffle", "normed", "concat", "squeeze-excite",
        "split",
    ],
)  # fmt: skip
def test_permuted_units_give_permuted_rankings(net, name):
    evidence, (other, goes) = shared(net), permuted(net)
    (x,) = evidence.samples.first(4).joined()
    with torch.no_grad():
        assert torch.allclose(evidence.network.graph(x), other.network.graph(x), atol=1e-4)
    before, after = rank(evidence, name), rank(other, name)
    for group in evidence.topology.offered:
        first, second, units = before[group.id], after[group.id], group.units
        told = {goes[units[i]]: loss for i, loss in zip(first.removal_order, first.marginal_loss, strict=True)}
        found = {units[i]: loss for i, loss in zip(second.removal_order, second.marginal_loss, strict=True)}
        assert second.weight == pytest.approx(first.weight, rel=1e-3)
        if name in TRAINED:
            assert np.corrcoef([told[unit] for unit in units], [found[unit] for unit in units])[0, 1] > 0.8, group.name
            continue
        assert np.allclose([told[unit] for unit in units], [found[unit] for unit in units], rtol=2e-3, atol=1e-4)
        if np.diff(first.marginal_loss).min(initial=1.0) > 0:  # equal ones go by position
            assert list(told) == list(found), group.name
        assert np.allclose(second.marginal_loss, first.marginal_loss, rtol=2e-3, atol=1e-4), group.name
        if first.twin is not None and second.twin is not None:
            moved = [goes[units[twin]] if twin >= 0 else -1 for twin in first.twin]
            assert moved == [units[twin] if twin >= 0 else -1 for twin in second.twin], group.name


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_does_with_what_it_says_that_it_needs(name):
    """One that does not name gradients never asks for a loss: this one cannot be taken."""
    needs, given = plugin(name).NEEDS, shared("residual pad")
    assert needs in ((), ("inputs",), ("inputs", "gradients"), ("inputs", "targets"))
    targets = None if needs == ("inputs",) else given.samples.targets
    samples = Samples(given.samples.inputs if "inputs" in needs else [], targets)
    loss = None if "gradients" in needs else lambda outputs, targets: 1 / 0
    assert set(rank(Evidence(given.network, samples, loss), name)) == {group.id for group in given.topology.offered}
    if "gradients" in needs:
        assert set(rank(Evidence(given.network, Samples(samples.inputs)), name)), "labels are not needed"


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_says_whether_it_names_twins(name):
    model = lived_in()
    network = captured(model)
    network = captured(copied(network, model, inner(network), [0, 1, 2, 1, *range(4, 12)]))
    named = any(twin >= 0 for ranking in rank(evidence_of(network), name).values() for twin in ranking.twin or ())
    assert named == getattr(plugin(name), "STAND_INS", False)


class Unprunable(nn.Module):
    """Nothing here may lose a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_which_nothing_may_go_has_no_rankings(name):
    assert rank(evidence_of(captured(Unprunable())), name) == {}


DUPLICATES_FIRST = ["haste", "qsfm-psnr", "qsfm-ssim", "red"]


def test_criteria_of_redundancy_promise_to_take_duplicates_first():
    assert [name for name in NAMES if getattr(plugin(name), "DUPLICATES_FIRST", False)] == DUPLICATES_FIRST


@pytest.mark.parametrize("name", DUPLICATES_FIRST)
def test_what_promises_to_take_duplicates_first_does_so(name):
    """Units 3 and 8 are copies of unit 1, and read by other weights than it."""
    model = lived_in()
    network = captured(model)
    group = inner(network)
    assert not duplicates_first(rank(evidence_of(network), name)[group.id])
    copies = [0, 1, 2, 1, 4, 5, 6, 7, 1, 9, 10, 11]
    changed = captured(copied(network, model, group, copies))
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
