import pytest
import torch
from prune_nets import NETS, Branching, Chain, Odd, Partly, Shuffle, example
from torch import Tensor, fx, nn

from pipeline.prune.capture import ancestors, apart, capture
from pipeline.prune.groups import find_groups
from pipeline.prune.operators import ChannelGather
from pipeline.prune.rules.base import unknown
from profiles.errors import DeployError


@pytest.mark.parametrize("name", NETS)
def test_a_captured_network_computes_what_the_given_one_does_for_any_batch(name):
    torch.manual_seed(0)
    model = NETS[name]().eval()
    network = capture(model, example())
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(network.graph(x), model(x), atol=1e-5)


def test_capture_never_touches_the_given_network():
    model = Chain().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, example())
    assert model.training and model.a[2].inplace
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_two_nodes_are_apart_by_what_only_one_of_them_depends_on(name):
    graph = capture(NETS[name](), example()).graph.graph
    reach = ancestors(graph)
    for a in graph.nodes:
        for b in graph.nodes:
            assert apart(a, b) == (reach[a] - reach[b], reach[b] - reach[a])


def test_a_channel_shuffle_becomes_one_gather():
    graph = capture(Shuffle(), example()).graph
    gathers = [m for m in graph.modules() if isinstance(m, ChannelGather)]
    assert len(gathers) == 1 and gathers[0].indices.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_a_module_that_cannot_be_traced_is_a_leaf_with_its_reason_and_its_channels_stay():
    network = find_groups(capture(Partly(), example()))
    (leaf,) = network.topology.leaves
    assert leaf[0] == "odd" and "prune_nets.py" in leaf[1] and "control flow" in leaf[1]
    frozen = {group.name: group.frozen for group in network.topology.groups}
    assert "cannot be captured" in frozen["a.0"] and frozen["b.0"] is None


def test_a_network_that_cannot_be_captured_names_its_forward_and_the_line():
    with pytest.raises(DeployError) as caught:
        capture(Branching(), example())
    assert caught.value.message.startswith("the network cannot be captured: Branching.forward, ")
    assert "prune_nets.py:" in caught.value.message
    assert caught.value.hint == "move the part that depends on data into a module of its own: it then stays as it is."


def test_a_shape_that_the_network_refuses_is_named():
    with pytest.raises(DeployError) as caught:
        capture(Chain(), (torch.zeros(1, 4, 8, 8),))
    assert caught.value.message.startswith("the network refuses an input of shape [1, 4, 8, 8]: ")
    assert caught.value.hint == "mend model.input.shape in deploy.toml."


def test_an_operator_without_a_rule_freezes_what_flows_through_it_and_nothing_else():
    network = find_groups(capture(Odd(), example()))
    frozen = {group.name: group.frozen for group in network.topology.groups}
    assert frozen["a.0"] == "there is no rule for cumsum ('cumsum')"
    assert frozen["b.0"] is None and frozen["c.0"] is None


@pytest.mark.parametrize(
    ("also", "what"),
    [
        (lambda x: (x, x.shape[1]), r"output 1 is a number \(int\)"),
        (lambda x: {"map": x, "sizes": [1.5]}, r"output 'sizes', 0 is a number \(float\)"),
        (lambda x: [x, "name"], r"output 1 is of type str"),
    ],
)
def test_an_output_that_is_no_tensor_is_named_with_what_it_is(also, what):
    class Also(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> object:
            return also(self.a(x))

    with pytest.raises(DeployError, match=f"^the network cannot be captured: its {what}, and no tensor") as caught:
        capture(Also(), example())
    assert caught.value.hint == "leave it out of what forward returns, or make it a tensor there."


@fx.wrap
def reversed_along(scale: float, *, input: Tensor, axis: int) -> Tensor:
    """A function that asks torch.fx to stay out, with names of arguments that torch gives another meaning."""
    return scale * input.flip(axis)


def test_a_function_of_the_users_keeps_the_names_of_its_arguments():
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(reversed_along(2.0, axis=1, input=self.a(x)))

    model = Calls().eval()
    network = capture(model, example(), {"test_capture.reversed_along": unknown})
    (node,) = [n for n in network.graph.graph.nodes if n.target is reversed_along]
    assert node.args == (2.0,) and set(node.kwargs) == {"input", "axis"}
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(network.graph(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", ["code", "graph", "meta"])
def test_a_layer_that_has_a_name_of_torch_fx_is_named(name):
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 4, 1))
    with pytest.raises(DeployError, match=f"torch.fx keeps the name '{name}' for itself") as caught:
        capture(model, example())
    assert caught.value.hint == f"call Sequential.{name} otherwise."


def test_a_network_that_is_no_function_of_its_input_is_refused():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(1)

    with pytest.raises(DeployError, match=r"Noisy\.forward, it makes a tensor that is another one each time\."):
        capture(Noisy(), example())
