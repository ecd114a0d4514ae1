"""Groups are proved, not believed: the dense net with units masked at every reader must equal the net physically cut.

The proof runs in float64 on a copy with random weights, norms, biases and layer scales (on trained or zero-initialised
weights it can be vacuous), half of the units of every group removed. The weights are levelled, so that however deep the
net is, its outputs react to every layer. All groups are proved together; where that fails they are bisected, and what
fails alone is refuted with its reason. The outputs must react to every group by more than two nets are told apart by,
seen from the gradient of its gates, and the cut net must survive a training step.
"""

from __future__ import annotations

import copy
import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pipeline.nouns import Block, ChannelGroup, DropBlock, KeepUnits, PruningPlan, Topology
from pipeline.outputs import tensors
from pipeline.prune.capture import Network
from pipeline.prune.execute import MaskedRun, TouchedRun
from pipeline.prune.labels import Reader
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.surgery import carry_out
from profiles.errors import DeployError

TOLERANCE = 1e-8
LARGEST = 1e-5
HEARD = 100 * TOLERANCE
"""Least reaction of the outputs to a group that is proved, relative to 1 + the largest output."""
SILENT = "the outputs do not react to it"
DRAWS = 3
"""Random networks that are drawn until all groups are heard: a unit can be dead in one of them."""
MIXING = dict.fromkeys((F.linear, torch.matmul, torch.bmm, operator.matmul, torch.einsum), -1) | dict.fromkeys(
    (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1
)
"""Functions whose outputs grow with a weight that they are given -> axis of the channels."""
FAILS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError, DeployError)
"""What a forward of the user's raises when its module was cut in a way that it does not bear."""
Item = ChannelGroup | Block


def randomised(graph: fx.GraphModule, seed: int, gain: float = 1.0) -> fx.GraphModule:
    """A float64 copy with random parameters: weights of this gain, scales in 0.5 … 1.5, biases and means about 0.3."""
    copied = copy.deepcopy(graph).double().eval()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*copied.named_parameters(), *copied.named_buffers()]:
            if not value.is_floating_point():
                continue
            if value.dim() > 1:
                fan_in = max(1, value[0].numel())
                spread = gain * (2.0 / fan_in) ** 0.5
                value.copy_(torch.randn(value.shape, generator=source, dtype=torch.float64) * spread)
            elif name.endswith(("weight", "running_var")) or "." not in name:
                value.copy_(torch.rand(value.shape, generator=source, dtype=torch.float64) + 0.5)
            else:
                value.copy_(torch.randn(value.shape, generator=source, dtype=torch.float64) * 0.3)
    return copied


@torch.no_grad()
def levelled(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The graph, its weights scaled and its biases and means moved, so that every layer varies by about one.

    Each channel varies over the samples and positions of these inputs, about its random bias (data-dependent
    initialisation, Krähenbühl et al. 2016; Mishkin and Matas 2016). Without it the values of a deep random network grow
    beyond what float64 tells apart, gates and softmaxes saturate, and tokens become alike, which attention does not
    react to (Dong et al. 2021, rank collapse). A weight that several layers share is scaled at the first of them.
    """
    _Levelling(graph).run(*inputs)
    return graph


class _Levelling(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.waiting = {id(value) for value in graph.parameters() if value.dim() > 1}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module, call = self.fetch_attr(target), super().call_module
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            _standardise(module, args[0])
        axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        return self._levelled(lambda: call(target, args, kwargs), weight, bias, axis)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        call, axis = super().call_function, MIXING.get(target)
        if axis is None:
            return call(target, args, kwargs)
        weight = next((x for x in args if id(x) in self.waiting), None)
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None)
        return self._levelled(lambda: call(target, args, kwargs), weight, bias, axis)

    def _levelled(self, call: Callable[[], Any], weight: Any, bias: Any, axis: int) -> Any:
        out = call()
        if id(weight) not in self.waiting or not isinstance(out, Tensor):
            return out
        self.waiting.discard(id(weight))
        _, spread = _moments(out, axis)
        if not 0 < spread < math.inf:
            return out
        weight /= spread
        if isinstance(bias, nn.Parameter) and bias.dim() == 1:
            mean, _ = _moments(call(), axis)
            bias.sub_(mean - bias)
        return call()


def _moments(x: Tensor, axis: int) -> tuple[Tensor, float]:
    """Mean of every channel, and how far all are from theirs."""
    channels = x.movedim(axis, 0).flatten(1)
    mean = channels.mean(1)
    return mean, float((channels - mean[:, None]).square().mean().sqrt())


def _standardise(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> None:
    """Statistics about those of the input, where they were about 0 and 1."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, spread = _moments(x, 1)
    if 0 < spread < math.inf:
        norm.running_mean.mul_(spread).add_(mean)
        norm.running_var.mul_(spread**2)


def _half(group: ChannelGroup, seed: int) -> KeepUnits:
    digest = int(hashlib.sha256(f"{seed}:{group.id}".encode()).hexdigest()[:8], 16)
    kept = np.random.default_rng(digest).permutation(group.size)[: max(1, group.size // 2)]
    return KeepUnits(group.id, tuple(sorted(int(i) for i in kept)))


class _Proof:
    def __init__(self, network: Network, seed: int) -> None:
        self.topology = network.topology
        self.readers = network.readers
        self.seed = seed
        source = torch.Generator().manual_seed(seed)
        self.inputs = tuple(_random_like(x, source) for x in network.example)
        self.graph = levelled(randomised(network.graph, seed), self.inputs)
        self.reasons: dict[str, str] = {}

    def difference(self, items: Sequence[Item], *, train: bool) -> str | None:
        """Why masking and cutting these together is not the same, or None."""
        edits = [_half(i, self.seed) if isinstance(i, ChannelGroup) else DropBlock(i.id) for i in items]
        plan = PruningPlan(tuple(edits))
        try:
            cut = resolve(self.topology, plan)
            pruned = carry_out(self.graph, cut, share=True)
            keep = torch.from_numpy(kept_units(self.topology, plan))
            skip = {block.add: block.skip for block in cut.dropped}
            with torch.no_grad():
                masked = _flat(MaskedRun(self.graph, self.readers, keep, skip).run(*self.inputs))
                got = _flat(pruned(*self.inputs))
            if masked.shape != got.shape:
                return f"cutting it gives an output of {tuple(got.shape)} instead of {tuple(masked.shape)}"
            worst = _apart(masked, got)
            if not worst <= TOLERANCE and not worst <= self._rounding(masked, keep, skip):
                return f"masking and cutting it differ by {worst:.2g}"
            return _train_step(pruned, self.inputs) if train else None
        except FAILS as error:
            return _failure("cutting", error)

    def _rounding(self, masked: Tensor, keep: Tensor, skip: dict[str, int]) -> float:
        """What rounding may make where the random network is chaotic: inputs moved by 1e-15 move its outputs too."""
        moved = tuple(x * (1 + 1e-15) if x.is_floating_point() else x for x in self.inputs)
        with torch.no_grad():
            again = _flat(MaskedRun(self.graph, self.readers, keep, skip).run(*moved))
        return min(LARGEST, 100 * _apart(masked, again))

    def accept(self, items: Sequence[Item], *, train: bool, beside: Sequence[Item] = ()) -> list[Item]:
        """The items that can be cut together, found by bisection; the others get a reason.

        beside: items that pass together, and are cut with every one of these.
        """
        if not items:
            return []
        reason = self.difference([*beside, *items], train=train)
        if reason is None:
            return list(items)
        if len(items) == 1:
            self.reasons[items[0].id] = reason
            return []
        middle = len(items) // 2
        good = self.accept(items[:middle], train=train, beside=beside)
        return good + self.accept(items[middle:], train=train, beside=[*beside, *good])


def _failure(what: str, error: Exception) -> str:
    return f"{what} it fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _random_like(x: Tensor, source: torch.Generator) -> Tensor:
    if not x.is_floating_point():
        return torch.cat([x, x]) if x.shape[0] == 1 else x
    return torch.randn((max(2, x.shape[0]), *x.shape[1:]), generator=source, dtype=torch.float64)


def _flat(outputs: object) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors(outputs) if t.is_floating_point()])


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / (1 + a.abs().max()))


def _train_step(pruned: nn.Module, inputs: tuple[Tensor, ...]) -> str | None:
    named = [(name, value) for name, value in pruned.named_parameters() if value.is_floating_point()]
    if not named:
        return None
    for _, value in named:
        value.requires_grad_(True)  # those of the user's that are frozen too
    loss = _flat(pruned.train()(*inputs)).square().mean()
    gradients = torch.autograd.grad(loss, [value for _, value in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return f"a training step gives a gradient of '{name}' that is not finite"
    return None


class _Gated(TouchedRun):
    """Runs a graph with a gate on every unit where it is read, and one on what every block adds."""

    def __init__(
        self, graph: fx.GraphModule, readers: tuple[Reader, ...], gates: Tensor, blocks: Sequence[Block], each: Tensor
    ) -> None:
        super().__init__(graph, readers, self._gate)
        self.gates, self.each = gates, each
        self.blocks = {block.add: (index, 1 - block.skip) for index, block in enumerate(blocks)}

    def _gate(self, reader: Reader, x: Tensor) -> Tensor:
        view = [1] * x.dim()
        view[reader.axis] = -1
        return x * self.gates[torch.from_numpy(reader.ids).long()].reshape(view)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.blocks:
            index, branch = self.blocks[target]
            args = tuple(x * self.each[index] if i == branch else x for i, x in enumerate(args))
        return super().call_module(target, args, kwargs)


def _reactions(proof: _Proof, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Absolute gradient of a random read-out of the outputs to the gate of every unit, and of every block.

    Relative to 1 + the largest output, as two networks are told apart.
    """
    gates = torch.ones(proof.topology.count + 1, dtype=torch.float64, requires_grad=True)
    each = torch.ones(len(blocks), dtype=torch.float64, requires_grad=True)
    outputs = _flat(_Gated(proof.graph, proof.readers, gates, blocks, each).run(*proof.inputs))
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((outputs * weights).sum(), (gates, each), allow_unused=True)
    size = 1 + outputs.detach().abs().max()
    unit, block = (
        torch.zeros_like(x) if g is None else g.abs() / size for g, x in zip(found, (gates, each), strict=True)
    )
    return unit, block


def _heard(proof: _Proof, groups: Sequence[ChannelGroup], reactions: Tensor) -> tuple[list[Item], list[ChannelGroup]]:
    """Those that the outputs react to and that pass, and those that they do not react to."""
    loud, silent = list[Item](), list[ChannelGroup]()
    for group in groups:
        heard = float(reactions[list(group.units)].max()) >= HEARD
        (loud if heard else silent).append(group)
    return proof.accept(loud, train=True), silent


def refute(network: Network, *, seed: int = 0) -> dict[str, str]:
    """Why each group or block that is not frozen yet cannot be offered; those that pass are not in the result."""
    topology: Topology = network.topology
    blocks = list(topology.removable)
    try:
        proof = _Proof(network, seed)
        reactions, moves = _reactions(proof, blocks)
    except FAILS as error:
        every: list[Item] = [*topology.offered, *blocks]
        return {item.id: _failure("masking", error) for item in every}
    groups, silent = _heard(proof, topology.offered, reactions)
    for draw in range(1, DRAWS):
        if not silent:
            break
        other = _Proof(network, seed + draw)
        more, silent = _heard(other, silent, _reactions(other, ())[0])
        groups += more
        proof.reasons |= other.reasons
    proof.reasons |= {group.id: SILENT for group in silent}
    moving: list[Item] = []
    for block, move in zip(blocks, moves.tolist(), strict=True):
        if move >= HEARD:
            moving.append(block)
        else:
            proof.reasons[block.id] = SILENT
    stays = proof.accept(moving, train=True)
    inner = {block.id for block in stays}
    proof.accept([*stays, *(g for g in groups if not (isinstance(g, ChannelGroup) and g.block in inner))], train=False)
    return proof.reasons
