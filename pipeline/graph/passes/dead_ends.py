"""Remove nodes and initializers that no output of the graph depends on. Inputs of the graph stay, read or not."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pipeline.graph.passes.base import PassResult


def rewrite(graph: gs.Graph) -> PassResult:
    """Changed counts the nodes and initializers that went."""
    before = _count(graph)
    graph.cleanup(remove_unused_node_outputs=True, remove_unused_graph_inputs=False)
    return PassResult(before - _count(graph))


def _count(graph: gs.Graph) -> int:
    return len(graph.nodes) + sum(isinstance(tensor, gs.Constant) for tensor in graph.tensors().values())
