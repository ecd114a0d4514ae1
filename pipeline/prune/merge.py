"""Repairs that change the dense network's weights before the cut: stand-ins take over, or layers are solved alone.

merge       A removed unit r hands what the next layers read of it to the twins t that stay (Ranking.twin):
            W[:, t] += a_t W[:, r], the bias += the layer's mean answer to b in r, with F_r ≈ Σ_t a_t F_t + b fitted
            over the calibration samples where the layer reads it (QSFM's twin; Neuron Merging, Kim et al., NeurIPS
            2020, has one t). All removed units of a layer are fitted on all their twins at once, from one covariance
            matrix, the ridge pulling toward each unit's straight line on its own twin. Where a ranking names no twins
            at all, a layer's is the unit whose line explains most; a unit that is said to have none leaves its mean.
            Without samples a = 1 for a named twin and b = 0, and nothing is handed over without a name; there "mean"
            makes the twin the mean of both first (RED, Yvinec et al., NeurIPS 2021).
layerwise   Each layer that loses inputs alone, on the dense network's activations, from its Gram matrix C:
            W_k' = W_k + W_r C_rk (C_kk + λ I)⁻¹. What ThiNet and OSSCAR do for the kept set, in place of entropic
            regression's D(w) Λ too; sequential least squares (repair.py) sees the errors of earlier layers as well.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pipeline.nouns import Cut, PruningPlan, Ranking
from pipeline.prune.capture import Network
from pipeline.prune.execute import TouchedRun
from pipeline.prune.labels import Reader
from pipeline.prune.maps import Gram
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.surgery import carry_out
from pipeline.prune.taps import find_tap, set_bias

RIDGE = 1e-3
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FLAT = 1e-9
"""A map whose variance is below this share of its mean square is a constant."""
AT_ONCE = 1 << 22
"""Numbers that go into a covariance matrix at once."""


@torch.no_grad()
def merge(
    network: Network,
    plan: PruningPlan,
    rankings: Mapping[str, Ranking],
    inputs: tuple[Tensor, ...] | None,
    reads: Mapping[str, Sequence[Gram]] | None = None,
) -> fx.GraphModule:
    """The pruned network whose surviving twins stand in for what went.

    inputs: None where there is no data. reads: their `channel_grams`, to share between plans.
    """
    graph = copy.deepcopy(network.graph)
    gone = _Gone(kept_units(network.topology, plan))
    means: dict[int, int] = {}
    for id, kept in plan.kept.items():
        group, ranking = network.topology.group(id), rankings[id]
        found = {group.units[a]: group.units[b] for a, b in ranking.stand_ins(kept).items()}
        gone.pairs |= found
        if ranking.twin is None:
            gone.free |= {*group.units} - {group.units[unit] for unit in kept}
        if ranking.merged == "mean" and inputs is None:
            means |= found
    layers = mixers(network, graph)
    seen = reads or (channel_grams(network, inputs) if inputs is not None and plan.kept else {})
    _average(network, graph, layers, means)
    shifts = {layer.target: _absorb(network, layer, gone, seen.get(layer.target)) for layer in layers}
    return _shifted(network, graph, resolve(network.topology, plan), shifts)


@torch.no_grad()
def layerwise(network: Network, plan: PruningPlan, grams: Mapping[str, Gram]) -> fx.GraphModule:
    """The pruned network whose layers were each solved for the outputs that they gave before."""
    graph = copy.deepcopy(network.graph)
    keep, shifts = kept_units(network.topology, plan), {}
    for mixer in mixers(network, graph):
        gram = grams.get(mixer.target)
        stays = None if gram is None else torch.from_numpy(keep[gram.columns])
        if gram is None or stays is None or bool(stays.all()) or not bool(stays.any()):
            continue
        weight = mixer.weight
        second, mean = gram.covariance.double(), gram.mean.double()
        flat = weight.reshape(len(second), -1, len(stays)).double()  # (groups, outputs of each, d)
        inner = second[:, stays][:, :, stays]
        ridge = RIDGE * inner.diagonal(dim1=1, dim2=2).mean(1) + 1e-8
        inner = inner + torch.diag_embed(ridge[:, None].expand(-1, inner.shape[1]))
        across = second[:, ~stays][:, :, stays]
        step = torch.linalg.solve(inner, (flat[:, :, ~stays] @ across).transpose(1, 2)).transpose(1, 2)
        lost = flat[:, :, ~stays] @ mean[:, ~stays, None] - step @ mean[:, stays, None]
        flat[:, :, stays] += step
        weight.copy_(flat.reshape(weight.shape).float())
        shifts[mixer.target] = lost.reshape(-1).float()
    return _shifted(network, graph, resolve(network.topology, plan), shifts)


# --- layers that mix channels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixer:
    """A layer that mixes channels: it reads units, and what it reads of one can be handed to another.

    node: its first use. readers: one for each use. axis: the axis of its weight that lies on the inputs; units: along
    that axis (in a grouped convolution along one group's inputs, the same units for every group).
    """

    target: str
    layer: nn.Module
    node: fx.Node
    readers: tuple[Reader, ...]
    axis: int
    units: NDArray[np.int32]

    @property
    def weight(self) -> Tensor:
        """The layer's weight, to be changed in place."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight.data

    @property
    def groups(self) -> int:
        """How often the units of `units` lie among the inputs, one group after the other."""
        return len(self.readers[0].ids) // len(self.units)

    def alike(self) -> list[NDArray[np.int32]]:
        """The units that are read, those together that have equally many inputs."""
        units, times = np.unique(self.units[self.units >= 0], return_counts=True)
        return [units[times == each] for each in np.unique(times)]

    def at(self, units: Sequence[int]) -> Tensor:
        """Positions of units among the inputs, shape (groups, units, times)."""
        ids = self.readers[0].ids
        each = [np.flatnonzero(ids == unit).reshape(self.groups, -1) for unit in units]
        return torch.from_numpy(np.stack(each, 1))


def mixers(network: Network, graph: fx.GraphModule) -> list[Mixer]:
    """Every layer of the graph (the network's or a copy) that mixes channels, in order of first use, each memory once.

    Products of activations have no weights that could take anything over.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    uses: dict[int, list[Reader]] = {}
    for reader in network.readers:
        node = nodes[reader.op]
        layer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)):
            uses.setdefault(id(layer.weight), []).append(reader)
    found = []
    for readers in uses.values():
        first = nodes[readers[0].op]
        layer = graph.get_submodule(str(first.target))
        axis = 0 if isinstance(layer, TRANSPOSED) else 1
        units = network.topology.params[f"{first.target}.weight"][axis]
        found.append(Mixer(str(first.target), layer, first, tuple(readers), axis, units))
    return found


def _shifted(network: Network, graph: fx.GraphModule, cut: Cut, shifts: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph cut, and a constant added to each output of some layers: to a bias, or in the norm behind it."""
    pruned = carry_out(graph, cut)
    done = {node.name for node in pruned.graph.nodes}
    uses: dict[str, list[fx.Node]] = {}
    for node in pruned.graph.nodes:
        if node.op == "call_module" and str(node.target) in shifts:
            uses.setdefault(str(node.target), []).append(node)
    for target, nodes in uses.items():
        layer = pruned.get_submodule(target)
        kept = cut.params.get(f"{target}.weight", {}).get(1 if isinstance(layer, TRANSPOSED) else 0)
        by = shifts[target]
        if kept is not None:  # of a grouped transposed convolution: positions among the outputs of each group
            groups = layer.groups if isinstance(layer, TRANSPOSED) else 1
            by = by.reshape(groups, -1)[:, torch.from_numpy(kept)].reshape(-1)
        if bool(by.any()):
            norm = find_tap(network, pruned, nodes[0], done).norm if len(nodes) == 1 else None
            bias: Tensor | None = layer.bias  # type: ignore[assignment]
            before = torch.zeros_like(by) if bias is None else bias.detach()
            set_bias(layer, pruned.get_submodule(norm) if norm else None, before + by, before)
    return pruned


# --- handing over ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def channel_grams(network: Network, inputs: tuple[Tensor, ...]) -> dict[str, list[Gram]]:
    """Layer name -> second moments of the units that it reads, over all uses, samples and positions.

    One for each of `Mixer.alike`; its columns are the units themselves. They do not depend on a plan.
    """
    by_op = {reader.op: mixer for mixer in mixers(network, network.graph) for reader in mixer.readers}
    found: dict[str, list[Gram]] = {}

    def keep(reader: Reader, x: Tensor) -> Tensor:
        mixer = by_op.get(reader.op)
        if mixer is not None:
            own = [_gram(mixer, units, x.movedim(reader.axis, 0)) for units in mixer.alike()]
            before = found.get(mixer.target)
            found[mixer.target] = [a.joined(b) for a, b in zip(before, own, strict=True)] if before else own
        return x

    TouchedRun(network.graph, network.readers, keep).run(*inputs)
    return found


def _gram(mixer: Mixer, units: NDArray[np.int32], x: Tensor) -> Gram:
    """Second moments of units, in float64; x has its channels first."""
    rows = x[mixer.at(units.tolist()).reshape(-1)].reshape(mixer.groups, len(units), -1)
    mean = rows.mean(2, dtype=torch.float64)
    covariance = torch.zeros(mixer.groups, len(units), len(units), dtype=torch.float64)
    for part in torch.split(rows, max(1, AT_ONCE // mean.numel()), 2):
        centred = part - mean[:, :, None]
        covariance += centred @ centred.transpose(1, 2)
    return Gram(covariance / rows.shape[2], mean, units.astype(np.int64), rows.shape[2])


def _fit(gram: Gram, removed: Sequence[int], twins: Sequence[int], own: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Least squares of removed columns on twins: gains (groups, removed, twins) and offsets (groups, removed).

    own: for each removed column the twin that it was given, whose line alone is where the fit begins. The ridge is
    wider where rows are few for so many twins. A constant twin gives its mean alone.
    """
    second, mean = gram.covariance, gram.mean
    inner, across = second[:, twins][:, :, twins], second[:, removed][:, :, twins]
    variance, each = inner.diagonal(dim1=1, dim2=2), range(len(removed))
    flat = variance <= FLAT * (variance + mean[:, twins].square())
    line = torch.where(flat[:, own], 0.0, across[:, each, own] / torch.where(flat, 1.0, variance)[:, own])
    gain = torch.zeros_like(across)
    gain[:, each, own] = line
    ridge = (RIDGE + len(twins) / gram.rows) * variance.mean(1) + 1e-12
    damped = inner + torch.diag_embed(ridge[:, None].expand(-1, len(twins)))
    gain += torch.linalg.solve(damped, (across - gain @ inner).transpose(1, 2)).transpose(1, 2)
    return gain.float(), (mean[:, removed] - (gain @ mean[:, twins, None])[:, :, 0]).float()


@dataclass
class _Gone:
    """Units that a plan removes. stays: which do not, by unit id. pairs: those with a twin that stays -> that twin.

    free: those of rankings that name no twins.
    """

    stays: NDArray[np.bool_]
    pairs: dict[int, int] = field(default_factory=dict)
    free: set[int] = field(default_factory=set)


def _nearest(gram: Gram, removed: Sequence[int], kept: Sequence[int]) -> dict[int, int]:
    """Column of each removed unit -> that of the one whose line explains most of it, where any explains something."""
    if not removed or not kept:
        return {}
    variance, mean = gram.covariance.diagonal(dim1=1, dim2=2)[:, kept], gram.mean[:, kept]
    flat = variance <= FLAT * (variance + mean.square())
    across = gram.covariance[:, removed][:, :, kept]
    explained = torch.where(flat[:, None], 0.0, across.square() / torch.where(flat, 1.0, variance)[:, None]).sum(0)
    most = explained.max(1)
    found = zip(removed, most.values.tolist(), most.indices.tolist(), strict=True)
    return {unit: kept[at] for unit, value, at in found if value > 0}


def _absorb(network: Network, mixer: Mixer, gone: _Gone, seen: Sequence[Gram] | None) -> Tensor:
    """Add what a layer reads of removed units to what it reads of their twins; the constant to add to its outputs."""
    weight = mixer.weight.movedim(mixer.axis, 0)
    constant = torch.zeros(len(mixer.readers[0].ids))
    for number, units in enumerate(mixer.alike()):
        column = {unit: at for at, unit in enumerate(units.tolist())}
        here = {removed: twin for removed, twin in gone.pairs.items() if removed in column and twin in column}
        if seen is not None:
            gram, stays = seen[number], gone.stays[units]
            free = [column[unit] for unit in column if unit in gone.free]
            near = _nearest(gram, free, np.flatnonzero(stays).tolist())
            here |= {int(units[removed]): int(units[twin]) for removed, twin in near.items()}
            alone = [unit for unit, stay in zip(column, stays, strict=True) if not stay and unit not in here]
            if alone:
                constant[mixer.at(alone)] = gram.mean[:, [column[unit] for unit in alone], None].float()
        if not here:
            continue
        twins = sorted(set(here.values()))
        own = [twins.index(twin) for twin in here.values()]
        if seen is None:
            gain = torch.eye(len(twins))[own].expand(mixer.groups, -1, -1)
        else:
            gain, offset = _fit(seen[number], [column[unit] for unit in here], [column[unit] for unit in twins], own)
            constant[mixer.at([*here])] = offset[:, :, None]
        r, t = (torch.from_numpy(np.stack([np.flatnonzero(mixer.units == u) for u in of])) for of in (here, twins))
        read = weight[r].reshape(*r.shape, mixer.groups, -1)
        weight[t] += torch.einsum("grt,rpgw->tpgw", gain, read).reshape(*t.shape, *weight.shape[1:])
    return _answer(network, mixer, constant)


def _answer(network: Network, mixer: Mixer, constant: Tensor) -> Tensor:
    """What a layer gives for a constant in each input channel, without its bias: mean over positions, (outputs,).

    A mean, since at a padded border some of the kernel reads zeros.
    """
    shape, axis = network.shapes[mixer.node.all_input_nodes[0].name], mixer.readers[0].axis
    full = constant.reshape([-1 if a == axis else 1 for a in range(len(shape))]).expand(1, *shape[1:])
    lost: Tensor = mixer.layer(full) - mixer.layer(torch.zeros_like(full))
    return lost.movedim(axis, 0).flatten(1).mean(1)


# --- averaging ------------------------------------------------------------------------------------------------------


def _average(network: Network, graph: fx.GraphModule, layers: Sequence[Mixer], means: Mapping[int, int]) -> None:
    """Every twin becomes the mean of the units that it stands for and itself, in everything that makes its channels.

    A batch norm's scale and shift are averaged as such, and together with the layer before it where that is its only
    use.
    """
    if not means:
        return
    clusters: dict[int, list[int]] = {}
    for removed, twin in means.items():
        clusters.setdefault(twin, [twin]).append(removed)
    params = network.topology.params
    tensors = dict(graph.named_parameters(remove_duplicate=False)) | dict(graph.named_buffers(remove_duplicate=False))

    def slots(module: str | None, *parts: str, axis: int = 0) -> set[tuple[int, int]]:
        return {(id(tensors[f"{module}.{part}"]), axis) for part in parts if f"{module}.{part}" in tensors}

    along = {layer.weight: layer.axis for layer in network.topology.layers}
    uses = Counter(node.target for node in graph.graph.nodes)
    done = {slot for layer in layers for slot in slots(layer.target, "weight", axis=layer.axis)}  # handed over
    for node in graph.graph.nodes:
        norm = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        units = params.get(f"{node.target}.weight", {}).get(0)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None or units is None:
            continue
        own = slots(str(node.target), "weight", "bias", "running_mean", "running_var")
        if own & done:  # a norm that is used again
            continue
        name = _maker(graph, node) if uses[node.target] == 1 else None
        maker = None if name is None else graph.get_submodule(name)
        axis = along.get(f"{name}.weight", 0)
        if maker is not None and maker.weight.shape[axis] != len(units):  # type: ignore[index]
            name = maker = None  # of a grouped transposed convolution: the outputs of one group
        made = slots(name, "weight", axis=axis)
        _average_norm(norm, units, clusters, None if made & done else maker, axis)
        done |= own | made | slots(name, "bias")
    for name, axes in params.items():
        for axis, units in axes.items():
            if name in tensors and (id(tensors[name]), axis) not in done:
                done.add((id(tensors[name]), axis))
                moved = tensors[name].data.movedim(axis, 0)
                for at in _members(units, clusters):
                    moved[at[0]] = moved[at].mean(0)


def _maker(graph: fx.GraphModule, norm: fx.Node) -> str | None:
    """The layer that only this norm reads."""
    source = norm.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return None
    layer = graph.get_submodule(str(source.target))
    return str(source.target) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)) else None


def _members(units: NDArray[np.int32], clusters: Mapping[int, list[int]]) -> list[Tensor]:
    """Positions of every cluster whose units all lie on the axis, shape (members, times), the twin's first."""
    found = [[np.flatnonzero(units == unit) for unit in members] for members in clusters.values()]
    return [torch.from_numpy(np.stack(at)) for at in found if len(at[0]) and len({len(a) for a in at}) == 1]


def _average_norm(
    norm: nn.modules.batchnorm._BatchNorm,
    units: NDArray[np.int32],
    clusters: Mapping[int, list[int]],
    maker: nn.Module | None,
    axis: int,
) -> None:
    """The mean of s (of s W with a maker) and of h, s = γ / σ and h = β + s (b - μ), written into the twin's γ and β.

    axis: of W, on which the maker's outputs lie. The twin's γ stays where W can take the mean.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    deviation = torch.sqrt(norm.running_var + norm.eps)
    bias: Tensor | None = None if maker is None else maker.bias  # type: ignore[assignment]
    offset = (torch.zeros_like(deviation) if bias is None else bias.detach()) - norm.running_mean
    scale = norm.weight.data / deviation
    shift = norm.bias.data + scale * offset
    for at in _members(units, clusters):
        twin = at[0]
        kept = scale[at].mean(0)
        if maker is not None:
            weight: Tensor = maker.weight.data  # type: ignore[assignment]
            weight = weight.movedim(axis, 0)
            view = [*at.shape, *[1] * (weight.dim() - 1)]
            dead = scale[twin].abs() < 1e-6  # comes alive with the mean of the others
            kept = torch.where(dead, 1.0, scale[twin])
            weight[twin] = (scale[at].reshape(view) * weight[at]).mean(0) / kept.reshape(view[1:])
        norm.weight.data[twin] = kept * deviation[twin]
        norm.bias.data[twin] = shift[at].mean(0) - kept * offset[twin]
