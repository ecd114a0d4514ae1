"""A captured network as boxes and lines: layers with what belongs to them, and which group every channel is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from torch import fx, nn

from pipeline.nouns import Box, Gives, Line
from pipeline.prune import operators
from pipeline.prune.capture import Network
from pipeline.prune.groups import propagate
from pipeline.prune.labels import Ids, Labels, LabelSpace, Op
from pipeline.prune.naming import kind_of
from pipeline.prune.neutral import describe
from pipeline.prune.whole import Whole

OPENS = frozenset(
    {"input", "output", "conv", "conv_transpose", "linear", "product", "embedding", "lookup", "matmul", "attention",
     "einsum", "cat", "stack", "split", "gather", "leaf", "layer_norm", "rms_norm", "group_norm"}
)  # fmt: skip
"""Kinds of operators that begin a box, besides those that read several activations; others join the box before."""
PLAIN = {
    "ResidualAdd": "add", "ScaledAttention": "attention", "ChannelPad": "pad", "ChannelSplit": "split",
    "ChannelSlice": "slice", "ChannelGather": "gather", "Reshape": "reshape", "Einsum": "einsum",
    "Normalize": "normalize",
}  # fmt: skip
"""Names of operators that were given another one here."""
NAMES = {"conv_transpose": "transposed conv"} | dict.fromkeys(("leaf", "unary", "binary", "spatial", "reduce"), "")
"""What a kind is called in a picture: nothing where the title says it."""
IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, operators.InTraining)


@dataclass(frozen=True)
class Sketch:
    """boxes: in execution order. made: parameter axes, `weight[0]`, that make channels; others only carry them."""

    boxes: tuple[Box, ...]
    made: frozenset[str]


def sketch(network: Network, *, heads: bool = False) -> Sketch:
    """A picture of a network with its groups. heads: as they were found with."""
    space = propagate(network, heads=heads)
    return Sketch(_Drawing(network, space).boxes(), frozenset(f"{name}[{axis}]" for name, axis in space.produced))


class _Drawing:
    def __init__(self, network: Network, space: LabelSpace) -> None:
        self.network = network
        self.tensors, self.units = space.tensors, space.units()
        self.home = {unit: group.id for group in network.topology.groups for unit in group.units}
        self.nodes: dict[str, fx.Node] = {node.name: node for node in network.graph.graph.nodes}
        self.ops = describe(network)
        self.readers: dict[str, int] = {}
        for op in self.ops:
            for name in op.inputs:
                self.readers[name] = self.readers.get(name, 0) + 1
        self.shapes = {op.output: op.out_shape for op in self.ops}

    def boxes(self) -> tuple[Box, ...]:
        """One pass: every operator opens a box or joins the one that made its only activation."""
        made: dict[str, Box] = {}
        owner: dict[str, str] = {}  # tensor -> id of its box
        for op in self.ops:
            sources = self._sources(op, owner)
            if op.kind == "parameter" or not (sources or op.kind in ("input", "piece")):
                continue  # it depends on no input
            if op.kind == "piece":
                source = self.nodes[op.name].args[0]
                owner[op.output] = owner.get(getattr(source, "name", ""), "")
                continue
            if isinstance(self._module(self.nodes[op.name]), IDLE) and len(sources) == 1:
                owner[op.output] = owner[sources[0]]
                continue
            if self._joins(op, sources):
                first = made[owner[sources[0]]]
                made[first.id] = self._joined(first, op)
                owner[op.output] = first.id
            else:
                lines = tuple(Line(owner[name], self._gives(name)) for name in sources if owner[name])
                made[op.name] = self._box(op, lines)
                owner[op.output] = op.name
        return tuple(made.values())

    def _sources(self, op: Op, owner: Mapping[str, str]) -> list[str]:
        return [name for name in dict.fromkeys(op.inputs) if name in owner]

    def _joins(self, op: Op, sources: list[str]) -> bool:
        alone = len(sources) == 1 and self.readers[sources[0]] == 1
        return alone and op.kind not in OPENS and op.kind not in self.network.rules and not self._is_piece(sources[0])

    def _is_piece(self, name: str) -> bool:
        source = self.nodes[name].args[0] if self.nodes[name].args else None
        return isinstance(source, fx.Node) and not isinstance(source.meta.get("shape"), tuple)

    def _joined(self, box: Box, op: Op) -> Box:
        also = (*box.also, self._title(op))
        return Box(box.id, box.title, box.kind, box.detail, also, box.lines, self._gives(op.output), box.whole)

    def _box(self, op: Op, lines: tuple[Line, ...]) -> Box:
        whole = ""
        node = self.nodes[op.name]
        if node.op == "call_module" and isinstance(self.network.graph.get_submodule(str(node.target)), Whole):
            whole = self.network.leaves.get(str(node.target), "")
        if op.kind == "output":
            return Box(op.name, "output", "output", "", (), lines, (), "")
        kind, title = NAMES.get(op.kind, op.kind.replace("_", " ")), self._title(op)
        gives = self._gives(op.inputs[0] if op.kind == "split" else op.output)
        return Box(op.name, title, "" if kind == title else kind, self._detail(op), (), lines, gives, whole)

    def _title(self, op: Op) -> str:
        """Path of a layer, else what the operator is called."""
        node = self.nodes[op.name]
        if isinstance(self._module(node), operators.Applied):
            return kind_of(self._module(node)).rpartition(".")[2]
        if "weight" in op.params and op.kind not in self.network.rules:
            return op.params["weight"].rpartition(".")[0] or op.name
        if node.op == "call_module" and not op.name.rpartition("_")[2].isdigit():
            return str(node.target)
        if node.op == "call_module" and "." in str(node.target):
            return str(node.target)
        return PLAIN.get(type(self._module(node)).__name__, op.name.rstrip("0123456789").rstrip("_") or op.name)

    def _module(self, node: fx.Node) -> object:
        return self.network.graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _detail(self, op: Op) -> str:
        if op.kind in ("conv", "conv_transpose"):
            shape = self.network.graph.get_parameter(op.params["weight"]).shape
            groups = int(op.attrs["groups"])
            split = " depthwise" if groups > 1 and shape[1] == 1 else f" in {groups} groups" if groups > 1 else ""
            kernel = "×".join(str(n) for n in shape[2:])
            return f"{kernel}{split}, {op.in_shapes[0][1]} → {op.out_shape[1]}"
        if op.kind == "linear":
            return f"{op.in_shapes[0][-1]} → {op.out_shape[-1]}"
        return "×".join(str(n) for n in op.out_shape[1:])

    def _gives(self, name: str) -> Gives:
        """Runs of channels of a tensor along the axis that holds them: (group, "" for none, how many)."""
        labels, shape = self.tensors.get(name, Labels()), self.shapes.get(name, ())
        if not labels.axes:
            return (("", shape[1]),) if len(shape) > 1 else ()
        axis = 1 if labels.at(1) is not None else labels.axes[-1]
        ids: Ids = labels.by_axis[axis]
        units = np.where(ids >= 0, self.units[np.maximum(ids, 0)], -1)
        homes = (self.home.get(int(unit), "") for unit in units)
        return tuple((group, sum(1 for _ in run)) for group, run in groupby(homes))
