"""The contract of a graph pass, and the few edits of an onnx-graphsurgeon graph that all of them need.

A pass is a file of this folder with one function

    rewrite(graph: onnx_graphsurgeon.Graph) -> PassResult

that edits the graph in place. It keeps what the network computes, the names of the graph's inputs and outputs, and the
name, axis order and meaning of every parameter that it leaves: narrowing slices initializers by parameter name. Each
node that looks like its case and is left alone is a `Refusal` with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Refusal:
    """A node that a pass looked at and left alone, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """How many nodes or initializers a pass changed, and what it refused."""

    changed: int
    refused: tuple[Refusal, ...] = ()


class Pass(Protocol):
    """A file of this folder."""

    def rewrite(self, graph: gs.Graph) -> PassResult:
        """Edit the graph in place."""
        ...


def is_parameter(name: str) -> bool:
    """Whether an initializer has a state-dict name; the exporter's own look like `/scope/Op`, `onnx::Op_7` or `7`."""
    return bool(name) and not name.startswith("/") and "::" not in name and not name.isdigit()


def constant(tensor: gs.Tensor | None) -> np.ndarray | None:
    """The value of a tensor that is an initializer, else None."""
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None


def operand(node: gs.Node, index: int) -> gs.Tensor | None:
    """Input number `index` of a node, None where it is left out."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def static_shape(tensor: gs.Tensor | None) -> tuple[int, ...] | None:
    """Shape of a tensor if every axis is known, else None."""
    if tensor is None or tensor.shape is None:
        return None
    if not all(isinstance(n, int | np.integer) and n >= 0 for n in tensor.shape):
        return None
    return tuple(int(n) for n in tensor.shape)


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """Whether a tensor is an output of the graph."""
    return any(out is tensor for out in graph.outputs)


def sole_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The one node that reads a tensor, None if there are several, none, or the graph gives it out."""
    return tensor.outputs[0] if len(tensor.outputs) == 1 and not is_output(graph, tensor) else None


def nodes_of(graph: gs.Graph, *ops: str) -> Iterator[gs.Node]:
    """The nodes of these operators, safe against edits of the list on the way."""
    return iter([node for node in graph.nodes if node.op in ops])


def bypass(graph: gs.Graph, node: gs.Node, source: gs.Tensor) -> str | None:
    """Let the readers of a node's first output read `source` instead. Returns the reason where that cannot be done.

    An output of the graph keeps its name: then the producer of `source` writes it, and the other readers follow.
    """
    result = node.outputs[0]
    if not is_output(graph, result):
        _redirect(result, source)
        node.outputs.clear()
        return None
    if len(source.inputs) != 1 or is_output(graph, source):
        return "it joins an input, a constant or another output of the graph to an output"
    producer = source.inputs[0]
    node.inputs.clear()
    node.outputs.clear()
    _redirect(source, result)
    producer.outputs[next(i for i, out in enumerate(producer.outputs) if out is source)] = result
    return None


def _redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    for reader in list(dict.fromkeys(map(id, old.outputs))):
        node = next(n for n in old.outputs if id(n) == reader)
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new
