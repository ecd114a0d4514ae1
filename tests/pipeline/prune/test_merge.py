"""Stand-ins, layers solved alone, maps, Gram matrices and counted operations, on one network for each coupling."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from prune_nets import NETS, Depthwise, Head, Residual, conv, example, lived_in
from torch import Tensor, nn

from pipeline.latency.operations import Operations
from pipeline.nouns import ChannelGroup, DropBlock, KeepUnits, PruningPlan, Ranking
from pipeline.prune import maps as maps_module
from pipeline.prune import merge as merge_module
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.maps import Gram, affordable, grams, maps
from pipeline.prune.merge import layerwise, merge
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.repair import repair
from pipeline.prune.surgery import prune, restore
from pipeline.prune.taps import is_layer
from profiles.errors import UsageError

MAPPED = (nn.modules.conv._ConvNd, nn.Linear)


class Shared(nn.Module):
    """One convolution used twice in a row, so that its inputs and outputs are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.s, self.head = conv(3, 8), nn.Conv2d(8, 8, 3, 1, 1, bias=False), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(torch.relu(self.s(torch.relu(self.s(x)))))


class NormFirst(nn.Module):
    """A norm that does not follow its layer: it reads a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.c, self.head = conv(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.relu(self.norm(self.a(x) + self.b(x)))))


class NormTwice(nn.Module):
    """A norm that follows a layer, and is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.norm(self.a(x)))))


class Straight(nn.Module):
    """Two linear layers with nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3 * 64, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)))


class TwoReaders(nn.Module):
    """Two grouped convolutions that read the same units, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.up = conv(3, 8), conv(8, 12, groups=2), nn.ConvTranspose2d(8, 6, 3, 2, 1)
        self.norm, self.head, self.side = nn.BatchNorm2d(6), Head(12), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.g(x)) + self.side(torch.relu(self.norm(self.up(x))))


ALL = NETS | {"shared": Shared, "norm first": NormFirst, "norm twice": NormTwice, "two readers": TwoReaders}
UNSOLVED = {"transposed", "transposed grouped", "two readers"}
"""Networks with transposed convolutions, which are not solved alone."""
UNNORMED = [name for name in ALL if name != "normed"]
"""Norms over channels take their statistics over what is left, so that no copy goes without a trace there."""


def network_of(name: str) -> Network:
    torch.manual_seed(0)
    return find_groups(capture(lived_in(ALL[name]()), example()))


def inputs(count: int = 48) -> tuple[Tensor, ...]:
    return (torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)),)


def named(network: Network, name: str) -> ChannelGroup:
    return next(group for group in network.topology.offered if group.name == name)


def read_axes(network: Network) -> set[tuple[str, int]]:
    """Axes of weights on which a layer reads: all others make or pass channels."""
    nodes = {node.name: node for node in network.graph.graph.nodes}
    found = set()
    for reader in network.readers:
        layer = network.graph.get_submodule(str(nodes[reader.op].target))
        if isinstance(layer, MAPPED):
            found.add((f"{nodes[reader.op].target}.weight", 0 if isinstance(layer, nn.ConvTranspose2d) else 1))
    return found


@torch.no_grad()
def copied(network: Network, group: ChannelGroup, source: int, *copies: int) -> None:
    """Make units of a group exact copies of another one, in everything that makes or passes their channels."""
    state, read = network.graph.state_dict(), read_axes(network)
    for name, axes in network.topology.params.items():
        for axis, units in axes.items():
            if (name, axis) not in read:
                moved = state[name].movedim(axis, 0)
                for copy in copies:
                    moved[units == group.units[copy]] = moved[units == group.units[source]]


@torch.no_grad()
def rescaled(network: Network, norm: str, layer: str, positions: list[int], by: float) -> None:
    """Other weights and statistics of some outputs of a layer and its norm, which change nothing behind the norm."""
    state, eps = network.graph.state_dict(), network.graph.get_submodule(norm).eps
    state[f"{layer}.weight"][positions] *= by
    state[f"{norm}.running_mean"][positions] *= by
    state[f"{norm}.running_var"][positions] = by**2 * (state[f"{norm}.running_var"][positions] + eps) - eps


def towards(group: ChannelGroup, twins: Mapping[int, int], merged: str = "absorb") -> Ranking:
    """A ranking in which these units go first, each to its twin."""
    rest = [unit for unit in range(group.size) if unit not in twins]
    twin = (*twins.values(), *[-1] * len(rest))
    return Ranking(group.id, (*twins, *rest), (0.0,) * group.size, twin, merged)


def without(group: ChannelGroup, *gone: int) -> PruningPlan:
    return PruningPlan((KeepUnits(group.id, tuple(unit for unit in range(group.size) if unit not in gone)),))


@torch.no_grad()
def apart(model: nn.Module, network: Network) -> float:
    (x,) = inputs(16)
    dense = network.graph(x)
    return float((model(x) - dense).abs().max() / dense.abs().max())


@torch.no_grad()
def behind(graph: nn.Module, target: str, x: Tensor) -> Tensor:
    """What a module of a network gives."""
    taken: list[Tensor] = []
    hook = graph.get_submodule(target).register_forward_hook(lambda _m, _i, out: taken.append(out))
    graph(x)
    hook.remove()
    return taken[0]


# --- merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", ["absorb", "mean"])
@pytest.mark.parametrize("name", UNNORMED)
def test_a_copy_that_is_merged_into_its_twin_leaves_the_network_as_it_was(name, merged):
    for number, group in enumerate(network_of(name).topology.offered):
        network = network_of(name)
        last = group.size - 1
        copied(network, group, 0, last)
        plan, rankings = without(group, last), {group.id: towards(group, {last: 0}, merged)}
        assert apart(prune(network, plan), network) > 1e-3, "the cut alone must be felt"
        for given in (inputs(), None):
            assert apart(merge(network, plan, rankings, given), network) < 1e-5, (group.name, number)


@pytest.mark.parametrize("merged", ["absorb", "mean"])
@pytest.mark.parametrize("name", UNNORMED)
def test_several_copies_go_into_one_twin_along_a_chain(name, merged):
    for group in network_of(name).topology.offered:
        network = network_of(name)
        copied(network, group, 1, 0, 2)
        rankings = {group.id: towards(group, {0: 2, 2: 1}, merged)}
        assert apart(merge(network, without(group, 0, 2), rankings, inputs()), network) < 1e-5, group.name


def test_all_groups_are_merged_at_once():
    for merged in ("absorb", "mean"):
        network = network_of("residual projection")
        for group in network.topology.offered:
            copied(network, group, 1, 3)
        plan = PruningPlan(tuple(without(group, 3).edits[0] for group in network.topology.offered))
        rankings = {group.id: towards(group, {3: 1}, merged) for group in network.topology.offered}
        assert len(plan.edits) == 3
        assert apart(merge(network, plan, rankings, inputs()), network) < 1e-5


@pytest.mark.parametrize(
    ("name", "group", "layer", "norm", "positions"),
    [
        ("chain", "a.0", "a.0", "a.1", [7]),
        ("depthwise", "a.0", "dw.0", "dw.1", [7]),
        ("depthwise multiplier", "a.0", "dw.0", "dw.1", [14, 15]),
        ("grouped", "g.0", "g.0", "g.1", [5, 11]),
        ("residual identity", "stem.0", "conv2", "bn2", [7]),
    ],
)
@pytest.mark.parametrize("merged", ["absorb", "mean"])
def test_copies_are_merged_whatever_the_scale_of_their_batch_norms(name, group, layer, norm, positions, merged):
    """The same channel with weights and statistics three times as large, which the norm undoes."""
    network = network_of(name)
    own = named(network, group)
    last = own.size - 1
    copied(network, own, 0, last)
    before = network.graph(*inputs(4))
    rescaled(network, norm, layer, positions, 3.0)
    assert torch.allclose(network.graph(*inputs(4)), before, atol=1e-4)
    rankings = {own.id: towards(own, {last: 0}, merged)}
    assert apart(merge(network, without(own, last), rankings, inputs()), network) < 1e-5


def test_the_mean_of_two_units_is_taken_behind_the_norm():
    """With one reader and no non-linearity between, the mean of what two layers give is what comes out."""
    network = network_of("residual projection")
    group = named(network, "project")
    merged = merge(network, without(group, 5), {group.id: towards(group, {5: 2}, "mean")}, None)
    (x,) = inputs(4)
    dense, after = behind(network.graph, "bn2", x), behind(merged, "bn2", x)
    assert torch.allclose(after[:, 2], dense[:, [2, 5]].mean(1), atol=1e-5)
    columns = network.graph.get_parameter("head.fc.weight")
    assert torch.allclose(merged.get_parameter("head.fc.weight")[:, 2], columns[:, [2, 5]].sum(1), atol=1e-6)
    others = [unit for unit in range(group.size) if unit not in (2, 5)]
    assert torch.allclose(after[:, [0, 1, *range(3, 15)]], dense[:, others], atol=1e-5)


def test_the_scale_of_a_norm_that_is_used_twice_is_averaged_once():
    network = network_of("norm twice")
    group = named(network, "a")
    merged = merge(network, without(group, 5), {group.id: towards(group, {5: 2}, "mean")}, None)
    dense, after = network.graph.get_submodule("norm"), merged.get_submodule("norm")
    scale = dense.weight / torch.sqrt(dense.running_var + dense.eps)
    level = dense.bias - scale * dense.running_mean
    own = after.weight / torch.sqrt(after.running_var + after.eps)
    assert torch.allclose(own[2], scale[[2, 5]].mean())
    assert torch.allclose(after.bias[2] - own[2] * after.running_mean[2], level[[2, 5]].mean(), atol=1e-6)
    rows = network.graph.get_parameter("a.weight")
    assert torch.allclose(merged.get_parameter("a.weight")[2], rows[[2, 5]].mean(0))


def test_a_dead_twin_comes_alive_with_the_mean():
    network = network_of("residual projection")
    group, state = named(network, "project"), network.graph.state_dict()
    with torch.no_grad():
        state["bn2.weight"][2] = 0.0
    merged = merge(network, without(group, 5), {group.id: towards(group, {5: 2}, "mean")}, None)
    (x,) = inputs(4)
    dense, after = behind(network.graph, "bn2", x), behind(merged, "bn2", x)
    assert torch.allclose(after[:, 2], dense[:, [2, 5]].mean(1), atol=1e-5)


def test_a_scaled_copy_is_absorbed_with_its_gain():
    """ReLU keeps a positive scale, so the next layer reads twice what it reads of the twin."""
    network = network_of("chain")
    group, state = named(network, "a.0"), network.graph.state_dict()
    copied(network, group, 0, 7)
    with torch.no_grad():
        state["a.1.weight"][7] *= 2.0
        state["a.1.bias"][7] *= 2.0
    plan, rankings = without(group, 7), {group.id: towards(group, {7: 0})}
    assert apart(merge(network, plan, rankings, inputs()), network) < 1e-5
    assert apart(merge(network, plan, rankings, None), network) > 1e-3


def test_units_are_averaged_only_where_no_samples_say_what_their_twin_takes_over():
    network = network_of("chain")
    group = named(network, "a.0")
    plan = without(group, 7)
    mean, absorbed = ({group.id: towards(group, {7: 0}, merged)} for merged in ("mean", "absorb"))
    fixed, same = (merge(network, plan, given, inputs()) for given in (mean, absorbed))
    assert torch.equal(fixed(*inputs(4)), same(*inputs(4)))
    assert apart(merge(network, plan, mean, None), network) > 1e-3


def test_a_removed_unit_goes_to_all_twins_that_give_it_together():
    """Behind no non-linearity output 7 is the sum of 0 and 1, and 6 is a copy of 1: one line on 0 misses the half."""
    torch.manual_seed(0)
    model = Straight()
    with torch.no_grad():
        model.first.weight[7] = model.first.weight[0] + model.first.weight[1]
        model.first.weight[6], model.first.bias[6] = model.first.weight[1], model.first.bias[1]
    network = find_groups(capture(model, example()))
    group = named(network, "first")
    plan, rankings = without(group, 6, 7), {group.id: towards(group, {7: 0, 6: 1})}
    assert apart(merge(network, plan, rankings, inputs(512)), network) < 0.1 * apart(prune(network, plan), network)


def test_each_half_of_a_grouped_convolution_absorbs_with_its_own_gain():
    network = network_of("grouped")
    group, state = named(network, "a.0"), network.graph.state_dict()
    copied(network, group, 0, 3)
    with torch.no_grad():
        state["a.1.weight"][7] *= 3.0  # channels 3 and 7 are unit 3
        state["a.1.bias"][7] *= 3.0
    rankings = {group.id: towards(group, {3: 0})}
    assert apart(merge(network, without(group, 3), rankings, inputs()), network) < 1e-5


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_channel_goes_into_the_bias_or_the_norm_of_the_next_layer(bias):
    """Read by a kernel of one, so that no border is in the way."""
    model = Depthwise()
    if bias:
        model.pw = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU())
    network = find_groups(capture(lived_in(model), example()))
    group, state = named(network, "a.0"), network.graph.state_dict()
    with torch.no_grad():
        state["dw.1.weight"][7], state["dw.1.bias"][7] = 0.0, 0.7
    plan, rankings = without(group, 7), {group.id: towards(group, {7: 0})}
    assert apart(prune(network, plan), network) > 1e-3
    assert apart(merge(network, plan, rankings, inputs()), network) < 1e-5


def test_a_constant_read_over_a_padded_border_goes_as_its_mean():
    network = network_of("chain")
    group, state = named(network, "a.0"), network.graph.state_dict()
    with torch.no_grad():
        state["a.1.weight"][7], state["a.1.bias"][7] = 0.0, 0.7
    plan, rankings = without(group, 7), {group.id: towards(group, {7: 0})}
    merged = merge(network, plan, rankings, inputs())
    (x,) = inputs()
    difference = behind(merged, "b.1", x) - behind(network.graph, "b.1", x)
    assert float(difference.mean((0, 2, 3)).abs().max()) < 1e-5
    assert float(difference.abs().max()) > 1e-3


def test_merge_without_data_or_stand_ins_is_the_cut_alone():
    network = network_of("residual pad")
    group = named(network, "conv1")
    plan, ranking = without(group, 3, 5), towards(group, {3: -1, 5: -1})
    for given in (ranking, dataclasses.replace(ranking, twin=None)):
        merged = merge(network, plan, {group.id: given}, None).state_dict()
        assert all(torch.equal(merged[name], value) for name, value in prune(network, plan).state_dict().items())


@pytest.mark.parametrize("named_twin", [-1, None])
def test_merge_keeps_what_a_constant_unit_gave(named_twin):
    """A norm with scale 0 and a shift: no other unit is like it, and its readers want the constant all the same."""
    network, (x,) = network_of("chain"), inputs()
    group, state = named(network, "a.0"), network.graph.state_dict()
    plan, ranking = without(group, 7), towards(group, {7: -1})
    given = dataclasses.replace(ranking, twin=ranking.twin if named_twin == -1 else None)
    with torch.no_grad():
        state["a.1.weight"][7], state["a.1.bias"][7] = 0.0, 1.5
    merged = merge(network, plan, {group.id: given}, (x,))
    lost, left = apart(prune(network, plan), network), apart(merged, network)
    assert lost > 0.05 and left < 0.2 * lost, "but for the border, where the kernel reads zeros"


def test_merge_finds_the_twin_where_a_ranking_names_none():
    """Unit 7 is unit 2 times 1.7: its readers take it from there, whatever the criterion was."""
    network, (x,) = network_of("chain"), inputs()
    group, state = named(network, "a.0"), network.graph.state_dict()
    copied(network, group, 2, 7)
    with torch.no_grad():
        state["a.1.weight"][7] *= 1.7
        state["a.1.bias"][7] *= 1.7
    plan, ranking = without(group, 7), dataclasses.replace(towards(group, {7: -1}), twin=None)
    merged = merge(network, plan, {group.id: ranking}, (x,))
    assert apart(merged, network) < 0.01 * apart(prune(network, plan), network)


def test_merge_adds_to_the_outputs_that_are_left_of_a_grouped_transposed_convolution():
    network, (x,) = network_of("transposed grouped"), inputs()
    plan = PruningPlan((KeepUnits(named(network, "a.0").id, (0, 2, 3)), KeepUnits(named(network, "up").id, (0, 1))))
    free = {each.id: dataclasses.replace(towards(each, {}), twin=None) for each in network.topology.offered}
    merged = merge(network, plan, free, (x,))
    assert apart(merged, network) < apart(prune(network, plan), network)


def test_merge_absorbs_most_of_what_a_correlated_channel_gave():
    network, (x,) = network_of("chain"), inputs()
    group, state = named(network, "a.0"), network.graph.state_dict()
    copied(network, group, 0, 7)
    with torch.no_grad():
        state["a.0.weight"][7] += 0.02 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
        state["a.1.weight"][7] *= 1.7
    plan, rankings = without(group, 7), {group.id: towards(group, {7: 0})}
    dense = behind(network.graph, "b.1", x)
    cut = float((behind(prune(network, plan), "b.1", x) - dense).square().mean())
    merged = float((behind(merge(network, plan, rankings, (x,)), "b.1", x) - dense).square().mean())
    assert merged < 0.1 * cut


def test_merge_and_layerwise_leave_the_dense_network_alone():
    for merged in ("absorb", "mean"):
        network = network_of("residual projection")
        group = named(network, "project")
        before = {name: value.clone() for name, value in network.graph.state_dict().items()}
        merge(network, without(group, 5), {group.id: towards(group, {5: 2}, merged)}, inputs())
        layerwise(network, without(group, 5), grams(network, inputs()))
        assert all(torch.equal(before[name], value) for name, value in network.graph.state_dict().items())


def test_a_shared_layer_takes_over_once():
    """The convolution that is used twice hands over once, or the twin would count double."""
    network = network_of("shared")
    group = named(network, "a.0")
    copied(network, group, 0, 7)
    weight = network.graph.get_parameter("s.weight").clone()
    merged = merge(network, without(group, 7), {group.id: towards(group, {7: 0})}, inputs())
    assert torch.allclose(merged.get_parameter("s.weight")[0, 0], weight[0, 0] + weight[0, 7], atol=1e-5)


def test_a_merged_network_reloads_from_its_plan_and_tensors():
    network = network_of("residual pad")
    group = named(network, "stem.0")
    plan, rankings = without(group, 2), {group.id: towards(group, {2: 1})}
    fixed = merge(network, plan, rankings, inputs()).eval()
    again = restore(prune(network, plan), fixed.state_dict(), "the bundle").eval()
    assert torch.equal(again(*inputs(2)), fixed(*inputs(2)))


def test_repair_by_mode_is_merge_and_layerwise():
    network, samples = network_of("chain"), Samples([inputs()])
    group = named(network, "a.0")
    copied(network, group, 0, 7)
    plan, rankings = without(group, 7), {group.id: towards(group, {7: 0})}
    pruned = prune(network, plan)
    assert apart(repair(pruned, network, plan, samples, "merge", rankings=rankings), network) < 1e-5
    assert apart(repair(pruned, network, plan, Samples([]), "merge", rankings=rankings), network) < 1e-5
    assert apart(repair(pruned, network, plan, samples, "layerwise"), network) < 0.1 * apart(pruned, network)
    with pytest.raises(UsageError, match=r"^the repair 'layerwise' needs calibration inputs, and the project has none"):
        repair(pruned, network, plan, Samples([]), "layerwise")
    with pytest.raises(UsageError, match=r"^the repair 'merge' needs the rankings of all 1 groups cut; 1 have none\."):
        repair(pruned, network, plan, samples, "merge")


# --- layerwise ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def layer_errors(network: Network, fixed: nn.Module, plan: PruningPlan, x: Tensor) -> dict[str, float]:
    """Squared error of each cut layer's output (its norm's mean counted as its bias) on the dense network's inputs."""
    keep, cut = kept_units(network.topology, plan), resolve(network.topology, plan)
    nodes = {node.name: node for node in network.graph.graph.nodes}
    readers = {str(nodes[reader.op].target): reader for reader in network.readers}
    after = {str(n.args[0].target): str(n.target) for n in nodes.values() if n.op == "call_module" and n.args[:1]
             and isinstance(network.graph.get_submodule(str(n.target)), nn.BatchNorm2d)}  # fmt: skip
    errors: dict[str, float] = {}

    def compare(name: str):
        def hook(_module: nn.Module, given: tuple[Tensor, ...], dense: Tensor) -> None:
            reader = readers[name]
            axis = reader.axis
            read = given[0].index_select(axis, torch.from_numpy(np.flatnonzero(keep[reader.ids])))
            got = fixed.get_submodule(name)(read)
            made = 1 if isinstance(network.graph.get_submodule(name), nn.ConvTranspose2d) else 0
            outputs = cut.params.get(f"{name}.weight", {}).get(made)
            outputs = torch.arange(dense.shape[axis]) if outputs is None else torch.from_numpy(outputs)
            if made and len(outputs) < got.shape[axis]:  # of a grouped one: positions among the outputs of each group
                times = got.shape[axis] // len(outputs)
                outputs = torch.cat([outputs + at * dense.shape[axis] // times for at in range(times)])
            if name in after:
                mean = network.graph.get_buffer(f"{after[name]}.running_mean")[outputs]
                view = [1, -1, *[1] * (got.dim() - 2)]
                got = got - (fixed.get_buffer(f"{after[name]}.running_mean") - mean).reshape(view)
            errors[name] = errors.get(name, 0.0) + float((got - dense.index_select(axis, outputs)).square().mean())

        return hook

    hooks = [network.graph.get_submodule(name).register_forward_hook(compare(name)) for name in readers
             if isinstance(network.graph.get_submodule(name), MAPPED)]  # fmt: skip
    network.graph(x)
    for hook in hooks:
        hook.remove()
    return errors


def half(network: Network) -> PruningPlan:
    return PruningPlan(
        tuple(KeepUnits(g.id, tuple(range(0, g.size, 2))) for g in network.topology.offered if g.size > 1)
    )


@pytest.mark.parametrize("name", ALL)
def test_layerwise_never_grows_the_error_of_a_layer_on_the_calibration_set(name):
    network = network_of(name)
    plan, (x,) = half(network), inputs()
    cut = layer_errors(network, prune(network, plan), plan, x)
    solved = layer_errors(network, layerwise(network, plan, grams(network, (x,))), plan, x)
    assert cut and set(cut) == set(solved)
    for layer in cut:
        assert solved[layer] <= cut[layer] + 1e-9, layer
    fitted = [layer for layer in cut if is_layer(network.graph, node_of(network, layer)) and cut[layer] > 0]
    assert fitted and all(solved[layer] < 0.9 * cut[layer] for layer in fitted), (cut, solved)


def node_of(network: Network, target: str):
    return next(n for n in network.graph.graph.nodes if n.op == "call_module" and n.target == target)


def test_layerwise_is_exact_where_what_went_is_a_combination_of_what_stayed(monkeypatch):
    """Output 7 = output 0 - 2 x output 1 + 3; the ridge alone is in the way, and without it nothing is."""
    torch.manual_seed(0)
    model = Straight()
    with torch.no_grad():
        model.first.weight[7] = model.first.weight[0] - 2 * model.first.weight[1]
        model.first.bias[7] = model.first.bias[0] - 2 * model.first.bias[1] + 3.0
    network = find_groups(capture(model, example()))
    group = named(network, "first")
    plan, seen = without(group, 7), grams(network, inputs())
    damped = apart(layerwise(network, plan, seen), network)
    assert damped < 0.02 * apart(prune(network, plan), network)
    monkeypatch.setattr(merge_module, "RIDGE", 1e-9)
    assert apart(layerwise(network, plan, seen), network) < 1e-5 < damped


@pytest.mark.parametrize("name", [name for name in UNNORMED if name not in UNSOLVED])
def test_layerwise_is_exact_for_copies(name, monkeypatch):
    """Groups of one or several layers, grouped and shared ones too. Transposed convolutions are not solved."""
    monkeypatch.setattr(merge_module, "RIDGE", 1e-8)
    for group in network_of(name).topology.offered:
        network = network_of(name)
        copied(network, group, 0, group.size - 1)
        plan = without(group, group.size - 1)
        fixed = layerwise(network, plan, grams(network, inputs()))
        assert apart(fixed, network) < 0.01 * apart(prune(network, plan), network), group.name


# --- maps and Gram matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_maps_show_what_every_reader_reads_of_each_unit(name):
    """The reference finds the channels of each unit one by one in what the reading layers are given."""
    network, (x,) = network_of(name), inputs(3)
    given = {}
    nodes = {node.name: node for node in network.graph.graph.nodes}
    for target in {str(nodes[reader.op].target) for reader in network.readers}:
        network.graph.get_submodule(target).register_forward_hook(
            lambda _m, args, _o, t=target: given.setdefault(t, []).append(args[0].detach())
        )
    network.graph(x)
    shown, uses = maps(network, (x,)), dict.fromkeys(given, 0)
    expected: dict[str, list[list[Tensor]]] = {group.id: [] for group in network.topology.offered}
    for reader in network.readers:
        target = str(nodes[reader.op].target)
        read = given[target][uses[target]].movedim(reader.axis, 1)
        uses[target] += 1
        for group in network.topology.offered:
            channels = [read[:, [i for i, unit in enumerate(reader.ids) if unit == own]] for own in group.units]
            if all(channel.shape[1] for channel in channels):
                expected[group.id].append(channels)
    for group in network.topology.offered:
        assert len(shown[group.id]) == len(expected[group.id]) > 0
        for tensor, channels in zip(shown[group.id], expected[group.id], strict=True):
            assert tensor.dim() == 4 and tensor.shape[:2] == (3, group.size)
            for unit, channel in enumerate(channels):
                assert torch.equal(tensor[:, unit].flatten(1), channel.flatten(1))


def test_the_maps_of_an_expansion_are_those_behind_the_depthwise_kernel():
    """One unit is the pointwise filter, the depthwise kernel and the column that reads it: only the last one reads."""
    network, (x,) = network_of("depthwise"), inputs(2)
    group = named(network, "a.0")
    (only,) = maps(network, (x,))[group.id]
    assert torch.equal(only, behind(network.graph, "dw.2", x))


def test_affordable_samples_fall_with_the_size_of_the_network_but_not_below_four(monkeypatch):
    network = network_of("chain")  # 3 and 8 channels of 64 positions are read, and 12 means
    each = 4 * (3 * 64 + 8 * 64 + 12)
    assert affordable(network) == (maps_module.MAPS_MIB << 20) // each
    monkeypatch.setattr(maps_module, "MAPS_MIB", 0)
    assert affordable(network) == 4


@pytest.mark.parametrize("name", ["residual projection", "grouped", "flat", "normed"])
def test_a_gram_matrix_is_the_covariance_of_unfolded_patches(name):
    network, (x,) = network_of(name), inputs(4)
    given = {}
    for target, module in network.graph.named_modules():
        if isinstance(module, MAPPED):
            module.register_forward_hook(lambda _m, args, _o, t=target: given.__setitem__(t, args[0].detach()))
    network.graph(x)
    found = grams(network, (x,))
    assert found
    for target, gram in found.items():
        layer = network.graph.get_submodule(target)
        if isinstance(layer, nn.Linear):
            rows = given[target].reshape(-1, 1, layer.in_features)
        else:
            folded = nn.functional.unfold(given[target], layer.kernel_size, 1, layer.padding, layer.stride)
            rows = folded.transpose(1, 2).reshape(-1, layer.groups, folded.shape[1] // layer.groups)
        assert gram.rows == len(rows) and gram.columns.shape == (rows.shape[2],)
        for part in range(rows.shape[1]):
            own = rows[:, part]
            assert torch.allclose(gram.mean[part], own.mean(0), atol=1e-5)
            assert torch.allclose(gram.covariance[part], torch.cov(own.T, correction=0), atol=1e-4)


def test_the_columns_of_a_gram_matrix_name_the_unit_behind_each_tap():
    network = network_of("grouped")
    group, gram = named(network, "a.0"), grams(network, inputs(2))["g.0"]
    assert gram.covariance.shape == (2, 36, 36)
    assert gram.columns.tolist() == [unit for unit in group.units for _ in range(9)]


def test_two_gram_matrices_join_to_that_of_all_rows():
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 4, generator=source) + torch.arange(30)[:, None]

    def gram(part: Tensor) -> Gram:
        return Gram(torch.cov(part.T, correction=0)[None], part.mean(0)[None], np.arange(4), len(part))

    joined, whole = gram(rows[:12]).joined(gram(rows[12:])), gram(rows)
    assert joined.rows == 30 and torch.allclose(joined.mean, whole.mean, atol=1e-5)
    assert torch.allclose(joined.covariance, whole.covariance, rtol=1e-4)


# --- operations -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def counted(model: nn.Module) -> tuple[int, int, int]:
    """MACs, elements written and weights of the layers of a network, seen from outside in one run."""
    macs, written, weights, hooks = [], [], {}, []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        positions = args[0] if isinstance(module, nn.ConvTranspose2d) else out
        channels = positions.shape[-1 if isinstance(module, nn.Linear) else 1]
        macs.append(module.weight.numel() * (positions.numel() // channels))
        written.append(out.numel())
        weights[id(module.weight)] = module.weight.numel()

    for module in model.modules():
        if isinstance(module, MAPPED):
            hooks.append(module.register_forward_hook(hook))
    model.eval()(*example())
    for own in hooks:
        own.remove()
    return sum(macs), sum(written), sum(weights.values())


def plans(network: Network) -> list[PruningPlan]:
    """No cut, each group alone, all groups, and each block with all groups outside it."""
    offered, every = network.topology.offered, half(network).edits
    found = [PruningPlan(), PruningPlan(every), *(without(group, 0) for group in offered)]
    for block in network.topology.removable:
        inner = {group.id for group in offered if group.block == block.id}
        found.append(PruningPlan((DropBlock(block.id), *(edit for edit in every if edit.group not in inner))))
    return found


class GroupedUp(nn.Module):
    """Transposed convolutions of two groups and of one group a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = conv(3, 8), nn.ConvTranspose2d(8, 12, 3, 2, 1, groups=2)
        self.each, self.head = nn.ConvTranspose2d(12, 12, 2, 2, groups=12), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.each(torch.relu(self.up(self.a(x))))))


@pytest.mark.parametrize("name", [*ALL, "grouped transposed"])
def test_operations_of_a_choice_are_those_of_the_network_cut_and_captured_again(name):
    network = network_of(name) if name in ALL else find_groups(capture(GroupedUp().eval(), example()))
    operations = Operations(network.topology)
    seen = set()
    for plan in plans(network):
        pruned = prune(network, plan)
        widths = plan.widths(network.topology.groups)
        macs, written, weights = counted(pruned)
        again = Operations(find_groups(capture(pruned, example()), prove=False).topology)
        assert operations.macs(widths, plan.dropped) == macs == again.macs()
        assert operations.parameters(widths, plan.dropped) == weights == again.parameters()
        assert operations.activations(widths, plan.dropped) == written == again.activations()
        seen.add(macs)
    assert len(seen) > 2


def test_groups_that_are_left_out_keep_all_their_units():
    network = network_of("residual identity")
    operations = Operations(network.topology)
    group = named(network, "conv1")
    assert operations.macs({group.id: 6}) == operations.macs(without(group, *range(6)).widths(network.topology.groups))
    assert operations.macs({}) == operations.macs() == counted(network.graph)[0]
    assert math.isclose(operations.macs({group.id: 6}), operations.macs() - 6 * 2 * 9 * 8 * 64)


def test_the_residual_block_removed_takes_its_operations_with_it():
    network = find_groups(capture(Residual("identity").eval(), example()))
    (block,) = network.topology.removable
    assert Operations(network.topology).macs({}, (block.id,)) == 3 * 8 * 9 * 64 + 8 * 5
