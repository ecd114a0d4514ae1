"""Growth as a record: the same edits give networks of the same shapes, and none of them changes what is computed."""

import pytest
import torch
from prune_nets import NETS, Concat, example
from torch import fx

from pipeline.nouns import AddBranch, KeepUnits, PruningPlan, Widen
from pipeline.prune.capture import Network, capture
from pipeline.prune.groups import find_groups
from pipeline.prune.growth import joins, ordered, regrow
from pipeline.prune.surgery import prune


def again(graph: fx.GraphModule) -> Network:
    return find_groups(capture(graph, example()))


def concatenated(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return again(Concat().eval())


def test_a_record_does_to_another_copy_what_was_done_when_the_network_grew():
    network = concatenated()
    wider = [Widen(group.id, group.size + 3) for group in network.topology.offered]
    growth = ordered([AddBranch("cat", 4), *wider, AddBranch("cat", 2)])
    assert growth == (*wider, AddBranch("cat", 4), AddBranch("cat", 2))
    grown, other = regrow(network, growth, again), regrow(concatenated(1), PruningPlan(growth).growth, again, seed=5)
    with torch.no_grad():
        images = torch.randn(3, 3, 8, 8)
        assert torch.allclose(grown.graph(images), network.graph(images), atol=1e-5)
    shapes = [{name: value.shape for name, value in each.graph.state_dict().items()} for each in (grown, other)]
    assert shapes[0] == shapes[1] != {name: value.shape for name, value in network.graph.state_dict().items()}
    assert [g.id for g in grown.topology.groups] == [g.id for g in other.topology.groups]


@pytest.mark.parametrize("name", ["shuffle", "grouped", "flat", "residual pad", "depthwise multiplier"])
def test_weights_of_one_seed_fit_a_network_that_was_grown_with_another(name: str):
    """What is built again from a record knows no seed: it draws weights, and not what lies where."""
    torch.manual_seed(0)
    network = again(NETS[name]().eval())
    growth = [Widen(group.id, group.size + 3) for group in network.topology.offered]
    grown, other = regrow(network, growth, again, seed=5), regrow(network, growth, again)
    weights = other.graph.state_dict()
    assert any(not torch.equal(value, weights[key]) for key, value in grown.graph.state_dict().items())
    plan = PruningPlan(tuple(KeepUnits(g.id, tuple(range(0, g.size, 2))) for g in grown.topology.offered))
    for value in grown.graph.parameters():
        torch.nn.init.normal_(value, std=0.1)  # trained: copies are no copies any more
    other.graph.load_state_dict(grown.graph.state_dict())
    with torch.no_grad():
        images = torch.randn(3, 3, 8, 8)
        assert torch.equal(grown.graph(images), other.graph(images))
        assert torch.equal(prune(grown, plan)(images), prune(other, plan)(images))


def test_nothing_to_grow_is_the_network_itself():
    network = concatenated()
    assert regrow(network, (), again) is network


def test_a_concatenation_is_joined_to_the_groups_of_its_parts():
    network = concatenated()
    names = {group.id: group.name for group in network.topology.groups}
    (parts,) = joins(network).values()
    assert len(parts) == 2 and len({names[id] for id in parts}) == 2
    cut = {group.id for group in network.topology.offered}
    assert set(parts) <= cut


def test_a_network_without_concatenations_has_none():
    assert joins(again(NETS["residual identity"]().eval())) == {}
