"""What the layers that mix channels read, computed once for all methods: feature maps of units, and Gram matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.nouns import ChannelGroup
from pipeline.prune.capture import Network
from pipeline.prune.execute import TouchedRun
from pipeline.prune.labels import Reader
from pipeline.prune.taps import is_layer, patches

MAPS_MIB = 512
GRAM_ROWS = 16384
GRAM_COLUMNS = 6144
"""Columns of the widest layer that has a Gram matrix: one in float64 takes 288 MiB, and its inverse as much again."""

Maps = dict[str, tuple[Tensor, ...]]
"""Group id -> one tensor (samples, units, height, width) for each reader that sees the whole group, in order."""


def places(reader: Reader, group: ChannelGroup) -> NDArray[np.int64] | None:
    """Where each unit of the group lies along the reader's axis, shape (units, times), or None: not all are there."""
    wanted = np.asarray(group.units)
    if not np.isin(wanted, reader.ids).all():
        return None
    found = [np.flatnonzero(reader.ids == unit) for unit in wanted]
    return np.stack(found) if len({len(f) for f in found}) == 1 else None


def readers(network: Network, group: ChannelGroup) -> list[Reader]:
    """The readers that see the whole group, in the order of its maps."""
    return [reader for reader in network.readers if places(reader, group) is not None]


@torch.no_grad()
def maps(network: Network, inputs: tuple[Tensor, ...]) -> Maps:
    """The maps of every offered group. A reader that flattened its input gives the flattened positions as height."""
    wanted = {
        reader.op: [(group.id, at) for group in network.topology.offered if (at := places(reader, group)) is not None]
        for reader in network.readers
    }
    found: dict[str, list[Tensor]] = {group.id: [] for group in network.topology.offered}

    def keep(reader: Reader, x: Tensor) -> Tensor:
        moved = x.movedim(reader.axis, 1)
        for id, where in wanted[reader.op]:
            own = moved[:, torch.from_numpy(where.reshape(-1))]
            width = own.shape[-1] if own.dim() > 2 else 1
            found[id].append(own.reshape(len(x), len(where), -1, width))
        return x

    TouchedRun(network.graph, network.readers, keep).run(*inputs)
    return {id: tuple(taken) for id, taken in found.items()}


def affordable(network: Network) -> int:
    """Samples whose maps together take MAPS_MIB, at least four."""
    nodes = {node.name: node for node in network.graph.graph.nodes}
    each = 0
    for reader in network.readers:
        source = nodes[reader.op].all_input_nodes[0]
        each += 4 * math.prod(network.shapes[source.name]) // len(network.example[0])
    return max(4, (MAPS_MIB << 20) // max(1, each))


@dataclass(frozen=True)
class Gram:
    """Second moments of what a layer reads: X holds the patch of each output position, one a row.

    covariance: (X - mean)ᵀ (X - mean) / rows, shape (groups, d, d). mean: (groups, d). columns: the unit of each of the
    d columns, the same in every group, -1 for none. rows: how many there were.
    """

    covariance: Tensor
    mean: Tensor
    columns: NDArray[np.int64]
    rows: int

    def joined(self, other: Gram) -> Gram:
        """The moments of the rows of both."""
        rows = self.rows + other.rows
        share, apart = other.rows / rows, other.mean - self.mean
        covariance = (1 - share) * self.covariance + share * other.covariance
        between = share * (1 - share) * apart[:, :, None] * apart[:, None, :]
        return Gram(covariance + between, self.mean + share * apart, self.columns, rows)


@torch.no_grad()
def grams(network: Network, inputs: tuple[Tensor, ...]) -> dict[str, Gram]:
    """Layer name -> its Gram matrix, for every convolution and linear layer that mixes channels of some unit.

    Layers that read more than GRAM_COLUMNS are left out, as the first linear layer behind large maps is.
    A layer that is used several times has one, over all its uses.
    """
    found: dict[str, Gram] = {}
    nodes = {node.name: node for node in network.graph.graph.nodes}

    def keep(reader: Reader, x: Tensor) -> Tensor:
        node = nodes[reader.op]
        if is_layer(network.graph, node):
            name = str(node.target)
            layer = network.graph.get_submodule(name)
            if layer.weight[0].numel() > GRAM_COLUMNS:  # type: ignore[index]
                return x
            folded = 0 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim()  # type: ignore[operator]
            seen = patches(layer, x.flatten(0, folded), GRAM_ROWS)
            mean = seen.mean(0)
            centred = (seen - mean).transpose(0, 1)
            covariance = centred.transpose(1, 2) @ centred / len(seen)
            taps = 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)  # type: ignore[arg-type]
            units = network.topology.params[f"{name}.weight"][1]
            own = Gram(covariance, mean, np.repeat(units, taps).astype(np.int64), len(seen))
            found[name] = found[name].joined(own) if name in found else own
        return x

    TouchedRun(network.graph, network.readers, keep).run(*inputs)
    return found
