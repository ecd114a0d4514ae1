"""Merge a Pad of zeros into the padding of the convolutions that read it.

    conv(pad(x, p), q) = conv(x, p + q)      where pad adds zeros, and only along the spatial axes

A Pad whose result something else reads too would have to stay, and is refused.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pipeline.graph.passes.base import PassResult, Refusal, bypass, constant, is_output, nodes_of, operand


def rewrite(graph: gs.Graph) -> PassResult:
    """One sweep over all Pad nodes."""
    changed, refused = 0, []
    for node in nodes_of(graph, "Pad"):
        reason = _reason(graph, node)
        if reason:
            refused.append(Refusal(node.name, reason))
            continue
        begin, end = _spatial(node)
        for conv in {id(reader): reader for reader in node.outputs[0].outputs}.values():
            own = list(conv.attrs.get("pads", [0] * 2 * len(begin)))
            conv.attrs["pads"] = [int(a + b) for a, b in zip(own, [*begin, *end], strict=True)]
        bypass(graph, node, node.inputs[0])
        changed += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    return PassResult(changed, tuple(refused))


def _spatial(node: gs.Node) -> tuple[list[int], list[int]]:
    pads = np.asarray(constant(operand(node, 1)))
    rank = len(pads) // 2
    return [int(n) for n in pads[2:rank]], [int(n) for n in pads[rank + 2 :]]


def _reason(graph: gs.Graph, node: gs.Node) -> str | None:
    pads = constant(operand(node, 1))
    if node.attrs.get("mode", "constant") != "constant":
        return f"its mode is '{node.attrs['mode']}'"
    if pads is None:
        return "its amounts are not constants"
    if operand(node, 3) is not None:
        return "it names its axes"
    filler = operand(node, 2)
    value = constant(filler)
    if filler is not None and (value is None or np.any(value != 0)):
        return "it does not add zeros"
    rank = len(pads) // 2
    if rank < 3 or np.any(pads[:2]) or np.any(pads[rank : rank + 2]):
        return "it pads the batch or the channels"
    if np.any(pads < 0):
        return "it crops"
    return _readers_reason(graph, node)


def _readers_reason(graph: gs.Graph, node: gs.Node) -> str | None:
    result = node.outputs[0]
    if is_output(graph, result) or not result.outputs:
        return "its result is an output of the graph"
    for reader in result.outputs:
        if reader.op != "Conv" or reader.inputs[0] is not result:
            return f"it is read by {reader.op} '{reader.name}'"
        if reader.attrs.get("auto_pad", "NOTSET") != "NOTSET":
            return f"'{reader.name}' pads by {reader.attrs['auto_pad']}"
    return None
