"""Growing: wider groups and new Inception branches that leave what the network computes as it is.

widen   The inverse of a cut. A new unit is a copy of one that is there, in every tensor that it touches, producers with
        a little noise, norms and layer scales as they are. Every layer that reads it gets columns of zeros, so the
        network computes what it did; at the first step the new columns learn, from the second the new producers too.
        A copy lies behind its original wherever the original lies, so that pads, splits, shuffles, flattened features
        and the groups of grouped convolutions keep their order; the constants that count channels grow with it.
branch  A branch of the basic Inception module (Szegedy et al., CVPR 2015), 1x1 → 3x3 with norms and ReLUs, read by zero
        columns: joined to a concatenation of channels, or set beside a convolution.

Both give a graph that can be captured, grouped, pruned and exported again, and learns where the network does: what was
frozen stays so, and a branch is where all layers that read it are. What grows where the budget has slack is for
the caller to say (Grow-Push-Prune, Tian, Arbel, Clark, arXiv 2009.13716, grows by Inception modules).
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pipeline.nouns import ChannelGroup, Constant, ConstantValue, Cut, Units
from pipeline.prune import operators
from pipeline.prune.capture import Network, ancestors
from pipeline.prune.labels import Op
from pipeline.prune.layout import as_before
from pipeline.prune.neutral import describe
from pipeline.prune.proof import randomised
from pipeline.prune.surgery import carry_out
from profiles.errors import DeployError, UsageError

TOLERANCE = 1e-6
Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Growth:
    """Grown axes. params: name -> axis -> (the old position that each position repeats, whether it is a new one)."""

    params: Mapping[str, Mapping[int, tuple[Positions, Mask]]]
    constants: Mapping[str, tuple[str, int, ConstantValue]]
    columns: frozenset[tuple[str, int]]


def widen(network: Network, widths: Mapping[str, int], *, noise: float = 0.05, seed: int = 0) -> fx.GraphModule:
    """A copy of the network whose groups have these widths (units), which computes what the network computes.

    widths: group id -> new width, at least the old one. noise: on the producers of new units, as a share of the
    standard deviation of the tensor. seed: of the noise alone; which units are copied is drawn alike for every seed,
    since pads and gathers follow from it, and what is grown again takes its weights from a file and knows no seed.
    Refuses with a UsageError: an unknown group, a width below the present one; with a DeployError: a frozen group, one
    that is read by a norm over channels or by anything else that has no columns for a layer to keep at zero, and one
    whose growth is found to change the outputs.
    """
    topology = network.topology
    groups = {group.id: group for group in topology.groups}
    times = np.ones(topology.count + 1, dtype=np.int64)
    source = np.random.default_rng(0)
    for id, width in widths.items():
        if id not in groups:
            raise UsageError(f"the network has no group '{id}' that could grow to {width}.", "use an id of its groups.")
        _check_growable(network, groups[id], width)
        np.add.at(times, _picked(groups[id], width, source), 1)
    growth = _growth(network, times)
    _check_equal(network, growth, noise, f"growing {', '.join(groups[id].name for id in widths)}")
    return _grown(network.graph, growth, noise, seed)


def _growth(network: Network, times: Positions) -> _Growth:
    """times: how often each unit id is there when it is grown, the last entry for -1."""
    params = {}
    for name, axes in network.topology.params.items():
        laid = {axis: _layout(units, times) for axis, units in axes.items()}
        params[name] = {axis: (old, new) for axis, (old, new) in laid.items() if new.any()}
    constants = {c.node: (c.kind, c.axis, _value(c, times)) for c in network.topology.constants}
    columns = frozenset(found for reader in network.readers if (found := _columns(network, reader.op)) is not None)
    return _Growth(params, constants, columns)


@torch.no_grad()
def _grown(graph: fx.GraphModule, growth: _Growth, noise: float, seed: int) -> fx.GraphModule:
    """The graph grown: rows repeated and disturbed, columns for what is new at zero."""
    positions = {name: {axis: old for axis, (old, _) in axes.items()} for name, axes in growth.params.items()}
    grown = carry_out(graph, Cut(positions, growth.constants))
    random = torch.Generator().manual_seed(seed)
    for name, value in grown.named_parameters():
        for axis, (_, new) in growth.params.get(name, {}).items():
            where = torch.from_numpy(np.flatnonzero(new))
            if (name, axis) in growth.columns or value.dim() < 2:
                continue
            rows = value.index_select(axis, where)
            drawn = torch.randn(rows.shape, generator=random, dtype=rows.dtype)
            value.index_copy_(axis, where, rows + noise * value.std() * drawn)
    for name, axis in sorted(growth.columns):
        if axis in growth.params.get(name, {}):
            _, new = growth.params[name][axis]
            operator.attrgetter(name)(grown).index_fill_(axis, torch.from_numpy(np.flatnonzero(new)), 0.0)
    return grown


def _picked(group: ChannelGroup, width: int, source: np.random.Generator) -> list[int]:
    """The units that are copied, all of them once before any of them twice."""
    extra = width - group.size
    turns = [source.permutation(group.size) for _ in range(-(-extra // group.size))]
    return [group.units[i] for i in np.concatenate(turns)[:extra]] if turns else []


def _check_growable(network: Network, group: ChannelGroup, width: int) -> None:
    if width < group.size:
        raise UsageError(
            f"the group '{group.name}' has {group.size} units and cannot grow to {width}.", "a plan makes it narrower."
        )
    if group.frozen is not None:
        raise DeployError(f"the group '{group.name}' cannot grow, it is frozen: {group.frozen}.")
    kinds = {op.name: op.kind for op in describe(network)}
    for reader in network.readers:
        if np.isin(reader.ids, group.units).any() and _columns(network, reader.op) is None:
            kind = kinds[reader.op].replace("_", " ")
            raise DeployError(
                f"the group '{group.name}' cannot grow: '{reader.op}' ({kind}) mixes its channels without weights of "
                "their own, so that a new one would be felt at once."
            )


def _columns(network: Network, op: str) -> tuple[str, int] | None:
    """Weight and axis along which a layer reads its channels, None for what reads without columns of its own."""
    node = next(node for node in network.graph.graph.nodes if node.name == op)
    module = network.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
        return f"{node.target}.weight", 1
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return f"{node.target}.weight", 0
    return None


def _layout(units: Units, times: Positions) -> tuple[Positions, Mask]:
    """What lies along a grown axis: the old position that each position repeats, and whether it is a new one.

    A unit's positions that lie side by side (a flattened map, outputs of a depthwise channel) are copied as a whole.
    """
    edges = np.flatnonzero(np.diff(units) != 0) + 1
    runs = np.split(np.arange(len(units), dtype=np.int64), edges)
    old = [np.tile(run, times[units[run[0]]]) for run in runs if len(run)]
    new = [np.repeat(np.arange(times[units[run[0]]]) > 0, len(run)) for run in runs if len(run)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *old]), np.concatenate([np.zeros(0, dtype=bool), *new])


def _value(c: Constant, times: Positions) -> ConstantValue:
    """What a constant becomes: `plan.resolve` counts what stays, this what there is then."""

    def count(units: Units | None) -> int:
        return 0 if units is None else int(times[units].sum())

    if c.kind == "reshape":
        return tuple(size if units is None else count(units) for size, units in zip(c.sizes, c.units, strict=True))
    if c.kind == "gather":
        return _gathered(c, times)
    if c.kind in ("pad", "split", "slice"):
        counts = tuple(count(units) for units in c.units)
        return (counts[0], counts[0] + counts[1]) if c.kind == "slice" else counts
    raise DeployError(f"the constant '{c.node}' ({c.kind}) cannot grow.")


def _gathered(c: Constant, times: Positions) -> ConstantValue:
    """Indices of a gather: each copy is picked from where the same copy lies in the grown input."""
    (units,) = c.units
    assert units is not None
    old, _ = _layout(units, times)
    places = [np.flatnonzero(old == position) for position in range(len(units))]
    picked = np.asarray(c.indices, dtype=np.int64)
    out, _ = _layout(units[picked], times)
    turn = [int(np.count_nonzero(out[:i] == position)) for i, position in enumerate(out)]
    return tuple(int(places[picked[position]][t]) for position, t in zip(out, turn, strict=True))


@torch.no_grad()
def _check_equal(network: Network, growth: _Growth, noise: float, what: str) -> None:
    """On random weights and in float64, as groups are proved: the outputs are those of the network."""
    inputs = tuple(x.double() if x.is_floating_point() else x for x in network.example)
    graph = randomised(network.graph, 0)
    try:
        outputs = [net(*inputs) for net in (graph, _grown(graph, growth, noise, 0))]
    except (RuntimeError, ValueError) as error:
        raise DeployError(f"{what} fails: {str(error).splitlines()[0]}.", "grow other groups.") from error
    pairs = [outputs] if isinstance(outputs[0], Tensor) else zip(*outputs, strict=True)
    worst = max(float((a - b).abs().max() / (1 + a.abs().max())) for a, b in pairs)
    if not worst <= TOLERANCE:
        raise DeployError(f"{what} changes the outputs by {worst:.2g}.", "grow other groups.")


# --- branches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spot:
    """Where a branch goes. source: what it reads. join: the concatenation it joins, or the tensor it is set beside.

    reads: layer or norm that is met downstream, or the reshape before it -> entries of its axis for one new channel.
    """

    source: fx.Node
    join: fx.Node
    joined: bool
    stride: tuple[int, int]
    reads: Mapping[str, int]


def branchable(network: Network) -> tuple[str, ...]:
    """Names at which `branch` can set one: concatenations (nodes of the graph) and convolutions (modules)."""
    found = []
    for op in describe(network):
        node = next(n for n in network.graph.graph.nodes if n.name == op.name)
        name = str(node.target) if op.kind == "conv" else op.name
        if op.kind not in ("cat", "conv") or name in found:
            continue
        try:
            _spot(network, name)
        except DeployError:
            continue
        found.append(name)
    return tuple(found)


def branch(network: Network, where: str, channels: int, *, seed: int = 0) -> fx.GraphModule:
    """A copy of the network with an Inception branch of so many channels, which computes what the network computes.

    where: a concatenation along channels, named as in the graph ("cat_1"), whose parts come from one tensor; or a
    convolution, named as a module, beside which the branch then reads what the convolution reads. Refuses with a
    UsageError what is neither, and with a DeployError: maps of other than two spatial axes, sizes that no stride gives,
    and a place that leads to anything but layers through norms, activations, pooling and flattening (an addition, a
    norm over channels, a depthwise or grouped convolution, a split, a second concatenation, an output).
    """
    if channels < 1:
        raise UsageError(f"a branch of {channels} channels was asked for.", "ask for 1 at least.")
    spot = _spot(network, where)
    graph = copy.deepcopy(network.graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    source, join = nodes[spot.source.name], nodes[spot.join.name]
    name = f"{where.replace('.', '_')}_branch"
    while hasattr(graph, name):
        name += "_"
    layers = [graph.get_submodule(target) for target in spot.reads]
    learns = any(weight.requires_grad for layer in layers for weight in layer.parameters() if weight.dim() > 1)
    inception = _inception(network.shapes[source.name][1], channels, spot.stride, seed)
    graph.add_module(name, inception.eval().requires_grad_(learns))
    if spot.joined:
        with graph.graph.inserting_before(join):
            new = graph.graph.call_module(name, (source,))
        parts: Any = join.args[0]
        join.args = ([*parts, new], *join.args[1:])
    else:
        with graph.graph.inserting_after(join):
            new = graph.graph.call_module(name, (source,))
        with graph.graph.inserting_after(new):
            both = graph.graph.call_function(torch.cat, ([join, new], 1))
        join.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)
    for target, each in spot.reads.items():
        _extend(graph.get_submodule(target), channels * each)
    graph.graph.lint()
    return carry_out(graph, Cut({}, {}))


def _inception(inputs: int, channels: int, stride: tuple[int, int], seed: int) -> nn.Module:
    """1x1 → 3x3, each with a norm and a ReLU, from He's initialisation."""
    layers = [
        nn.Conv2d(inputs, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
    ]  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=random)
    return nn.Sequential(*layers)


def _spot(network: Network, where: str) -> _Spot:
    ops = {op.name: op for op in describe(network)}
    nodes = {node.name: node for node in network.graph.graph.nodes}
    node = nodes.get(where) or next((n for n in nodes.values() if n.op == "call_module" and n.target == where), None)
    if node is None or ops[node.name].kind not in ("cat", "conv"):
        raise UsageError(
            f"no branch can be set at '{where}', which is no concatenation and no convolution of the network.",
            f"use one of: {', '.join(branchable(network))}." if node is None else "name another place.",
        )
    if joined := ops[node.name].kind == "cat":
        if int(ops[node.name].attrs["axis"]) % len(network.shapes[node.name]) != 1:
            raise DeployError(f"no branch can be set at '{where}', which does not join channels.")
        join, source = node, _common(network, node)
    else:
        join, source = node, node.all_input_nodes[0]
        while len(join.users) == 1 and ops[(following := next(iter(join.users))).name].kind in ("batch_norm", "unary"):
            join = following
    reads: dict[str, int] = {}
    _follow(network, ops, join, 1, where, reads)
    return _Spot(source, join, joined, _stride(network, source, join, where), reads)


def _common(network: Network, cat: fx.Node) -> fx.Node:
    """The last feature map that all parts of a concatenation come from."""
    reach = ancestors(network.graph.graph)
    shared = frozenset.intersection(*(reach[part] for part in cat.all_input_nodes))
    nodes: list[fx.Node] = list(network.graph.graph.nodes)
    maps = [n for n in nodes if n in shared and n.op != "get_attr" and n.name in network.shapes]
    if not maps:
        raise DeployError(f"no branch can be set at '{cat.name}', whose parts come from no common tensor.")
    return maps[-1]


def _stride(network: Network, source: fx.Node, join: fx.Node, where: str) -> tuple[int, int]:
    given, wanted = network.shapes[source.name], network.shapes[join.name]
    if len(given) != 4 or len(wanted) != 4:
        shapes = " and ".join(str(len(shape) - 2) for shape in (given, wanted))
        raise DeployError(f"no branch can be set at '{where}': maps have {shapes} spatial axes, a branch needs 2.")
    found = []
    for size, goal in zip(given[2:], wanted[2:], strict=True):
        steps = [step for step in range(1, size + 1) if (size - 1) // step + 1 == goal]
        if not steps:
            raise DeployError(
                f"no branch can be set at '{where}': no stride leads from {size} positions ('{source.name}') to {goal}."
            )
        found.append(steps[0])
    return found[0], found[1]


def _follow(
    network: Network, ops: Mapping[str, Op], node: fx.Node, each: int, where: str, reads: dict[str, int]
) -> None:
    """Note all that has to grow when channels are appended to a node. each: entries of axis 1 for one channel."""
    for user in node.users:
        op, target = ops[user.name], str(user.target)
        layer = _columns(network, user.name) is not None and op.attrs.get("groups", 1) == 1
        if op.kind == "linear" and len(op.in_shapes[0]) != 2:
            layer = False
        shared = sum(n.op == "call_module" and n.target == target for n in network.graph.graph.nodes) > 1
        flat = op.kind == "reshape" and op.out_shape[1:] == (math.prod(op.in_shapes[0][1:]),)
        spatial = op.kind == "unary" or (op.kind in ("spatial", "reduce") and 1 not in _worked(op))
        if spatial:
            _follow(network, ops, user, each, where, reads)
        elif (layer or op.kind in ("batch_norm", "prelu") or flat) and not shared:
            more = each * math.prod(op.in_shapes[0][2:]) if flat else each
            reads[target] = more
            if not layer:
                _follow(network, ops, user, more, where, reads)
        else:
            kind = "a layer that is used twice" if layer else op.kind.replace("_", " ")
            raise DeployError(f"no branch can be set at '{where}': it leads to '{user.name}' ({kind}).", "try another.")


def _worked(op: Op) -> set[int]:
    """The axes that a spatial operator or a reduction works along."""
    return {int(axis) % len(op.in_shapes[0]) for axis in op.attrs.get("axes", ())}


_IDLE = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
"""What a batch norm has for a channel that it leaves alone."""


@torch.no_grad()
def _extend(module: nn.Module, more: int) -> None:
    """Append entries for new channels: columns of zeros, a norm that does nothing, a longer flattened axis."""
    if isinstance(module, operators.Reshape):
        module.sizes = (*module.sizes[:-1], module.sizes[-1] + more)
    elif isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            module.weight = _longer(module.weight, module.weight.mean().expand(more))
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name in _IDLE:
                idle = value.new_full((more,), _IDLE[name])
                parameter = isinstance(value, nn.Parameter)
                setattr(module, name, _longer(value, idle) if parameter else torch.cat([value, idle]))
    else:
        weight: Tensor = module.weight  # type: ignore[assignment]
        axis = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
        columns = weight.new_zeros([more if a == axis else size for a, size in enumerate(weight.shape)])
        module.weight = _longer(weight, columns, axis)


def _longer(value: Tensor, more: Tensor, axis: int = 0) -> nn.Parameter:
    """A parameter with more entries, frozen where it was."""
    return nn.Parameter(as_before(torch.cat([value, more], axis), value), value.requires_grad)
