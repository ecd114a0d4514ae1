"""The CCM hook: what it finds, what it computes, where its gradient points."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pipeline.recover.hooks import ccm
from profiles.errors import UsageError


class Net(nn.Module):
    """Two ReLUs over maps and one over features, spelled as asked."""

    def __init__(self, spelling: str = "module") -> None:
        super().__init__()
        self.spelling = spelling
        self.a, self.b = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.act = nn.ReLU6() if spelling == "relu6" else nn.ReLU(inplace=True)

    def relu(self, x: Tensor) -> Tensor:
        if self.spelling in ("module", "relu6"):
            return self.act(x)
        if self.spelling == "function":
            return F.relu(x, inplace=True)
        return torch.relu(x) if self.spelling == "torch" else x.relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        x = self.relu(self.b(x))
        return self.out(self.relu(self.hidden(x.mean((2, 3)))))


SPELLINGS = ("module", "relu6", "function", "torch", "method")


def net(spelling: str = "module") -> Net:
    torch.manual_seed(0)
    return Net(spelling).double()


def images() -> Tensor:
    return torch.randn(6, 2, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.double)


def extra(network: nn.Module, x: Tensor) -> Tensor:
    hook = ccm.Hook()
    hook.start(network, network)
    loss = hook.extra_loss(network, (x,), network(x), None)
    hook.stop()
    return loss


def expected(network: Net, x: Tensor) -> float:
    with torch.no_grad():
        first = network.a(x).relu()
        second = network.b(first).relu()
    tables = [np.corrcoef(maps.mean(0).flatten(1).numpy()) for maps in (first, second)]
    return -sum(float(np.abs(table).mean()) for table in tables)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_relu_over_maps_counts_once(spelling):
    network = net(spelling)
    assert float(extra(network, images()).detach()) == pytest.approx(expected(network, images()), rel=1e-4)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_captured_graph_gives_the_same_as_the_network(spelling):
    network = net(spelling)
    graph = fx.symbolic_trace(network)
    assert float(extra(graph, images()).detach()) == pytest.approx(expected(network, images()), rel=1e-4)


def test_the_gradient_agrees_with_finite_differences():
    network, x = net("function"), images()
    extra(network, x).backward()
    step, checked = 1e-6, 0
    for parameter in (network.a.weight, network.a.bias, network.b.weight, network.b.bias):
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 7)):
            start = float(flat[i])
            values = []
            for side in (step, -step):
                flat[i] = start + side
                values.append(float(extra(network, x).detach()))
            flat[i] = start
            assert float(gradient[i]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-9)
            checked += abs(float(gradient[i])) > 1e-6
    assert checked > 10
    assert network.out.weight.grad is None


def test_descending_the_term_makes_channels_more_alike():
    network, x = net(), images()
    trained = [*network.a.parameters(), *network.b.parameters()]
    first = float(extra(network, x).detach())
    for _ in range(30):
        steps = torch.autograd.grad(extra(network, x), trained)
        with torch.no_grad():
            for parameter, step in zip(trained, steps, strict=True):
                parameter -= step
    assert float(extra(network, x).detach()) < 1.2 * first < 0


def test_copies_of_a_channel_are_worth_most_and_silent_channels_nothing():
    row = torch.randn(1, 5, 5, dtype=torch.double)
    assert float(ccm.correlation(torch.cat([row, 2 * row + 1, -row]))) == pytest.approx(1.0, abs=1e-6)
    still = torch.full((1, 5, 5), 0.3, dtype=torch.double)
    assert float(ccm.correlation(torch.cat([row, still, 0 * still]))) == pytest.approx(1 / 9, abs=1e-6)
    assert float(ccm.correlation(torch.full((2, 8, 8), 0.1))) == pytest.approx(0.0, abs=1e-4)


def test_a_copy_of_a_watched_network_is_watched_too():
    """A recovery times a few steps on a copy of the network that it trains."""
    network, hook, x = net(), ccm.Hook(), images()
    hook.start(network, network)
    other = copy.deepcopy(network)
    value = hook.extra_loss(other, (x,), other(x), None)
    assert float(value.detach()) == pytest.approx(expected(network, x), rel=1e-4)
    hook.stop()


def test_only_the_last_forward_with_gradients_counts():
    network, hook, x = net(), ccm.Hook(), images()
    hook.start(network, network)
    network(x)
    outputs = network(x)
    value = hook.extra_loss(network, (x,), outputs, None)
    assert float(value.detach()) == pytest.approx(expected(network, x), rel=1e-4)
    with torch.inference_mode():
        network(x)
    with pytest.raises(UsageError):
        hook.extra_loss(network, (x,), outputs, None)
    hook.stop()


def test_a_forward_that_fails_leaves_nothing_behind():
    network, hook = net(), ccm.Hook()
    hook.start(network, network)
    with pytest.raises(RuntimeError):
        network(torch.randn(2, 3, 7, 7, dtype=torch.double))
    F.relu(torch.randn(2, 4, 5, 5, requires_grad=True))
    with pytest.raises(UsageError):
        hook.extra_loss(network, (), None, None)
    hook.stop()


def test_a_network_without_relu_maps_is_told_so():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Hardtanh(), nn.Flatten(), nn.Linear(100, 3), nn.ReLU())
    with pytest.raises(UsageError) as told:
        extra(network, torch.randn(2, 2, 7, 7))
    assert told.value.message == "the hook 'ccm' found no map behind a ReLU in this network."
    assert told.value.hint == "take it out of recover.hooks."
