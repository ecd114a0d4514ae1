import copy
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from prune_nets import NETS, Chain, Residual, example
from torch import nn
from torch.fx import symbolic_trace

from pipeline.nouns import DropBlock, KeepUnits, PruningPlan, Ranking
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Evidence, Samples, divergence
from pipeline.prune.groups import find_groups
from pipeline.prune.ranking import rank
from pipeline.prune.repair import MODES, SequentialFit, _Ridge, repair
from pipeline.prune.sensitivity import FEWEST_ROWS, ROWS, LossProbe, measure, rows_worth, spread
from pipeline.prune.surgery import prune, restore
from pipeline.prune.taps import is_relu, set_bias
from profiles.errors import DeployError


def lived_in(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and scales of a network that has been trained a little."""
    torch.manual_seed(1)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
        for _ in range(30):
            model(torch.randn(32, 3, 8, 8))
    return model.eval()


def network_of(name: str) -> Network:
    torch.manual_seed(0)
    return find_groups(capture(lived_in(NETS[name]()), example()))


def some_samples(count: int = 96) -> Samples:
    inputs = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return Samples([(batch,) for batch in inputs.split(32)])


def gap(model: nn.Module, network: Network, samples: Samples) -> float:
    (x,) = samples.joined()
    with torch.no_grad():
        return float(divergence((model(x),), (network.graph(x),)).mean())


def halved(network: Network) -> PruningPlan:
    rankings = rank(Evidence(network, some_samples()), "magnitude")
    return PruningPlan(
        tuple(KeepUnits(g.id, rankings[g.id].keep(max(1, g.size // 2))) for g in network.topology.offered)
    )


@pytest.mark.parametrize("name", [n for n in NETS if n not in ("transposed", "flat")])
def test_least_squares_brings_a_cut_network_nearer_to_the_dense_one(name):
    network, samples = network_of(name), some_samples()
    plan = halved(network)
    pruned = prune(network, plan)
    fixed = repair(pruned, network, plan, samples, "least-squares")
    assert gap(fixed, network, samples) < 0.9 * gap(pruned, network, samples)


def test_least_squares_restores_the_network_exactly_when_what_was_cut_is_a_copy():
    """Channels 4 to 7 repeat 0 to 3: the next layer can take over their weights, and nothing is lost."""
    model = lived_in(Chain())
    with torch.no_grad():
        for value in (
            model.a[0].weight,
            model.a[1].weight,
            model.a[1].bias,
            model.a[1].running_mean,
            model.a[1].running_var,
        ):
            value[4:] = value[:4]
    network, samples = find_groups(capture(model, example())), some_samples()
    group = next(g for g in network.topology.offered if g.name == "a.0")
    plan = PruningPlan((KeepUnits(group.id, (0, 1, 2, 3)),))
    pruned = prune(network, plan)
    assert gap(repair(pruned, network, plan, samples), network, samples) < 0.02 * gap(pruned, network, samples)


def test_the_layer_before_a_removed_block_is_aimed_at_what_the_block_gave():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Residual("identity"), Residual("identity")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def block(net: Residual, x: torch.Tensor) -> torch.Tensor:
                y = net.bn2(net.conv2(torch.relu(net.bn1(net.conv1(x)))))
                return torch.relu(y + x)

            return self.two.head(block(self.two, block(self.one, self.one.stem(x))))

    network, samples = find_groups(capture(lived_in(Two()), example())), some_samples(256)
    plan = PruningPlan((DropBlock(network.topology.removable[-1].id),))
    pruned = prune(network, plan)
    assert gap(repair(pruned, network, plan, samples), network, samples) < 0.5 * gap(pruned, network, samples)


@cache
def ranked(name: str) -> tuple[Network, dict[str, Ranking]]:
    network = network_of(name)
    return network, rank(Evidence(network, some_samples()), "red")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", MODES)
def test_no_repair_takes_a_network_further_from_the_dense_one_on_its_samples(mode, name):
    (network, rankings), samples, source = ranked(name), some_samples(), np.random.default_rng(0)
    halves = [(g.id, sorted(source.permutation(g.size)[: (g.size + 1) // 2])) for g in network.topology.offered]
    plan = PruningPlan(tuple(KeepUnits(id, tuple(map(int, kept))) for id, kept in halves))
    pruned = prune(network, plan)
    fixed = repair(pruned, network, plan, samples, mode, rankings=rankings)
    assert gap(fixed, network, samples) <= gap(pruned, network, samples) * (1 + 1e-6)


def test_without_anything_cut_the_dense_network_comes_back():
    network, samples = network_of("chain"), some_samples()
    whole = prune(network, PruningPlan())
    assert gap(repair(whole, network, PruningPlan(), samples, "bn"), network, samples) == 0.0


def test_bn_repair_moves_statistics_and_nothing_else():
    network, samples = network_of("chain"), some_samples()
    pruned = prune(network, halved(network))
    fixed = repair(pruned, network, halved(network), samples, "bn")
    changed = {name for name, value in fixed.state_dict().items() if not torch.equal(value, pruned.state_dict()[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)


def test_bn_repair_of_ragged_batches_is_the_mean_over_samples_and_one_sample_changes_nothing():
    network, (x,) = network_of("chain"), some_samples().joined()
    plan = halved(network)
    pruned = prune(network, plan)
    ragged = repair(pruned, network, plan, Samples([(x[:60],), (x[60:70],)]), "bn")
    with torch.no_grad():
        read = pruned.get_submodule("a.0")(x[:70])
    assert torch.allclose(ragged.get_buffer("a.1.running_mean"), read.mean((0, 2, 3)), atol=1e-5)
    single = repair(pruned, network, plan, Samples([(x[:1],)]), "bn").state_dict()
    assert all(torch.equal(value, single[name]) for name, value in pruned.state_dict().items())


def test_repair_leaves_the_pruned_and_the_dense_network_alone():
    network, samples = network_of("residual pad"), some_samples()
    plan = halved(network)
    pruned = prune(network, plan)
    before = copy.deepcopy(pruned.state_dict()), copy.deepcopy(network.graph.state_dict())
    repair(pruned, network, plan, samples)
    for old, module in zip(before, (pruned, network.graph), strict=True):
        assert all(torch.equal(old[name], value) for name, value in module.state_dict().items())


def test_a_pruned_network_reloads_from_its_plan_and_tensors():
    network, samples = network_of("residual pad"), some_samples()
    plan = halved(network)
    fixed = repair(prune(network, plan), network, plan, samples)
    again = restore(prune(network, plan), fixed.state_dict(), "the bundle")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(x), fixed(x))


def test_tensors_that_do_not_fit_the_plan_are_named():
    network = network_of("chain")
    pruned = prune(network, halved(network))
    state = dict(pruned.state_dict())
    with pytest.raises(
        DeployError, match=r"^the bundle: 'a\.0\.weight' is \(8, 3, 3, 3\), and the plan makes it \(4, 3, 3, 3\)\.$"
    ):
        restore(pruned, state | {"a.0.weight": torch.zeros(8, 3, 3, 3)}, "the bundle")
    del state["a.0.weight"]
    with pytest.raises(DeployError, match=r"^the bundle: the tensor 'a\.0\.weight' is missing\."):
        restore(pruned, state, "the bundle")


# --- rankings and values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_gradient_criteria_take_a_channel_that_nothing_reads_first(criterion):
    model = lived_in(Chain())
    with torch.no_grad():
        model.b[0].weight[:, 5] = 0.0
    network = find_groups(capture(model, example()))
    group = next(g for g in network.topology.offered if g.name == "a.0")
    assert rank(Evidence(network, some_samples()), criterion)[group.id].removal_order[0] == 5


def test_fisher_sums_coupled_channels_inside_the_square():
    """The gradient of a unit's gate is that of one scale put on all its readers at once."""
    network, samples = network_of("residual projection"), some_samples(8)
    evidence = Evidence(network, Samples(samples.inputs, torch.arange(8) % 5))
    group = next(g for g in network.topology.offered if g.name == "stem.0")
    (x,) = samples.joined()
    scale = torch.ones(8, 8, requires_grad=True)
    stem = network.graph.get_submodule("stem.1")
    hook = stem.register_forward_hook(lambda _m, _i, out: out * scale[:, :, None, None].relu())
    loss = nn.functional.cross_entropy(network.graph(x), torch.arange(8) % 5, reduction="sum")
    loss.backward()
    hook.remove()
    ours = evidence.gate_gradients[:, list(group.units)]
    assert torch.allclose(ours, scale.grad, atol=1e-5)


def test_random_depends_on_the_seed_alone():
    network = network_of("chain")
    first, again, other = (rank(Evidence(network, some_samples(), seed=seed), "random") for seed in (1, 1, 2))
    assert first == again and first != other


def test_values_are_zero_at_full_width_and_never_fall_with_narrower_ones():
    network, samples = network_of("residual pad"), some_samples()
    rankings = rank(Evidence(network, samples), "fisher")
    probe = LossProbe(network, samples)
    choices = {g.id: (2, 4, 6, g.size) for g in network.topology.offered}
    values = measure(probe, rankings, choices)
    for group in network.topology.offered:
        curve = sorted(values.groups[group.id].items())
        assert curve[-1] == (group.size, 0.0) and len(curve) == 4
        assert all(a[1] >= b[1] for a, b in pairwise(curve))
    assert values.blocks[network.topology.removable[0].id] > 0


def test_a_loss_measured_from_kept_values_is_the_loss_of_a_whole_run(monkeypatch):
    """With no memory for dense values everything is computed again, and nothing changes."""
    network, samples = network_of("residual pad"), some_samples()
    plan = halved(network)
    kept = LossProbe(network, samples).loss(plan)
    single = PruningPlan(plan.edits[-1:])
    one = LossProbe(network, samples).loss(single)
    monkeypatch.setattr("pipeline.prune.sensitivity.KEEP_MIB", 0)
    assert LossProbe(network, samples).loss(plan) == pytest.approx(kept, rel=1e-4)
    assert LossProbe(network, samples).loss(single) == pytest.approx(one, rel=1e-4)


def test_what_only_a_relu_reads_is_not_kept():
    network, samples = network_of("residual pad"), some_samples()
    kept = LossProbe(network, samples).values.keys()
    relus = [node for node in network.graph.graph.nodes if is_relu(network.graph, node)]
    read_alone = {node.args[0].name for node in relus if len(node.args[0].users) == 1}
    assert read_alone and not read_alone & kept and {node.name for node in relus} <= kept


def test_a_loss_is_that_of_samples_which_no_layer_was_refitted_on():
    """A head of 256 inputs gives twelve samples their outputs back, whatever is left in front of it."""
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    network = find_groups(capture(lived_in(wide), example()))
    first = network.topology.offered[0]
    plan = PruningPlan((KeepUnits(first.id, tuple(range(2))),))
    samples, fresh = some_samples(12), some_samples(400)
    fitted = repair(prune(network, plan), network, plan, samples)
    assert gap(fitted, network, samples) < 0.1 * gap(fitted, network, fresh)
    assert LossProbe(network, samples).loss(plan) > 0.5 * gap(fitted, network, fresh)


def test_a_layer_that_no_edit_reaches_is_not_refitted_even_where_it_has_to_be_computed_again(monkeypatch):
    network, samples = network_of("residual pad"), some_samples()
    last = halved(network).edits[-1]
    monkeypatch.setattr("pipeline.prune.sensitivity.KEEP_MIB", 0)
    refitted, real = [], SequentialFit._refit

    def spy(self, node, x):
        refitted.append(node.name)
        real(self, node, x)

    monkeypatch.setattr(SequentialFit, "_refit", spy)
    LossProbe(network, samples).loss(PruningPlan((last,)))
    layers = [m for m in network.graph.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert 0 < len(refitted) < len(layers)


@pytest.mark.parametrize(("rows", "columns"), [(40, 12), (12, 40), (20, 20)])
def test_both_forms_of_ridge_regression_find_the_minimum(rows, columns):
    torch.manual_seed(0)
    patches, target = torch.randn(2, rows, columns), torch.randn(2, rows, 5)
    weights = _Ridge(patches, 0.1).solve(target)
    strength = 0.1 * patches.square().sum(1).mean(1) + 1e-8
    slope = patches.transpose(1, 2) @ (patches @ weights - target) + strength[:, None, None] * weights
    assert slope.abs().max() < 1e-3


def test_a_probe_of_a_network_with_wide_layers_takes_fewer_rows():
    def rows(width: int) -> tuple[int, int]:
        network = find_groups(capture(nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 8, 3)), example()))
        return rows_worth(network)

    assert rows(16) == (ROWS, 2)
    assert ROWS > rows(2048)[0] > rows(4096)[0] >= FEWEST_ROWS and rows(2048)[1] == 2
    assert rows(16384) == (FEWEST_ROWS, 1)


def test_widths_to_value_are_spread_and_hold_both_ends():
    assert spread([8, 16, 24, 32, 40, 48, 56], 3) == [8, 32, 56]
    assert spread([8, 16], 3) == [8, 16]
    assert np.all(np.diff(spread(list(range(20)), 5)) > 0)


def test_a_bias_that_a_repair_adds_is_frozen_where_its_layer_is():
    for frozen in (True, False):
        layer = nn.Linear(3, 2, bias=False).requires_grad_(not frozen)
        set_bias(layer, None, torch.ones(2), torch.zeros(2))
        assert layer.bias.requires_grad is not frozen
        again = symbolic_trace(nn.Sequential(nn.Linear(3, 2, bias=False))).requires_grad_(not frozen)
        restore(again, {f"0.{name}": value for name, value in layer.state_dict().items()}, "it")
        assert {p.requires_grad for p in again.parameters()} == {not frozen}
