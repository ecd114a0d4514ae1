"""Code that cannot be traced stays whole, says so, and survives everything that follows."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from leaf_nets import (
    Around,
    Asks,
    Branch,
    ByFunction,
    Called,
    Deeper,
    Doubles,
    FromDoubles,
    FromPairs,
    FromSized,
    HoldsScript,
    Outputs,
    Picks,
    Positive,
    Rectified,
    Remembers,
    Reshapes,
    Scaled,
    Swish,
    ThroughNumpy,
    Writes,
    swish,
)
from prune_nets import example
from torch import Tensor, nn

from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.groups import find_groups
from pipeline.prune.surgery import prune
from pipeline.prune.whole import Whole
from profiles.errors import DeployError


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module.eval())


def traced(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module.eval(), torch.randn(1, 8, 8, 8))


LEAVES = {  # what stands in the middle -> the module that stays whole, and a word of the reason
    "branch": (Branch, "middle", "control flow on data"),
    "deeper": (Deeper, "middle.branch", "control flow on data"),
    "asks": (Asks, "middle", "'middle.positive' gives a bool, which may depend on data"),
    "a number with a tensor": (Scaled, "middle", "'middle.scales' gives a float"),
    "dict": (FromPairs, "middle.pairs", "control flow on data"),
    "named tuple": (FromDoubles, "middle.doubles", "control flow on data"),
    "shape of data": (Picks, "middle", "a shape that depends on data (a mask as index)"),
    "numpy": (ThroughNumpy, "middle", "a number taken from data (numpy)"),
    "tensor of its own": (Remembers, "middle", "control flow on data"),
    "script with a tensor of its own": (lambda: scripted(Remembers()), "middle", "it is TorchScript"),
    "defaults": (Called, "middle.defaults", "control flow on data"),
    "script inside": (HoldsScript, "middle", "control flow on data"),
    "writes": (Writes, "middle", "the forward writes into an activation"),
    "sizes with a tensor": (FromSized, "middle.sized", "the forward writes into an activation"),
    "script": (lambda: scripted(Rectified()), "middle", "it is TorchScript"),
    "script that decides": (lambda: scripted(Branch()), "middle", "it is TorchScript"),
    "traced": (lambda: traced(nn.Conv2d(8, 8, 3, 1, 1)), "middle", "it is TorchScript"),
}


def captured(middle: nn.Module) -> tuple[nn.Module, Network]:
    torch.manual_seed(0)
    model = Around(middle).eval()
    return model, find_groups(capture(model, example()))


def inputs() -> list[Tensor]:
    """Both signs: both branches of what decides by its sum."""
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [x, -x, 10 * x, x - 3, x + 3]


@pytest.mark.parametrize("name", LEAVES)
def test_the_innermost_module_that_cannot_be_traced_stays_whole_with_its_reason(name: str):
    make, path, word = LEAVES[name]
    model, network = captured(make())
    assert list(network.leaves) == [path] and word in network.leaves[path]
    assert name.startswith(("script", "traced")) or "leaf_nets.py:" in network.leaves[path]
    assert isinstance(network.graph.get_submodule(path), Whole)
    frozen = {group.name: group.frozen for group in network.topology.groups}
    assert word in str(frozen["a"]) and frozen["b"] is None, "what it reads stays, what is after it may go"
    for x in inputs():
        assert torch.allclose(network.graph(x), model(x), atol=1e-5)


def test_both_branches_are_really_taken_by_these_inputs():
    model, _ = captured(Branch())
    assert {bool((torch.relu(model.a(x)) - 0.3).sum() > 0) for x in inputs()} == {True, False}


@pytest.mark.parametrize(
    "name", ["branch", "dict", "script", "script that decides", "script inside", "writes", "sizes with a tensor"]
)
def test_a_leaf_survives_surgery_copies_and_training(name: str):
    make, path, _ = LEAVES[name]
    model, network = captured(make())
    (group,) = network.topology.offered
    pruned = prune(network, PruningPlan((KeepUnits(group.id, (0, 2, 3, 7)),)))
    assert pruned.b.weight.shape[0] == 4
    with torch.no_grad():
        model.c.weight[:, [1, 4, 5, 6, 8, 9, 10, 11]] = 0
    for x in inputs():
        assert torch.allclose(pruned(x), model(x), atol=1e-5), "it computes what the masked network does"
    copied = copy.deepcopy(pruned).double().train()
    before = {name: value.clone() for name, value in copied.named_parameters()}
    optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
    copied(inputs()[4].double()).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in copied.named_parameters() if not torch.equal(before[name], value)}
    assert {"a.weight", "c.weight"} <= moved
    own = {name for name in before if name.startswith(path)}
    assert own == {f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()}
    assert own <= moved or name != "script", "what is left whole is trained too"
    unchanged = dict(pruned.named_parameters())
    assert all(torch.equal(unchanged[name].double(), before[name]) for name in before), "a copy has its own tensors"


def test_a_copy_of_a_leaf_computes_with_its_own_tensors():
    _, network = captured(Branch())
    leaf = network.graph.get_submodule("middle")
    other = copy.deepcopy(leaf)
    with torch.no_grad():
        other.inner.conv.weight.zero_()
    x = torch.rand(1, 8, 4, 4)
    assert not torch.allclose(other(x), leaf(x))
    assert other.train()._module.training and other._module.inner.norm.training and not leaf._module.training


def test_modules_inside_a_leaf_that_are_leaves_no_more_are_not_named():
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positive, self.branch = Positive(), Branch()

        def forward(self, x: Tensor) -> Tensor:
            x = self.branch(x)
            return x if self.positive(x) else -x

    _, network = captured(Outside())
    assert list(network.leaves) == ["middle"]


def test_a_mask_that_is_known_beforehand_is_traced_through():
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.arange(8) % 2 == 0)

        def forward(self, x: Tensor) -> Tensor:
            return x * x[:, :, self.rows].repeat_interleave(2, dim=2)

    model, network = captured(Masks())
    assert network.leaves == {}
    for x in inputs():
        assert torch.allclose(network.graph(x), model(x), atol=1e-5)


@pytest.mark.parametrize("how", ["class", "kept name"])
def test_an_autograd_function_is_one_operator_that_keeps_its_backward(how: str):
    model, network = captured(ByFunction(how))
    assert network.leaves == {}
    frozen = {group.name: group.frozen for group in network.topology.groups}
    assert frozen["a"] == "there is no rule for leaf_nets.Swish 'function_0'" and frozen["b"] is None
    x = inputs()[0]
    found, expected = (torch.autograd.grad(f(x).square().sum(), f.a.weight)[0] for f in (network.graph, model))
    assert torch.allclose(found, expected, rtol=1e-4) and float(expected.abs().max()) > 0
    assert torch.equal(Swish.apply(x), swish(x)), "what was caught while tracing is given back"


def test_a_torchscript_function_is_one_operator():
    double = scripted_function()

    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x)

    model, network = captured(Calls())
    assert {g.name: g.frozen for g in network.topology.groups}["a"] == (
        "there is no rule for test_leaves.decide 'function_0'"
    )
    for x in inputs():
        assert torch.allclose(network.graph(x), model(x), atol=1e-5)
    assert torch.equal(copy.deepcopy(network.graph)(x), network.graph(x))


def decide(x: Tensor) -> Tensor:
    if bool(x.sum() > 0):
        x = x * 2
    return x


def scripted_function() -> torch.jit.ScriptFunction:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(decide)


def test_loops_shapes_star_arguments_and_folds_are_traced_through():
    model, network = captured(Reshapes())
    assert network.leaves == {} and {g.name for g in network.topology.offered} >= {"b", "a"}
    for x in inputs():
        assert torch.allclose(network.graph(x), model(x), atol=1e-5)


def test_outputs_in_dicts_lists_and_tuples_come_out_as_they_were():
    model = Outputs().eval()
    network = find_groups(capture(model, example()))
    x = inputs()[0]
    found, expected = network.graph(x), model(x)
    assert found.keys() == expected.keys() and isinstance(found["aux"], list) and isinstance(found["aux"][1], tuple)
    assert torch.allclose(found["out"], expected["out"]) and torch.equal(found["aux"][1][0], expected["aux"][1][0])
    assert [group.name for group in network.topology.offered] == ["a"]


def test_a_leaf_whose_pieces_are_outputs_freezes_what_it_reads():
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.doubles = nn.Conv2d(3, 8, 3, 1, 1), Doubles()

        def forward(self, x: Tensor) -> object:
            return self.doubles(self.a(x))

    network = find_groups(capture(Gives(), example()))
    (group,) = (g for g in network.topology.groups if g.name == "a")
    assert group.frozen is not None and "control flow on data" in group.frozen


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Branch(), r"Branch\.forward, leaf_nets\.py:\d+: control flow on data \(if, while, and, or\)\."),
        (Asks(), r"Asks\.forward, leaf_nets\.py:\d+: 'positive' gives a bool, which may depend on data\."),
        (scripted(Rectified()), r"it is TorchScript as a whole\."),
    ],
)
def test_where_only_the_network_itself_could_be_left_whole_capture_fails(network: nn.Module, reason: str):
    with pytest.raises(DeployError, match=f"^the network cannot be captured: {reason}"):
        capture(network, (torch.randn(1, 8, 8, 8),))


@torch.library.custom_op("leaves_test::count", mutates_args=())
def count(x: Tensor) -> int:
    return int((x > 0).sum())


def test_a_number_that_a_custom_operator_gives_is_never_a_constant():
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * count(x)

    model, network = captured(Counts())
    assert list(network.leaves) == ["middle"] and "(leaves_test::count)" in network.leaves["middle"]
    for x in inputs():
        assert torch.allclose(network.graph(x), model(x), atol=1e-3)


def test_a_number_that_was_taken_from_the_data_unseen_is_noticed():
    class Peeks(nn.Module):
        """Looks at the sign of a float32 where no tracer is."""

        def forward(self, x: Tensor) -> Tensor:
            return x * (2.0 if x.sum().untyped_storage().tolist()[3] < 128 else 3.0)

    with pytest.raises(DeployError, match=r"the captured network differs from the given one by"):
        capture(Peeks(), example())
