"""Join slices along different axes into one: x[:, :, ::2][:, :, :, ::2] = x[:, :, ::2, ::2]."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pipeline.graph.passes.base import PassResult, Refusal, constant, nodes_of, operand, sole_reader


def rewrite(graph: gs.Graph) -> PassResult:
    """One sweep; the joined node keeps the name of the last slice."""
    changed, refused = 0, []
    for node in nodes_of(graph, "Slice"):
        made = node.inputs[0].inputs if node.inputs else []
        if len(made) != 1 or made[0].op != "Slice":
            continue
        reason = _reason(graph, made[0], node)
        if reason:
            refused.append(Refusal(node.name, reason))
        else:
            _merge(made[0], node)
            changed += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    return PassResult(changed, tuple(refused))


def _ranges(node: gs.Node) -> list[np.ndarray] | None:
    """starts, ends, axes, steps of a slice, None if one is not constant or negative axes hide which is which."""
    found = [constant(operand(node, i)) for i in (1, 2, 3, 4)]
    if found[0] is None or found[1] is None:
        return None
    count = len(found[0])
    axes = np.arange(count) if len(node.inputs) < 4 else found[2]
    steps = np.ones(count, dtype=np.int64) if len(node.inputs) < 5 else found[3]
    return None if axes is None or steps is None or np.any(axes < 0) else [found[0], found[1], axes, steps]


def _reason(graph: gs.Graph, first: gs.Node, second: gs.Node) -> str | None:
    a, b = _ranges(first), _ranges(second)
    if a is None or b is None:
        return "its range is not constant"
    if set(a[2].tolist()) & set(b[2].tolist()):
        return f"'{first.name}' slices the same axis"
    if sole_reader(graph, first.outputs[0]) is None:
        return f"what '{first.name}' makes is also read elsewhere"
    return None


def _merge(first: gs.Node, second: gs.Node) -> None:
    pairs = zip(_ranges(first) or [], _ranges(second) or [], strict=True)
    source = first.inputs[0]
    labels = ("starts", "ends", "axes", "steps")
    joined = [
        gs.Constant(f"/{second.name.strip('/')}_{label}", np.concatenate([a, b]).astype(np.int64))
        for label, (a, b) in zip(labels, pairs, strict=True)
    ]
    first.inputs.clear()
    second.inputs.clear()
    second.inputs.extend([source, *joined])
