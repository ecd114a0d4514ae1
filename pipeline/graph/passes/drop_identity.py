"""Remove nodes that hand on their input: f(x) = x, and activations applied twice: f(f(x)) = f(x).

Identity;  Cast to the type it has;  Transpose in order;  Slice of everything;  Pad by nothing;  Concat of one;
Reshape, Flatten, Expand to the shape it has;  Relu of Relu, Clip of the same Clip (left where a block was removed)
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from pipeline.graph.passes.base import PassResult, Refusal, bypass, constant, operand, static_shape

SAME_SHAPE = ("Reshape", "Flatten", "Expand", "Squeeze", "Unsqueeze")


def rewrite(graph: gs.Graph) -> PassResult:
    """One sweep; a node that joins a graph input straight to a graph output has to stay."""
    changed, refused = 0, []
    for node in list(graph.nodes):
        if not node.inputs or not node.outputs or not _hands_on(node):
            continue
        reason = bypass(graph, node, node.inputs[0])
        if reason:
            refused.append(Refusal(node.name, reason))
        else:
            changed += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    return PassResult(changed, tuple(refused))


def _hands_on(node: gs.Node) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    before, after = static_shape(source), static_shape(result)
    if node.op == "Identity":
        return True
    if node.op == "Concat":
        return len(node.inputs) == 1
    if node.op == "Cast":
        return source.dtype is not None and _onnx_type(source.dtype) == node.attrs.get("to")
    if node.op == "Transpose":
        order = node.attrs.get("perm")
        return order is not None and list(order) == list(range(len(order)))
    if node.op in SAME_SHAPE:
        return before is not None and before == after
    if node.op == "Slice":
        steps = constant(operand(node, 4))
        forward = len(node.inputs) < 5 or (steps is not None and bool(np.all(steps > 0)))
        return forward and before is not None and before == after
    if node.op == "Pad":
        pads = constant(operand(node, 1))
        return pads is not None and not np.any(pads)
    return _is_repeated(node)


def _onnx_type(dtype: object) -> int:
    return int(dtype) if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))  # type: ignore[call-overload]


def _is_repeated(node: gs.Node) -> bool:
    """Whether the node is an idempotent activation whose input is made by the same one."""
    if node.op not in ("Relu", "Clip") or len(node.inputs[0].inputs) != 1:
        return False
    before = node.inputs[0].inputs[0]
    if before.op != node.op:
        return False
    limits = [(constant(operand(before, i)), constant(operand(node, i))) for i in (1, 2)]
    return node.op == "Relu" or all(a is not None and b is not None and np.array_equal(a, b) for a, b in limits)
