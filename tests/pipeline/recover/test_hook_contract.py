"""Every train hook keeps the contract of hooks/base.py."""

import copy

import pytest
import tiny_digits as digits
import torch

from pipeline.recover.hooks.base import TrainHook
from pipeline.recover.train import HOOKS
from profiles import plugins


@pytest.mark.parametrize("name", plugins.names(HOOKS))
def test_a_hook_gives_a_finite_scalar_with_a_gradient_and_leaves_the_network_as_it_was(name):
    hook = plugins.load(HOOKS, name).Hook()
    assert isinstance(hook, TrainHook)
    network, dense = digits.damaged(), digits.dense()
    before = copy.deepcopy(network.state_dict())
    hooks_before = [len(module._forward_hooks) for module in network.modules()]
    hook.start(network, dense)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    extra = hook.extra_loss(network, (images,), network(images), labels)
    assert extra.shape == ()
    assert torch.isfinite(extra)
    assert extra.requires_grad
    hook.stop()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [len(module._forward_hooks) for module in network.modules()] == hooks_before


def _value(hook: TrainHook, network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return hook.extra_loss(network, (images,), network(images), labels)


@pytest.mark.parametrize("name", plugins.names(HOOKS))
def test_the_gradient_of_a_hook_is_that_of_finite_differences(name):
    """Along random directions in the space of all weights, in float64, away from where the hook was started."""
    torch.manual_seed(0)
    network, dense, hook = digits.damaged(0.3).double(), digits.dense().double(), plugins.load(HOOKS, name).Hook()
    hook.start(network, dense)
    parameters = list(network.parameters())
    source = torch.Generator().manual_seed(1)

    def direction(size: float) -> list[torch.Tensor]:
        return [size * torch.randn(p.shape, generator=source, dtype=torch.float64) for p in parameters]

    def move(steps: list[torch.Tensor], times: float) -> None:
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step, alpha=times)

    move(direction(0.02), 1.0)
    images = torch.rand(12, 1, 8, 8, generator=source, dtype=torch.float64)
    labels = torch.arange(12) % 4
    slopes = torch.autograd.grad(_value(hook, network, images, labels), parameters, allow_unused=True)
    assert any(slope is not None and bool(slope.any()) for slope in slopes)
    for _ in range(3):
        steps, tiny = direction(1.0), 1e-6
        expected = sum(float((s * d).sum()) for s, d in zip(slopes, steps, strict=True) if s is not None)
        move(steps, tiny)
        above = float(_value(hook, network, images, labels).detach())
        move(steps, -2 * tiny)
        below = float(_value(hook, network, images, labels).detach())
        move(steps, tiny)
        assert (above - below) / (2 * tiny) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    hook.stop()


def test_the_l2_start_term_is_half_the_squared_distance():
    from pipeline.recover.hooks import l2_start

    network, hook = digits.dense(), l2_start.Hook()
    hook.start(network, network)
    assert hook.extra_loss(network, (), None, None) == 0
    with torch.no_grad():
        network[0].weight.add_(0.5)
        network[1].bias.add_(9.0)
    expected = 0.25 / 2 * network[0].weight.numel()
    assert float(hook.extra_loss(network, (), None, None).detach()) == pytest.approx(expected, rel=1e-5)
