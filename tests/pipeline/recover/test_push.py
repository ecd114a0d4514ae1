"""The push: separation up, covariances down, discriminants in few neurons, at the last hidden layer."""

import pytest
import tiny_digits as digits
import torch
from torch import nn
from torch.fx import symbolic_trace

from pipeline.prune.capture import capture
from pipeline.prune.criteria.lda_deconv import _last_layer
from pipeline.prune.groups import find_groups
from pipeline.recover.hooks.push import ALIGN, DECORRELATE, FLOOR, SEPARATE, Hook, push
from profiles.errors import UsageError


def _features(count: int = 60, size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 3
    means = torch.randn(3, size, generator=source, dtype=torch.float64)
    mix = torch.eye(size, dtype=torch.float64) + 0.3
    return means[targets] + torch.randn(count, size, generator=source, dtype=torch.float64) @ mix, targets


def test_the_push_is_what_its_formula_says():
    features, targets = _features()
    within = sum(
        (centred := features[targets == k] - features[targets == k].mean(0)).T @ centred for k in range(3)
    ) / len(features)
    means = torch.stack([features[targets == k].mean(0) for k in range(3)])
    between = (means - features.mean(0)).square().mean(0)
    worth = between / (within.diagonal() + FLOOR * (within.diagonal() + between).mean())
    share = worth / worth.sum()
    crossed = (within - within.diagonal().diag()).abs().sum() / (6 * within.trace())
    entropy = -(share * share.log()).sum() / torch.tensor(6.0).log()
    expected = DECORRELATE * crossed + ALIGN * entropy - SEPARATE * (1 + worth).log().mean()
    assert float(push(features, targets)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_larger_features_push_no_more(factor):
    features, targets = _features()
    assert float(push(factor * features, targets)) == pytest.approx(float(push(features, targets)), rel=1e-4)


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(8, dtype=torch.int64), torch.arange(8), torch.tensor([0, 0, 0, 0, 0, 0, 0, 7])],
    ids=["one class", "one sample a class", "a class with one sample"],
)
@pytest.mark.parametrize("kind", ["drawn", "zero", "one neuron", "equal samples"])
def test_a_poor_batch_stays_finite_and_so_does_its_gradient(targets, kind):
    features = {
        "drawn": torch.randn(8, 5, generator=torch.Generator().manual_seed(0)),
        "zero": torch.zeros(8, 5),
        "one neuron": torch.randn(8, 1, generator=torch.Generator().manual_seed(0)),
        "equal samples": torch.ones(8, 5),
    }[kind].requires_grad_()
    loss = push(features, targets)
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def _figures(features: torch.Tensor, targets: torch.Tensor) -> tuple[float, float, float]:
    """Separation, off-diagonal share of the within-class covariance, neurons that the discriminants are spread over."""
    means = torch.stack([features[targets == k].mean(0) for k in range(10)])
    centred = features - means[targets]
    covariance = centred.T @ centred / len(features)
    worth = (means - features.mean(0)).square().mean(0) / covariance.diagonal().clamp_min(1e-6)
    share = worth / worth.sum()
    crossed = covariance.abs().sum() / covariance.trace() - 1
    spread = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    return float(worth.log1p().mean()), float(crossed), float(spread)


def _trained(pushed: bool) -> tuple[float, tuple[float, float, float]]:
    torch.manual_seed(0)
    network, hook = digits.dense().train(), Hook()
    hook.start(network, network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        for (images,), labels in digits.train(epoch, 0):
            loss = digits.loss(outputs := network(images), labels)
            if pushed:
                loss = loss + hook.extra_loss(network, (images,), outputs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    hook.stop()
    network.eval()
    images, labels = (torch.cat(parts) for parts in zip(*((i, t) for (i,), t in digits.train(0, 1)), strict=True))
    with torch.no_grad():
        return digits.accuracy(network), _figures(network[:-1](images), labels)


def test_training_with_the_push_does_all_three_and_keeps_the_accuracy():
    plain, (separation, crossed, spread) = _trained(pushed=False)
    pushed, (more, less, fewer) = _trained(pushed=True)
    assert more > separation and less < 0.9 * crossed and fewer < 0.9 * spread
    assert pushed > plain - 0.01


def test_a_captured_graph_and_a_plain_module_are_pushed_alike():
    network = digits.dense()
    images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 4
    found = []
    for net in (network, symbolic_trace(network)):
        hook = Hook()
        hook.start(net, network)
        found.append(hook.extra_loss(net, (images,), net(images), labels))
        assert any(module._forward_pre_hooks for module in net.modules())
        hook.stop()
        assert not any(module._forward_pre_hooks for module in net.modules())
    assert torch.equal(*found) and found[0].requires_grad


class Twice(nn.Module):
    """The layer that is defined first runs last; the features have positions."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(6, 3), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(x))).mean(1)


def test_the_layer_that_runs_last_is_the_last_and_positions_are_averaged():
    torch.manual_seed(0)
    network, hook, x, labels = Twice(), Hook(), torch.randn(9, 5, 4), torch.arange(9) % 3
    hook.start(network, network)
    got = hook.extra_loss(network, (x,), network(x), labels)
    hook.stop()
    assert torch.equal(got, push(torch.relu(network.body(x)).mean(1), labels))


def test_what_runs_without_gradients_between_two_steps_is_not_pushed():
    network, hook, labels = digits.dense(), Hook(), torch.arange(12) % 4
    images = torch.rand(12, 1, 8, 8)
    hook.start(network, network)
    outputs = network(images)
    with torch.no_grad():
        network(torch.rand(3, 1, 8, 8))
    assert hook.extra_loss(network, (images,), outputs, labels).requires_grad
    hook.stop()


class SqueezeExcite(nn.Module):
    """A convolution decides; the linear layers only weigh channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.weigh = nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8), nn.Sigmoid())

    def weighed(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.body(x))
        return maps * self.weigh(maps.mean((2, 3)))[:, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.weighed(x)).mean((2, 3))


def test_a_convolutional_head_is_the_last_layer_and_the_criterion_starts_there_too():
    torch.manual_seed(0)
    model, hook, x, labels = SqueezeExcite(), Hook(), torch.randn(12, 3, 8, 8), torch.arange(12) % 4
    network = find_groups(capture(model.eval(), (x,)))
    hook.start(network.graph, model)
    got = hook.extra_loss(network.graph, (x,), network.graph(x), labels)
    hook.stop()
    assert torch.allclose(got, push(model.weighed(x).mean((2, 3)), labels))
    assert network.graph.get_submodule("head") is network.graph.get_submodule(_last_layer(network).op)


def test_a_network_without_a_last_layer_is_refused():
    with pytest.raises(UsageError, match=r"^the hook 'push' needs a last layer to read the last hidden layer from,"):
        Hook().start(nn.ReLU(), nn.Identity())


@pytest.mark.parametrize(("targets", "said"), [(torch.rand(12, 10), r"\(12, 10\)"), (None, "NoneType")])
def test_targets_that_are_no_classes_are_refused(targets, said):
    network, hook = digits.dense(), Hook()
    hook.start(network, network)
    images = torch.rand(12, 1, 8, 8)
    with pytest.raises(UsageError, match=f"needs one class a sample, 12 whole numbers; data.train gives {said}"):
        hook.extra_loss(network, (images,), network(images), targets)
    hook.stop()
