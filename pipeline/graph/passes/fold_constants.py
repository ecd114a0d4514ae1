"""Compute once what never changes: shape arithmetic and constant expressions become initializers.

    Constant -> initializer,   Shape(x) -> shape of x where it is static,   op(c1, c2, …) -> its value

Parameters are left as they are: an initializer that narrowing slices by name must not vanish into an expression of it
(the runtime folds those itself when it loads the model).
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from pipeline.graph.passes.base import PassResult, Refusal, constant, is_output, is_parameter, static_shape

LARGEST = 1 << 20
"""Elements of the largest result that is stored in the file rather than computed."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)


def rewrite(graph: gs.Graph) -> PassResult:
    """Fold in one sweep in execution order, so that chains of constants vanish at once."""
    graph.toposort()
    stored = (tensor.name for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant))
    parameters = frozenset(name for name in stored if is_parameter(name))
    changed, refused = 0, []
    for node in list(graph.nodes):
        outcome = _fold(graph, node, parameters)
        if isinstance(outcome, Refusal):
            refused.append(outcome)
        changed += outcome is True
    graph.cleanup(remove_unused_graph_inputs=False)
    return PassResult(changed, tuple(refused))


def _fold(graph: gs.Graph, node: gs.Node, parameters: frozenset[str]) -> bool | Refusal:
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()) or node.op in RANDOM:
        return False
    if node.op == "Shape":
        shape = static_shape(node.inputs[0])
        if shape is None:
            return Refusal(node.name, "the shape of its input is not static")
        values = [np.asarray(shape[node.attrs.get("start", 0) : node.attrs.get("end")], dtype=np.int64)]
    else:
        inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
        if not all(isinstance(tensor, gs.Constant) for tensor in inputs):
            return False
        if node.domain not in (None, "", "ai.onnx") or (node.op == "Constant" and "value_string" in node.attrs):
            return False
        named = next((tensor.name for tensor in inputs if tensor.name in parameters), None)
        if named is not None:
            return Refusal(node.name, f"it reads the parameter '{named}'")
        if any(is_output(graph, out) for out in node.outputs):
            return Refusal(node.name, "its result is an output of the graph")
        sized = [static_shape(out) for out in node.outputs]
        if any(shape is not None and int(np.prod(shape)) > LARGEST for shape in sized):
            return Refusal(node.name, f"its result has more than {LARGEST} elements")
        values = _evaluate(graph, node)
    outputs = list(node.outputs)
    node.outputs.clear()
    for out, value in zip(outputs, values, strict=True):
        out.to_constant(np.ascontiguousarray(value) if value.ndim else value)
    return True


def _evaluate(graph: gs.Graph, node: gs.Node) -> list[np.ndarray]:
    """Run one node on its constants."""
    if node.op == "Constant":
        return [_literal(node)]
    feeds = {tensor.name: constant(tensor) for tensor in node.inputs if not tensor.is_empty()}
    names = [out.name for out in node.outputs]
    opsets = [helper.make_opsetid("", graph.opset)]  # a node alone is run in the newest opset
    alone = helper.make_function("", node.op, list(feeds), names, [OnnxExporter.export_node(node)], opsets)
    return [np.asarray(value) for value in ReferenceEvaluator(alone).run(None, feeds, {})]


def _literal(node: gs.Node) -> np.ndarray:
    kind, value = next(iter(node.attrs.items()))
    if kind == "value":
        return np.asarray(value.values)
    return np.asarray(value, dtype=np.float32 if "float" in kind else np.int64)
