"""Operations and activations of a choice of widths, counted: the proxies that measured time is compared with.

A layer's multiply-accumulates are the elements of its weight, as the choice leaves it, times the positions where it is
applied, which are its outputs' or, of a transposed convolution, its inputs'; its activations are the elements that it
writes (what Group Fisher calls memory: the sum of h w over the layers that produce a channel).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from pipeline.nouns import Layer, Topology

Terms = tuple[int, tuple[tuple[str, int], ...]]
"""An axis: elements that always stay, and for each group how often every unit of it lies on the axis."""


class Operations:
    """Counts for a topology. widths: group id -> units kept; a group that is left out keeps all."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.sizes = {group.id: group.size for group in topology.groups}
        self.home = {unit: group.id for group in topology.groups for unit in group.units}
        self.axes = {
            layer.weight: {axis: self._terms(units) for axis, units in topology.params.get(layer.weight, {}).items()}
            for layer in topology.layers
        }

    def _terms(self, units: Iterable[int]) -> Terms:
        ids, counts = np.unique([self.home.get(int(unit), "") for unit in units], return_counts=True)
        slots = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        fixed = slots.pop("", 0)
        return fixed, tuple((id, count // self.sizes[id]) for id, count in slots.items())

    def macs(self, widths: Mapping[str, int] | None = None, dropped: Iterable[str] = ()) -> int:
        """Multiply-accumulates per sample."""
        return sum(math.prod(shape) * layer.positions for layer, shape in self._layers(widths or {}, dropped))

    def activations(self, widths: Mapping[str, int] | None = None, dropped: Iterable[str] = ()) -> int:
        """Elements that layers write, per sample."""
        return sum(shape[layer.axis] * layer.written for layer, shape in self._layers(widths or {}, dropped))

    def parameters(self, widths: Mapping[str, int] | None = None, dropped: Iterable[str] = ()) -> int:
        """Weights of the layers, a shared one once; biases and norms are not counted."""
        shapes = {layer.weight: shape for layer, shape in self._layers(widths or {}, dropped)}
        return sum(math.prod(shape) for shape in shapes.values())

    def _layers(self, widths: Mapping[str, int], dropped: Iterable[str]) -> Iterator[tuple[Layer, tuple[int, ...]]]:
        """Layers that stay, with the shape of the weight that stays."""
        gone = {name for id in dropped for name in self.topology.block(id).params}
        for layer in self.topology.layers:
            if layer.weight not in gone:
                shape = list(layer.shape)
                for axis, (fixed, terms) in self.axes[layer.weight].items():
                    shape[axis] = fixed + sum(times * widths.get(id, self.sizes[id]) for id, times in terms)
                yield layer, tuple(shape)
