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


def test_the_l2_start_term_is_half_the_squared_distance_times_its_strength():
    from pipeline.recover.hooks import l2_start

    network, hook = digits.dense(), l2_start.Hook()
    hook.start(network, network)
    assert hook.extra_loss(network, (), None, None) == 0
    with torch.no_grad():
        network[0].weight.add_(0.5)
        network[1].bias.add_(9.0)
    expected = l2_start.STRENGTH / 2 * 0.25 * network[0].weight.numel()
    assert float(hook.extra_loss(network, (), None, None).detach()) == pytest.approx(expected, rel=1e-5)
