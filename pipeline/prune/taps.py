"""What a layer of the pruned network should give: the dense network's value where the layer's output lands.

A layer's output y = X W + b lands, after its batch norm and a residual addition, at

    t = s ∘ (X W + b) + h + other          s = γ / σ, h = β − γ μ / σ, other = the second operand of the addition

and `tap` is the node of t. The wanted t is the dense network's value there, or, where blocks behind it were removed,
the dense value behind the removed run: the layer before a removed run is aimed at what the run gave.
Values are kept at a few positions of each sample, the same for all tensors of one spatial size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pipeline.nouns import Block
from pipeline.prune import operators
from pipeline.prune.capture import Network

ROWS = 16384
RELUS = {F.relu, torch.relu}


@dataclass(frozen=True)
class Tap:
    """Where the output of a layer lands.

    node: last node of the chain. norm: its batch norm, along the layer's own channels. other: the addition's second
    operand. relu: everything that reads `node` is a ReLU.
    """

    layer: str
    node: str
    norm: str | None
    other: str | None
    relu: bool


def is_layer(graph: fx.GraphModule, node: fx.Node) -> bool:
    """What least squares can refit: a convolution in one or two dimensions with zero padding, or a linear layer."""
    if node.op != "call_module":
        return False
    module = graph.get_submodule(str(node.target))
    plain = isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros"
    return plain or isinstance(module, nn.Linear)


def is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    """A ReLU in any of its spellings."""
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), nn.ReLU)
    return node.target in RELUS or (node.op == "call_method" and node.target == "relu")


def find_tap(network: Network, graph: fx.GraphModule, layer: fx.Node, done: set[str]) -> Tap:
    """The tap of a layer when the nodes in `done` have been computed. graph: the network's, or what a cut left of it.

    A batch norm lies along axis 1, and what a linear layer gives has its channels last: behind (samples, …, channels)
    the norm is of something else, and the layer lands before it.
    """
    node, norm, other = layer, None, None
    linear = isinstance(graph.get_submodule(str(layer.target)), nn.Linear)
    along = not linear or len(network.shapes[layer.name]) == 2
    following = _only_user(node)
    if following is not None and following.op == "call_module" and along:
        module = graph.get_submodule(str(following.target))
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            node, norm = following, str(following.target)
            following = _only_user(node)
    if following is not None and _is_addition(graph, following):
        second = next((a for a in following.args if a is not node), None)
        if isinstance(second, fx.Node) and second.name in done:
            node, other = following, second.name
    relu = bool(node.users) and all(is_relu(graph, user) for user in node.users)
    return Tap(layer.name, node.name, norm, other, relu)


def _is_addition(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), operators.ResidualAdd)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def aims(network: Network, dropped: Sequence[Block]) -> dict[str, str]:
    """Dense node that stands in for another one, for the additions before removed runs: {add before: last removed add}.

    Only additions are aimed: a stem that has to imitate removed blocks alone does no better than one that is left
    (ResNet-20/GTSRB with the first stage removed: 89.9 % aimed, 90.2 % left; with additions aimed 96.2 % instead of
    95.1 %).
    """
    nodes = {node.name: node for node in network.graph.graph.nodes}
    by_target = {str(node.target): node for node in network.graph.graph.nodes if node.op == "call_module"}
    adds = {
        node.name
        for target, node in by_target.items()
        if isinstance(network.graph.get_submodule(target), operators.ResidualAdd)
    }
    aim: dict[str, str] = {}
    for block in dropped:
        add = by_target[block.add]
        skip = add.args[block.skip]
        if not isinstance(skip, fx.Node):
            continue
        inside = {nodes[name] for name in block.nodes}
        if any(user is not add and user not in inside for user in skip.users):
            continue
        source = skip
        if is_relu(network.graph, skip) and isinstance(skip.args[0], fx.Node) and len(skip.args[0].users) == 1:
            source = skip.args[0]
        start = next((before for before, after in aim.items() if after == source.name), source.name)
        if start in adds:
            aim[start] = add.name
    return aim


def positions(shape: Sequence[int], samples: int, limit: int = ROWS) -> tuple[Tensor, Tensor]:
    """Indices (sample, flat position) of the rows kept of a tensor (samples, C, spatial…): at most about `limit`."""
    return _positions(math.prod(shape[2:]), samples, limit)


@lru_cache(maxsize=32)
def _positions(space: int, samples: int, limit: int) -> tuple[Tensor, Tensor]:
    each = max(1, min(space, -(-limit // samples)))
    source = torch.Generator().manual_seed(space)
    if each == space:
        picked = torch.arange(space).repeat(samples)
    else:
        picked = torch.rand(samples, space, generator=source).argsort(1)[:, :each].reshape(-1)
    return torch.arange(samples).repeat_interleave(each), picked


def rows(x: Tensor, limit: int = ROWS, *, last: bool = False) -> Tensor:
    """Values at the kept positions, (rows, C): of (samples, C, spatial…), or of (samples, …, C) where `last`."""
    if x.dim() == 2:
        return x
    moved = x.movedim(-1, 1) if last else x
    sample, place = positions(moved.shape, len(x), limit)
    return moved.flatten(2)[sample, :, place]


def patches(layer: nn.Module, x: Tensor, limit: int) -> Tensor:
    """What each kept output position reads, shape (rows, groups, inputs per group)."""
    if isinstance(layer, nn.Linear):
        return rows(x, limit, last=True).unsqueeze(1)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    flat = isinstance(layer, nn.Conv1d)
    kernel, stride, dilation = (_pair(v, flat) for v in (layer.kernel_size, layer.stride, layer.dilation))
    padded = F.pad(x, layer._reversed_padding_repeated_twice)
    padded = padded.unsqueeze(2) if flat else padded
    n, c, h, w = padded.shape
    out_h = (h - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_w = (w - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    sample, place = positions((n, c, out_h * out_w), n, limit)
    sn, sc, sh, sw = padded.stride()
    windows = padded.as_strided(
        (n, c, out_h, out_w, *kernel), (sn, sc, sh * stride[0], sw * stride[1], sh * dilation[0], sw * dilation[1])
    )
    taken = windows[sample, :, place // out_w, place % out_w]
    return taken.reshape(taken.shape[0], layer.groups, -1)


def _pair(value: Any, flat: bool) -> tuple[int, int]:
    return (1, int(value[0])) if flat else (int(value[0]), int(value[1]))


def set_bias(layer: nn.Module, norm: nn.Module | None, bias: Tensor, before: Tensor) -> None:
    """Give a layer a bias, or the batch norm behind it a mean, that moves its output from `before` to `bias`."""
    own = cast("nn.Parameter | None", layer.bias)
    running = getattr(norm, "running_mean", None)
    if own is not None:
        own.data.copy_(bias)
    elif running is not None:
        running.sub_(bias - before)
    else:
        layer.bias = nn.Parameter(bias.clone(), any(p.requires_grad for p in layer.parameters()))


class DenseTaps:
    """Dense values at the kept positions, by node name, computed in one pass over the samples and kept.

    fitted: how many of the samples, the first ones, give rows that layers are refitted on; left out, all.
    """

    def __init__(
        self, network: Network, inputs: tuple[Tensor, ...], limit: int = ROWS, fitted: int | None = None
    ) -> None:
        self.inputs, self.limit, self.samples = inputs, limit, network.samples
        self.count = len(inputs[0])
        self.fitted = self.count if fitted is None else fitted
        run = _Sampling(network.graph, _wanted(network), self.rows)
        with torch.no_grad():
            run.run(*inputs)
        self._values = run.taken

    def value(self, node: str) -> Tensor:
        """Dense value of a node at the kept positions, shape (rows, channels). Raises KeyError."""
        return self._values[node]

    def __contains__(self, node: str) -> bool:
        return node in self._values

    def part(self, node: str, x: Tensor) -> Tensor:
        """What belongs to the fitted samples, of a node's value, with the samples (or samples and windows) first."""
        first = x.movedim(self.samples.get(node, 0), 0)
        return first[: len(first) * self.fitted // self.count]

    def rows(self, node: str, x: Tensor, last: bool = False) -> Tensor:
        """Values of the fitted samples at the kept positions of a node's value, (rows, C)."""
        return rows(self.part(node, x), self.limit, last=last)


def _wanted(network: Network) -> dict[str, bool]:
    """Taps of layers, and additions, at which removed blocks may be aimed: node -> channels are the last axis."""
    graph = network.graph
    names: dict[str, bool] = {}
    done = {node.name for node in graph.graph.nodes}
    for node in graph.graph.nodes:
        if is_layer(graph, node):
            last = isinstance(graph.get_submodule(str(node.target)), nn.Linear)
            tap = find_tap(network, graph, node, done)
            names |= {tap.node: last, (node.name if tap.norm is None else _norm_node(graph, tap.norm)): last}
        elif _is_addition(graph, node):
            names.setdefault(node.name, False)
    return names


def _norm_node(graph: fx.GraphModule, target: str) -> str:
    nodes = graph.graph.nodes
    name: str = next(node.name for node in nodes if node.op == "call_module" and node.target == target)
    return name


class _Sampling(fx.Interpreter):
    def __init__(
        self, graph: fx.GraphModule, wanted: dict[str, bool], rows: Callable[[str, Tensor, bool], Tensor]
    ) -> None:
        super().__init__(graph)
        self.wanted, self.rows = wanted, rows
        self.taken: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, Tensor) and value.dim() >= 2:
            self.taken[n.name] = self.rows(n.name, value, self.wanted[n.name])
        return value
