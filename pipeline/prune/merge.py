"""Repairs that change the dense network's weights before the cut: stand-ins take over, or layers are solved alone.

merge       A removed unit r hands what the next layers read of it to its twin t (Ranking.twin): W[:, t] += a W[:, r],
            the bias += b Σ W[:, r], with F_r ≈ a F_t + b fitted over the calibration samples where the layer reads it
            ("absorb": QSFM's twin, Neuron Merging, Kim et al., NeurIPS 2020). Without samples a = 1 and b = 0. "mean":
            the pair becomes the mean of both, so a = 1 by construction (RED, Yvinec et al., NeurIPS 2021).
layerwise   Each layer that loses inputs alone, on the dense network's activations, from its Gram matrix C:
            W_k' = W_k + W_r C_rk (C_kk + λ I)⁻¹. What ThiNet, OSSCAR and entropic regression D(w) Λ do for the kept
            set; sequential least squares (repair.py) sees the errors of earlier layers as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pipeline.nouns import PruningPlan, Ranking
from pipeline.prune.capture import Network
from pipeline.prune.execute import TouchedRun
from pipeline.prune.labels import Reader
from pipeline.prune.maps import Gram
from pipeline.prune.plan import kept_units, resolve
from pipeline.prune.surgery import carry_out
from pipeline.prune.taps import find_tap, is_layer, set_bias

RIDGE = 1e-3


@torch.no_grad()
def merge(
    network: Network,
    plan: PruningPlan,
    rankings: Mapping[str, Ranking],
    inputs: tuple[Tensor, ...] | None,
) -> fx.GraphModule:
    """The pruned network whose surviving twins stand in for what went. inputs: None where there is no data."""
    graph = copy.deepcopy(network.graph)
    pairs: dict[int, int] = {}
    means: dict[int, int] = {}
    for id, kept in plan.kept.items():
        group, ranking = network.topology.group(id), rankings[id]
        found = {group.units[a]: group.units[b] for a, b in ranking.stand_ins(kept).items()}
        pairs |= found
        if ranking.merged == "mean":
            means |= found
    fits = _fits(network, pairs, inputs) if inputs is not None else {}
    _average(network, graph, means)
    for reader, layer in _layers(network, graph):
        _absorb(network, graph, reader, layer, pairs, means, fits.get(reader.op, {}))
    return carry_out(graph, resolve(network.topology, plan))


@torch.no_grad()
def layerwise(network: Network, plan: PruningPlan, grams: Mapping[str, Gram]) -> fx.GraphModule:
    """The pruned network whose layers were each solved for the outputs that they gave before."""
    graph = copy.deepcopy(network.graph)
    keep = kept_units(network.topology, plan)
    for _, layer in _layers(network, graph):
        gram = grams.get(str(layer.target))
        stays = None if gram is None else torch.from_numpy(keep[gram.columns])
        if gram is None or stays is None or bool(stays.all()) or not bool(stays.any()):
            continue
        module = graph.get_submodule(str(layer.target))
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        flat = weight.detach().reshape(len(weight), -1).double()
        second, mean = gram.covariance[0].double(), gram.mean[0].double()
        inner = second[stays][:, stays]
        inner = inner + torch.eye(len(inner)) * (RIDGE * inner.diagonal().mean() + 1e-8)
        across = second[~stays][:, stays]
        step = torch.linalg.solve(inner, (flat[:, ~stays] @ across).T).T
        new = flat.clone()
        new[:, stays] += step
        lost = flat @ mean - new[:, stays] @ mean[stays]
        weight.data.copy_(new.reshape(weight.shape).float())
        _shift(graph, layer, lost.float())
    return carry_out(graph, resolve(network.topology, plan))


def _layers(network: Network, graph: fx.GraphModule) -> list[tuple[Reader, fx.Node]]:
    """Readers that are layers whose weight's second axis is the reader's axis."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = []
    for reader in network.readers:
        node = nodes[reader.op]
        if is_layer(graph, node) and graph.get_parameter(f"{node.target}.weight").shape[1] == len(reader.ids):
            found.append((reader, node))
    return found


def _shift(graph: fx.GraphModule, layer: fx.Node, by: Tensor) -> None:
    """Add a constant to each output of a layer."""
    module = graph.get_submodule(str(layer.target))
    tap = find_tap(graph, layer, {node.name for node in graph.graph.nodes})
    norm = graph.get_submodule(tap.norm) if tap.norm else None
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    before = torch.zeros_like(by) if bias is None else bias.detach()
    set_bias(module, norm, before + by, before)


Fit = dict[int, tuple[Tensor, Tensor]]
"""Removed unit -> (gain, offset) on its twin."""


def _fits(network: Network, pairs: Mapping[int, int], inputs: tuple[Tensor, ...]) -> dict[str, Fit]:
    """For every reader the straight line of each removed unit on its twin, over all samples and positions."""
    found: dict[str, Fit] = {}

    def keep(reader: Reader, x: Tensor) -> Tensor:
        own: Fit = {}
        moved = x.movedim(reader.axis, 0)
        for removed, twin in _present(reader, pairs).items():
            r, t = (moved[torch.from_numpy(np.flatnonzero(reader.ids == unit))].double() for unit in (removed, twin))
            spread = (t - t.mean()).square().mean()
            gain = ((t - t.mean()) * (r - r.mean())).mean() / spread if spread > 1e-12 else torch.zeros(())
            own[removed] = (gain.float(), (r.mean() - gain * t.mean()).float())
        found[reader.op] = own
        return x

    TouchedRun(network.graph, network.readers, keep).run(*inputs)
    return found


def _present(reader: Reader, pairs: Mapping[int, int]) -> dict[int, int]:
    here = set(reader.ids.tolist())
    return {removed: twin for removed, twin in pairs.items() if removed in here and twin in here}


def _absorb(
    network: Network,
    graph: fx.GraphModule,
    reader: Reader,
    layer: fx.Node,
    pairs: Mapping[int, int],
    means: Mapping[int, int],
    fit: Fit,
) -> None:
    """Add what a layer read of each removed unit to what it reads of its twin."""
    module = graph.get_submodule(str(layer.target))
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    moved = torch.zeros(weight.shape[0])
    for removed, twin in _present(reader, pairs).items():
        r, t = (torch.from_numpy(np.flatnonzero(reader.ids == unit)) for unit in (removed, twin))
        if len(r) != len(t):
            continue
        gain, offset = (torch.ones(()), torch.zeros(())) if removed in means else fit.get(removed, _ALONE)
        weight[:, t] += gain * weight[:, r]
        moved += offset * weight[:, r].flatten(1).sum(1)
    if bool(moved.any()):
        _shift(graph, layer, moved)


_ALONE = (torch.ones(()), torch.zeros(()))


def _average(network: Network, graph: fx.GraphModule, means: Mapping[int, int]) -> None:
    """Every twin becomes the mean of the units that it stands for and itself, in all layers that produce it."""
    if not means:
        return
    clusters: dict[int, list[int]] = {}
    for removed, twin in means.items():
        clusters.setdefault(twin, [twin]).append(removed)
    nodes = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    read = {f"{layer.target}.weight" for _, layer in _layers(network, graph)}
    tensors = dict(graph.named_parameters()) | dict(graph.named_buffers())
    done: set[str] = set()
    for name, axes in network.topology.params.items():
        owner = name.rpartition(".")[0]
        if name not in tensors or name in done or owner not in nodes:
            continue
        module = graph.get_submodule(owner)
        if 0 in axes and name.endswith("weight") and is_layer(graph, nodes[owner]):
            tap = find_tap(graph, nodes[owner], set(nodes))
            norm = graph.get_submodule(tap.norm) if tap.norm else None
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine and norm.running_var is not None:
                _average_folded(module, norm, axes[0], clusters)
                done |= {f"{owner}.bias", *(f"{tap.norm}.{part}" for part, _ in norm.named_parameters())}
                done |= {f"{tap.norm}.{part}" for part, _ in norm.named_buffers()}
                continue
        for axis, units in axes.items():
            if axis == 1 and name in read:
                continue
            _average_axis(tensors[name].data, axis, units, clusters)


def _average_axis(
    tensor: Tensor, axis: int, units: NDArray[np.int32], clusters: Mapping[int, list[int]]
) -> None:
    moved = tensor.movedim(axis, 0)
    for members in clusters.values():
        at = [np.flatnonzero(units == unit) for unit in members]
        if len(at[0]) and len({len(a) for a in at}) == 1:
            moved[torch.from_numpy(at[0])] = torch.stack([moved[torch.from_numpy(a)] for a in at]).mean(0)


def _average_folded(
    layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm, units: NDArray[np.int32], clusters: Mapping[int, list[int]]
) -> None:
    """The mean of s W and of h, s = γ / σ and h = β + s (b - μ), written into the twin's W and β."""
    assert norm.running_var is not None and norm.running_mean is not None
    weight: Tensor = layer.weight.data  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    scale = norm.weight.data / torch.sqrt(norm.running_var + norm.eps)
    view = [-1] + [1] * (weight.dim() - 1)
    folded = weight * scale.reshape(view)
    own = torch.zeros_like(scale) if bias is None else bias.detach()
    shift = norm.bias.data + scale * (own - norm.running_mean)
    for members in clusters.values():
        at = [int(np.flatnonzero(units == unit)[0]) for unit in members if (units == unit).any()]
        if len(at) != len(members):
            continue
        twin = at[0]
        own_scale = scale[twin]
        if own_scale.abs() < 1e-6:  # a dead twin comes alive with the mean of the others
            norm.weight.data[twin] = torch.sqrt(norm.running_var[twin] + norm.eps)
            own_scale = torch.ones(())
        weight[twin] = folded[at].mean(0) / own_scale
        norm.bias.data[twin] = shift[at].mean() - own_scale * (own[twin] - norm.running_mean[twin])
