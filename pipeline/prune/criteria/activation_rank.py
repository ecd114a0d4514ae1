"""Activation rank: the mean numerical rank of a unit's maps, as in HRank.

    s_i = mean over readers, images and channels of rank(F_i) / min(H, W),      rank = number of σ > max(H, W) ε σ_max

F_i is the map H × W of one image as a layer that mixes channels reads it, ε that of float32 (Lin et al., HRank, CVPR
2020). A group that several layers read takes the mean over them. Where a layer reads a flattened map, its height and
width are looked up before the flattening; maps of one axis (tokens, one value behind a global pooling) have rank 1, or
0 for a channel that is silent. Equal ranks are common: of equal units the one with less energy (mean square of its
maps) goes first.

Cost: one eigenvalue problem of min(H, W) rows for each image, unit and reader.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pipeline.nouns import ChannelGroup, Ranking
from pipeline.prune.evidence import Evidence
from pipeline.prune.labels import Reader
from pipeline.prune.maps import places

NEEDS: tuple[str, ...] = ("inputs",)

Floats = NDArray[np.float64]


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the rank of their maps."""
    rankings = []
    for group in evidence.topology.offered:
        ranks = map_ranks(evidence, group)
        order = np.lexsort((_energy(evidence, group), ranks))
        rankings.append(Ranking(group.id, tuple(int(i) for i in order), tuple(float(r) for r in ranks[order])))
    return rankings


def map_ranks(evidence: Evidence, group: ChannelGroup) -> Floats:
    """Mean rank of each unit's maps over the largest possible one, shape (units,), 0 to 1."""
    network, seen = evidence.network, evidence.maps[group.id]
    nodes = {node.name: node for node in network.graph.graph.nodes}
    readers = [reader for reader in network.readers if places(reader, group) is not None]
    ranks = np.zeros(group.size)
    for reader, maps in zip(readers, seen, strict=True):
        height, width = _spatial(nodes[reader.op], network.shapes, reader, maps)
        apart = maps.reshape(*maps.shape[:2], -1, height, width).transpose(1, 2).flatten(0, 1)
        ranks += _ranks(apart).numpy() / len(seen)
    return ranks


def _spatial(node: fx.Node, shapes: dict[str, tuple[int, ...]], reader: Reader, maps: Tensor) -> tuple[int, int]:
    """Height and width of a channel's map at a reader, before it was flattened: a unit may have several channels."""
    flat, width = maps.shape[2:]
    source = node.all_input_nodes[0]
    rest = [n for axis, n in enumerate(shapes[source.name]) if axis not in (reader.samples, reader.axis)]
    if len(rest) == 2:
        return rest[0], rest[1]
    while width == 1 and flat > 1 and source.all_input_nodes:
        source = source.all_input_nodes[0]
        shape = shapes.get(source.name, ())
        if len(shape) == 4 and shape[2] * shape[3] == flat and math.prod(shape[1:]) == len(reader.ids):
            return shape[2], shape[3]
    return flat, width


def _ranks(x: Tensor) -> Tensor:
    """Mean relative rank over samples of maps (samples, units, height, width)."""
    moved = x.double() if x.shape[2] <= x.shape[3] else x.double().transpose(2, 3)
    short, long = moved.shape[2:]
    tolerance = (long * torch.finfo(torch.float32).eps) ** 2
    squares = torch.stack([torch.linalg.eigvalsh(image @ image.transpose(1, 2)) for image in moved])
    largest = squares[..., -1:]
    return ((squares > tolerance * largest) & (largest > 0)).double().sum(2).mean(0) / short


def _energy(evidence: Evidence, group: ChannelGroup) -> Floats:
    """Mean square of each unit's maps, summed over readers."""
    energy = np.zeros(group.size)
    for maps in evidence.maps[group.id]:
        energy += maps.double().square().mean((0, 2, 3)).numpy()
    return energy
