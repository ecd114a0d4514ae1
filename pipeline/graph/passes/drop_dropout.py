"""Remove dropout: when not training it is y = x.

ONNX's Dropout drops only if its third input is true; a second output, the mask, must be unread.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pipeline.graph.passes.base import PassResult, Refusal, bypass, constant, is_output, nodes_of, operand


def rewrite(graph: gs.Graph) -> PassResult:
    """One sweep; a Dropout that trains or whose mask is read is refused."""
    changed, refused = 0, []
    for node in nodes_of(graph, "Dropout"):
        reason = _reason(graph, node) or bypass(graph, node, node.inputs[0])
        if reason:
            refused.append(Refusal(node.name, reason))
        else:
            changed += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    return PassResult(changed, tuple(refused))


def _reason(graph: gs.Graph, node: gs.Node) -> str | None:
    training = operand(node, 2)
    if training is not None:
        value = constant(training)
        if value is None:
            return "whether it trains is decided at run time"
        if bool(value):
            return "its training_mode is true"
    if any(mask.outputs or is_output(graph, mask) for mask in node.outputs[1:]):
        return "its mask is read"
    return None
