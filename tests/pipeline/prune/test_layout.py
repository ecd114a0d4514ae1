"""Captured networks and what is cut from them compute with channels last, where nothing in them minds."""

from __future__ import annotations

import torch
from leaf_nets import Around
from prune_nets import example
from torch import Tensor, nn

from pipeline.nouns import KeepUnits, PruningPlan
from pipeline.prune.capture import Network, capture
from pipeline.prune.groups import find_groups
from pipeline.prune.layout import channels_first
from pipeline.prune.surgery import prune


class Views(nn.Module):
    """Decides by its data, so it stays whole, and folds its input by .view, which wants it as torch makes it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return x.view(len(x), -1).view(x.shape)


class Folds(nn.Module):
    """The same .view where it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, 1, 1), nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.linear(y.view(y.shape[0], -1))


def _last(module: nn.Module) -> list[bool]:
    """For each convolution with kernels of more than one place, whether its channels come last."""
    weights = [m.weight for m in module.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    return [w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights]


def _halved(network: Network) -> nn.Module:
    widths = {group.id: group.size // 2 for group in network.topology.offered}
    assert widths
    return prune(network, PruningPlan(tuple(KeepUnits(name, tuple(range(kept))) for name, kept in widths.items())))


def test_networks_are_captured_and_cut_with_channels_last() -> None:
    network = find_groups(capture(Around(nn.Identity()).eval(), example()))
    cut = _halved(network)
    assert _last(network.graph) == [True] * 3
    assert _last(cut) == [True] * 3
    assert [m.weight.shape[0] for m in cut.modules() if isinstance(m, nn.Conv2d)] == [4, 6, 5]


def test_the_given_network_stays_as_it_lies() -> None:
    model = Around(nn.Identity()).eval()
    capture(model, example())
    assert _last(model) == [False] * 3


def test_outputs_are_those_of_the_other_layout() -> None:
    cut = _halved(find_groups(capture(Folds().eval(), example())))
    assert _last(cut) == [True]
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        last = cut(images)
        channels_first(cut)
        assert _last(cut) == [False]
        torch.testing.assert_close(cut(images), last)


def test_code_that_wants_plain_tensors_gets_them() -> None:
    model = Around(Views()).eval()
    network = capture(model, example())
    assert list(network.leaves) == ["middle"]
    assert _last(network.graph) == [False] * 3
    with torch.no_grad():
        torch.testing.assert_close(network.graph(*example()), model(*example()))


def test_weights_that_two_layers_share_stay_shared() -> None:
    model = Around(nn.Conv2d(8, 8, 3, 1, 1)).eval()
    extra = nn.Conv2d(8, 8, 3, 1, 1)
    assert isinstance(model.middle, nn.Conv2d)
    extra.weight = model.middle.weight
    model.middle = nn.Sequential(model.middle, extra)
    graph = capture(model, example()).graph
    assert graph.get_submodule("middle.0").weight is graph.get_submodule("middle.1").weight
    assert _last(graph) == [True] * 5
