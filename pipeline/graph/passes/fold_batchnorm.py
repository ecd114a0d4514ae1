"""Fold batch normalisation into the convolution or linear layer before it.

    y = gamma (W x + b - mean) / sqrt(var + eps) + beta     =     W' x + b'
    s = gamma / sqrt(var + eps),   W' = W s (along the output axis),   b' = (b - mean) s + beta

in float64, rounded once. W' keeps the initializer's name and axis order. b' keeps the name of b, or is called
`<weight without .weight>.bias`; its only axis follows the weight's output axis, which is how narrowing slices it.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pipeline.graph.passes.base import PassResult, Refusal, constant, nodes_of, operand, sole_reader

LAYERS = ("Conv", "ConvTranspose", "Gemm")


def rewrite(graph: gs.Graph) -> PassResult:
    """One sweep over all BatchNormalization nodes."""
    changed, refused, taken = 0, [], set(graph.tensors())
    for node in nodes_of(graph, "BatchNormalization"):
        reason = _reason(graph, node, taken)
        if reason:
            refused.append(Refusal(node.name, reason))
        else:
            _fold(node, taken)
            changed += 1
    graph.cleanup(remove_unused_graph_inputs=False)
    return PassResult(changed, tuple(refused))


def _reason(graph: gs.Graph, node: gs.Node, taken: set[str]) -> str | None:
    if node.attrs.get("training_mode", 0):
        return "its training_mode is 1"
    if any(constant(operand(node, i)) is None for i in (1, 2, 3, 4)):
        return "its scale, bias or statistics are not constants"
    made = node.inputs[0].inputs
    if len(made) != 1 or made[0].op not in LAYERS:
        return f"its input is made by {made[0].op} '{made[0].name}'" if made else "its input is an input of the graph"
    layer = made[0]
    if sole_reader(graph, node.inputs[0]) is None:
        return f"what '{layer.name}' makes is also read elsewhere"
    return _layer_reason(layer, taken)


def _layer_reason(layer: gs.Node, taken: set[str]) -> str | None:
    weight, bias = operand(layer, 1), operand(layer, 2)
    if constant(weight) is None:
        return f"the weight of '{layer.name}' is not an initializer"
    if len(weight.outputs) != 1:  # type: ignore[union-attr]
        return f"the weight '{weight.name}' is shared by {len(weight.outputs)} nodes"  # type: ignore[union-attr]
    if bias is not None and constant(bias) is None:
        return f"the bias of '{layer.name}' is not an initializer"
    if bias is not None and len(bias.outputs) != 1:
        return f"the bias '{bias.name}' is shared by {len(bias.outputs)} nodes"
    if bias is None and _bias_name(weight.name) in taken:  # type: ignore[union-attr]
        return f"the name '{_bias_name(weight.name)}' is taken"  # type: ignore[union-attr]
    if layer.op == "Gemm" and (layer.attrs.get("alpha", 1.0) != 1.0 or layer.attrs.get("beta", 1.0) != 1.0):
        return f"'{layer.name}' scales its product or its bias"
    if layer.op == "Gemm" and bias is not None and len(bias.shape) != 1:
        return f"the bias of '{layer.name}' is not a vector"
    return None


def _bias_name(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"


def _fold(node: gs.Node, taken: set[str]) -> None:
    """taken: names of the graph's tensors, to which that of a new bias is added."""
    layer = node.inputs[0].inputs[0]
    gamma, beta, mean, var = (np.asarray(constant(node.inputs[i]), dtype=np.float64) for i in (1, 2, 3, 4))
    scale = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
    weight, bias = layer.inputs[1], operand(layer, 2)
    old = np.asarray(constant(bias), dtype=np.float64) if bias is not None else np.zeros_like(mean)
    new = ((old - mean) * scale + beta).astype(weight.values.dtype)
    weight.values = _scaled(layer, np.asarray(weight.values), scale)
    if bias is not None:
        bias.values = new
    else:
        layer.inputs = [layer.inputs[0], weight, gs.Constant(_bias_name(weight.name), new)]
        taken.add(layer.inputs[2].name)
    result = node.outputs[0]
    node.outputs.clear()
    layer.outputs[0] = result


def _scaled(layer: gs.Node, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """W s with s along the output axis: 0 of a Conv, 1 within each group of a ConvTranspose, either of a Gemm."""
    wide = weight.astype(np.float64)
    if layer.op == "ConvTranspose":
        group = int(layer.attrs.get("group", 1))
        parts = wide.reshape(group, weight.shape[0] // group, *weight.shape[1:])
        per_group = scale.reshape(group, 1, -1, *(1,) * (weight.ndim - 2))
        wide = (parts * per_group).reshape(weight.shape)
    elif layer.op == "Gemm" and not layer.attrs.get("transB", 0):
        wide = wide * scale
    else:
        wide = wide * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return np.asarray(wide, dtype=weight.dtype)
