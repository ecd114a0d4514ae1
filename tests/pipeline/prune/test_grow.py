"""Growing: the function stays, the new parts learn, and what was grown can be captured, cut and exported again."""

import copy
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from prune_nets import NETS, Chain, Concat, Head, Residual, conv, example
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pipeline.graph.export import export
from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Evidence, Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.grow import branch, branchable, widen
from pipeline.prune.ranking import rank
from pipeline.prune.surgery import prune
from profiles.errors import DeployError, UsageError
from profiles.schema import InputSpec


def network_of(model: nn.Module) -> Network:
    """Captured, with norms that have lived a little."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
        for _ in range(10):
            model(torch.randn(16, 3, 8, 8))
    return find_groups(capture(model.eval(), example()))


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def difference(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of the outputs, in float64."""
    with torch.no_grad():
        one, two = (copy.deepcopy(net).double()(images().double()) for net in (a, b))
        return float((one - two).abs().max())


def sizes(network: Network) -> list[tuple[str, int]]:
    return sorted((group.name, group.size) for group in network.topology.offered)


GROWN = [name for name in NETS if name != "normed"]


@pytest.mark.parametrize("name", GROWN)
def test_every_group_of_every_coupling_grows_and_the_outputs_stay(name):
    torch.manual_seed(0)
    network = network_of(NETS[name]())
    for group in network.topology.offered:
        grown = widen(network, {group.id: group.size + 3})
        assert difference(grown, network.graph) < 1e-9, group.name
        again = find_groups(capture(grown, example()))
        assert sizes(again) == sorted((g.name, g.size + 3 * (g.id == group.id)) for g in network.topology.offered), (
            group.name
        )
        assert len(again.topology.removable) == len(network.topology.removable)


@pytest.mark.parametrize("name", GROWN)
def test_all_groups_grow_together_past_twice_their_size(name):
    torch.manual_seed(0)
    network = network_of(NETS[name]())
    grown = widen(network, {g.id: 2 * g.size + 1 for g in network.topology.offered})
    assert difference(grown, network.graph) < 1e-9
    again = find_groups(capture(grown, example()))
    assert sizes(again) == sorted((g.name, 2 * g.size + 1) for g in network.topology.offered)


@pytest.mark.parametrize("name", GROWN)
def test_cutting_what_nothing_reads_yet_gives_the_network_back(name):
    """The inverse: of the grown network the units with columns of zeros go, and the weights are those from before."""
    torch.manual_seed(0)
    network = network_of(NETS[name]())
    grown = widen(network, {g.id: g.size + 2 for g in network.topology.offered})
    again = find_groups(capture(grown, example()))
    samples = Samples([(images(12),)])
    useless = rank(Evidence(again, samples), "fisher")
    plan = PruningPlan(tuple(KeepUnits(g.id, useless[g.id].keep(g.size - 2)) for g in again.topology.offered))
    back = prune(again, plan)
    assert difference(back, network.graph) < 1e-9
    before = dict(network.graph.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in back.state_dict().items())


def _steps(grown: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """Gradients of that many steps of training."""
    optimizer, found = torch.optim.SGD(grown.parameters(), lr=0.1), []
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(grown(images(10)), torch.arange(10) % 5).backward()
        found.append({name: p.grad.clone() for name, p in grown.named_parameters() if p.grad is not None})
        optimizer.step()
    return found


def test_new_columns_learn_at_the_first_step_and_new_producers_at_the_second():
    torch.manual_seed(0)
    network = network_of(Chain())
    group = next(g for g in network.topology.offered if g.name == "a.0")
    grown = widen(network, {group.id: 12})
    new = torch.from_numpy(np.flatnonzero((grown.get_parameter("b.0.weight") == 0).all(0).all(1).all(1).numpy()))
    assert len(new) == 4
    first, second = _steps(grown, 2)
    assert all(first["b.0.weight"][:, unit].any() for unit in new)
    assert not first["a.0.weight"][new].any()
    assert all(second["a.0.weight"][unit].any() and second["a.1.weight"][unit] != 0 for unit in new)


def test_new_units_are_noisy_copies_in_the_producers_and_exact_ones_in_the_norms():
    torch.manual_seed(0)
    network = network_of(Chain())
    group = next(g for g in network.topology.offered if g.name == "a.0")
    grown = widen(network, {group.id: 16}, noise=0.1)
    dense, weight = (net.get_parameter("a.0.weight").detach() for net in (network.graph, grown))
    norm = grown.get_submodule("a.1")
    for old, new in zip(range(0, 16, 2), range(1, 16, 2), strict=True):
        assert 0.05 < float((weight[old] - weight[new]).std() / dense.std()) < 0.2
        assert norm.weight[old] == norm.weight[new] and norm.running_var[old] == norm.running_var[new]
    assert torch.equal(weight[::2], dense)


def test_growing_is_a_function_of_its_seed_and_leaves_the_network_as_it_was():
    network = network_of(Residual("pad"))
    before = copy.deepcopy(network.graph.state_dict())
    wider = {g.id: g.size + 4 for g in network.topology.offered}
    first, second, other = (widen(network, wider, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
    assert all(torch.equal(value, before[key]) for key, value in network.graph.state_dict().items())


def test_what_cannot_grow_is_refused_with_the_reason():
    network = network_of(NETS["normed"]())
    groups = {g.name: g for g in network.topology.groups}
    with pytest.raises(DeployError, match=r"^the group 'a' cannot grow: 'gn' \(group norm\) mixes its"):
        widen(network, {groups["a"].id: 8})
    assert difference(widen(network, {groups["up"].id: 20}), network.graph) < 1e-9
    network = network_of(Chain())
    groups = {g.name: g for g in network.topology.groups}
    with pytest.raises(DeployError, match=r"'head.fc' cannot grow, it is frozen: it is an output of the network\.$"):
        widen(network, {groups["head.fc"].id: 9})
    with pytest.raises(UsageError, match=r"^the group 'a.0' has 8 units and cannot grow to 7\."):
        widen(network, {groups["a.0"].id: 7})
    with pytest.raises(UsageError, match=r"^the network has no group 'nothing' that could grow to 7\."):
        widen(network, {"nothing": 7})


class Lonely(nn.Module):
    """A grouped convolution with one output a group: what belongs to which group cannot be seen from its units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b, self.head = conv(3, 8), conv(8, 2, groups=2), conv(2, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.g(self.a(x))))


def test_a_growth_that_would_change_the_outputs_is_found_out():
    network = network_of(Lonely())
    group = next(g for g in network.topology.groups if g.name == "g.0")
    groups = tuple(replace(g, frozen=None) for g in network.topology.groups)
    forced = replace(network, topology=replace(network.topology, groups=groups))
    with pytest.raises(DeployError, match=r"^growing g\.0 (changes the outputs by|fails: )"):
        widen(forced, {group.id: 2})


# --- branches ------------------------------------------------------------------------------------------------------


class Inception(nn.Module):
    """Two modules of parallel branches, the second one with a stride, a norm behind its concatenation and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.a1, self.a3 = conv(8, 6, 1), nn.Sequential(conv(8, 4, 1), conv(4, 6))
        self.b3, self.b5 = conv(12, 6, 3, 2), conv(12, 4, 5, 2)
        self.norm, self.act = nn.BatchNorm2d(10), nn.PReLU(10)
        self.fc = nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.a1(x), self.a3(x)], 1)
        x = torch.cat([self.b3(x), self.b5(x)], 1)
        return self.fc(self.act(self.norm(x)).flatten(1))


EVERYWHERE = [(name, where) for name in NETS for where in branchable(capture(NETS[name](), example()))]


def test_branches_can_be_set_in_most_networks():
    assert ("concat", "cat") in EVERYWHERE and ("residual identity", "conv1") in EVERYWHERE
    assert ("flat", "a.0") in EVERYWHERE and ("depthwise", "dw.0") in EVERYWHERE
    assert ("residual pad", "conv2") not in EVERYWHERE and ("depthwise", "a.0") not in EVERYWHERE


@pytest.mark.parametrize(("name", "where"), EVERYWHERE)
def test_a_branch_leaves_the_outputs_and_is_offered_for_pruning(name, where):
    torch.manual_seed(0)
    network = network_of(NETS[name]())
    grown = branch(network, where, 5)
    assert difference(grown, network.graph) < 1e-9
    again = find_groups(capture(grown, example()))
    assert sorted(set(sizes(again)) - set(sizes(network))) == [
        (f"{where.replace('.', '_')}_branch.{layer}", 5) for layer in (0, 3)
    ]
    plan = PruningPlan(tuple(KeepUnits(g.id, tuple(range(g.size // 2))) for g in again.topology.offered))
    assert prune(again, plan)(images()).shape == network.graph(images()).shape


@pytest.mark.parametrize("where", ["cat", "cat_1", "stem.0"])
def test_an_inception_module_gets_another_branch(where):
    network = network_of(Inception())
    assert where in branchable(network)
    grown = branch(network, where, 7)
    assert difference(grown, network.graph) < 1e-9
    first, second = _steps(grown, 2)
    name = f"{where.replace('.', '_')}_branch"
    assert not first[f"{name}.3.weight"].any() and second[f"{name}.3.weight"].any()
    strides = [m.stride for key, m in grown.named_modules() if key == f"{name}.3"]
    assert strides == [(2, 2) if where == "cat_1" else (1, 1)]
    again = find_groups(capture(grown, example()))
    assert (f"{name}.3", 7) in sizes(again)


def test_branches_and_widths_grow_one_on_the_other_and_train():
    torch.manual_seed(0)
    network = network_of(Concat())
    network = find_groups(capture(branch(network, "cat", 4), example()))
    network = find_groups(capture(branch(network, "cat", 4), example()))
    grown = widen(network, {g.id: g.size + 2 for g in network.topology.offered})
    assert difference(grown, network.graph) < 1e-9
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(grown.train()(images(20)), torch.arange(20) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(bool(p.abs().sum() > 0) for p in grown.parameters())


@pytest.mark.parametrize(
    ("model", "where", "said"),
    [
        (Chain, "head.fc", "no branch can be set at 'head.fc', which is no concatenation and no convolution"),
        (Chain, "nowhere", "no branch can be set at 'nowhere', which is no concatenation and no convolution"),
        (NETS["depthwise"], "a.0", "no branch can be set at 'a.0': it leads to 'dw_0' (conv)."),
        (NETS["residual pad"], "conv2", "no branch can be set at 'conv2': it leads to 'residual_add_0' (binary)."),
        (NETS["normed"], "a", "no branch can be set at 'a': it leads to 'gn' (group norm)."),
        (NETS["chunk"], "a.0", "no branch can be set at 'a.0': it leads to 'channel_split_0' (split)."),
        (NETS["transposed"], "b", "no branch can be set at 'b': it leads to 'output' (output)."),
    ],
)
def test_a_branch_that_would_be_felt_is_refused_with_what_it_meets(model, where, said):
    network = find_groups(capture(model().eval(), example()))
    with pytest.raises(DeployError) as told:
        branch(network, where, 4)
    assert told.value.message.startswith(said)


def test_a_branch_of_nothing_is_refused():
    with pytest.raises(UsageError, match=r"^a branch of 0 channels was asked for\."):
        branch(find_groups(capture(Chain().eval(), example())), "a.0", 0)


@pytest.mark.parametrize("kind", ["widen", "branch"])
def test_what_was_grown_is_exported_to_onnx(kind, tmp_path):
    network = network_of(Inception() if kind == "branch" else Residual("pad"))
    wider = {g.id: g.size + 3 for g in network.topology.offered}
    grown = branch(network, "cat_1", 6) if kind == "branch" else widen(network, wider)
    again: fx.GraphModule = capture(grown, example()).graph
    file = export(again, [InputSpec(name="image", shape=(6, 3, 8, 8))], tmp_path / "grown.onnx")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"image": images().numpy()})
    with torch.no_grad():
        assert np.allclose(got, grown(images()).numpy(), atol=1e-5)
        assert np.allclose(got, network.graph(images()).numpy(), atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_grows_is_frozen_where_the_network_is(frozen):
    torch.manual_seed(0)
    network = network_of(NETS["concat"]().requires_grad_(not frozen))
    places = branchable(network)
    assert places
    for place in places:
        assert {p.requires_grad for p in branch(network, place, 8).parameters()} == {not frozen}
    wider = widen(network, {group.id: group.size + 4 for group in network.topology.offered})
    assert {p.requires_grad for p in wider.parameters()} == {not frozen}
