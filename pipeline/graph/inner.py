"""Graphs inside nodes: the branches of an If and the body of a Loop, and what they read of the graph around them.

Such a node reads more than its inputs say: its branches name tensors of the outer graph directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx


def graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node carries."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def reads(node: onnx.NodeProto) -> list[str]:
    """Every tensor that a node reads, its inputs first, each once; an input that is left out is not among them."""
    outer = (name for graph in graphs(node) for name in _outer(graph))
    return [name for name in dict.fromkeys([*node.input, *outer]) if name]


def _outer(graph: onnx.GraphProto) -> list[str]:
    """What a graph reads and does not make itself."""
    made = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    made |= {name for node in graph.node for name in node.output}
    used = [name for node in graph.node for name in reads(node)] + [info.name for info in graph.output]
    return [name for name in dict.fromkeys(used) if name not in made]


def lift_parameters(graph: onnx.GraphProto) -> None:
    """Move what is stored in graphs inside nodes to the outer graph, each name once: narrowing finds it there."""
    stored = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for inner in graphs(node):
            lift_parameters(inner)
            graph.initializer.extend(tensor for tensor in inner.initializer if tensor.name not in stored)
            stored |= {tensor.name for tensor in inner.initializer}
            del inner.initializer[:]


def forget_shapes(graph: onnx.GraphProto) -> None:
    """Take the stored shapes out of the graphs inside nodes: they follow from what those read."""
    for node in graph.node:
        for inner in graphs(node):
            forget_shapes(inner)
            del inner.value_info[:]
            for info in inner.output:
                info.type.tensor_type.ClearField("shape")


def renamed(attribute: onnx.AttributeProto, names: Mapping[str, str], prefix: str) -> onnx.AttributeProto:
    """A copy of an attribute that reads outer tensors by their new names, without shapes.

    What its graph makes begins with `prefix`.
    """
    result = onnx.AttributeProto.FromString(attribute.SerializeToString())
    if result.type == onnx.AttributeProto.GRAPH:
        _rename(result.g, names, f"{prefix}{attribute.name}_")
        for info in result.g.output:
            info.type.tensor_type.ClearField("shape")
    return result


def _rename(graph: onnx.GraphProto, names: Mapping[str, str], prefix: str) -> None:
    made = [info.name for info in graph.input] + [tensor.name for tensor in graph.initializer]
    made += [name for node in graph.node for name in node.output if name]
    own = {name: f"{prefix}{number}" for number, name in enumerate(dict.fromkeys(made))}
    table = {**names, **own}
    graph.name = prefix
    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.name = own[tensor.name]
    for info in (*graph.input, *graph.output):
        info.name = table.get(info.name, info.name)
    for number, node in enumerate(graph.node):
        node.name = f"{prefix}n{number}"
        for side in (node.input, node.output):
            for index, name in enumerate(side):
                side[index] = table.get(name, name)
        inner = [renamed(a, table, f"{prefix}{number}_") for a in node.attribute]
        del node.attribute[:]
        node.attribute.extend(inner)
