"""Compute the distinct kernels of each input channel once, as a depthwise convolution, and add up the maps by 1x1.

    y_o = sum_i W_oi * x_i,   W_oi = s K_ij,  s in {-1, 0, 1},  K_i1 … K_ir_i the distinct kernels of channel i
        = sum_ij S_o,ij (K_ij * x_i)

x is gathered so that channel i stands there r_i times (an uneven number; no gathering where every r_i is 1), a
depthwise convolution takes the strides, pads and dilations, and the 1x1 convolution S takes the bias. Kernels are the
same only if they are equal or exact negatives, bit by bit, and a kernel of zeros costs nothing: only the order of
additions changes. With R = sum of r_i, k values a kernel, C inputs and O outputs, a pixel takes R (k + O)
multiply-accumulates in place of C O k; where they are not fewer nothing is offered.

Source: "uneven depthwise separation" of RED (Yvinec et al., NeurIPS 2021), whose code is not public: the form is
reconstructed. RED hashes the weights first so that kernels repeat: `graph.hash_error` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from pipeline.graph.candidates.base import Offers
from pipeline.graph.passes.base import Refusal, constant, nodes_of, operand


@dataclass(frozen=True)
class Separation:
    """The distinct kernels of a weight.

    sources: the input channel of each, shape (R,). kernels: shape (R, 1, …). sums: shape (outputs, R), of -1, 0 and 1.
    """

    sources: NDArray[np.int64]
    kernels: NDArray[Any]
    sums: NDArray[Any]


def offers(graph: gs.Graph) -> Offers:
    """Convolutions that repeat enough of their kernels to need fewer multiply-accumulates without them."""
    nodes, refused = [], []
    for node in nodes_of(graph, "Conv"):
        reason = _reason(node)
        if reason:
            refused.append(Refusal(node.name, reason))
        else:
            nodes.append(node.name)
    return Offers(tuple(nodes), tuple(refused))


def rewrite(graph: gs.Graph, node: str) -> None:
    """Put the depthwise convolution and the sum in the place of one convolution."""
    conv = next(each for each in graph.nodes if each.name == node)
    source, bias, result = conv.inputs[0], operand(conv, 2), conv.outputs[0]
    weight, scope = np.asarray(constant(conv.inputs[1])), f"/{node.strip('/')}"
    parts = separate(weight)
    count, spatial = len(parts.sources), weight.ndim - 2
    conv.inputs.clear()
    conv.outputs.clear()

    def add(op: str, name: str, inputs: list[gs.Tensor], out: gs.Tensor, attrs: dict[str, Any]) -> gs.Tensor:
        graph.nodes.append(gs.Node(op, name=f"{scope}/{name}", attrs=attrs, inputs=inputs, outputs=[out]))
        return out

    def made(name: str) -> gs.Variable:
        return gs.Variable(f"{scope}/{name}_output", dtype=np.float32)

    if not np.array_equal(parts.sources, np.arange(weight.shape[1])):
        index = gs.Constant(f"{scope}/sources", parts.sources)
        source = add("Gather", "gather", [source, index], made("gather"), {"axis": 1})
    kernels = gs.Constant(f"{scope}/kernels", parts.kernels)
    attrs = {**conv.attrs, "group": count, "kernel_shape": list(parts.kernels.shape[2:])}
    maps = add("Conv", "maps", [source, kernels], made("maps"), attrs)
    sums = gs.Constant(f"{scope}/sums", parts.sums.reshape(*parts.sums.shape, *(1,) * spatial))
    given = [maps, sums] if bias is None else [maps, sums, bias]
    add("Conv", "sum", given, result, {"kernel_shape": [1] * spatial})
    graph.cleanup(remove_unused_graph_inputs=False)
    graph.toposort()


def separate(weight: NDArray[Any]) -> Separation:
    """The distinct kernels of a weight of shape (outputs, inputs, …), up to sign and without those of zeros."""
    outputs, inputs = weight.shape[:2]
    flat = weight.reshape(outputs, inputs, -1) + np.zeros((), weight.dtype)  # -0 becomes 0
    sources, kernels, columns = [], [], []
    for channel in range(inputs):
        own = flat[:, channel]
        alive = own.any(axis=1)
        first = np.take_along_axis(own, (own != 0).argmax(axis=1)[:, None], axis=1)[:, 0]
        signs = np.sign(first)
        distinct, which = np.unique(signs[alive, None] * own[alive], axis=0, return_inverse=True)
        sums = np.zeros((outputs, len(distinct)), weight.dtype)
        sums[np.flatnonzero(alive), which.reshape(-1)] = signs[alive]
        sources.append(np.full(len(distinct), channel, dtype=np.int64))
        kernels.append(distinct)
        columns.append(sums)
    shape = (-1, 1, *weight.shape[2:])
    return Separation(np.concatenate(sources), np.concatenate(kernels).reshape(shape), np.concatenate(columns, axis=1))


def _reason(node: gs.Node) -> str | None:
    if not node.name:
        return "it has no name"
    weight = constant(operand(node, 1))
    if weight is None or weight.dtype != np.float32:
        return "its weight is not an initializer of float32"
    if int(node.attrs.get("group", 1)) != 1:
        return "it is grouped already"
    size = prod(weight.shape[2:])
    if size == 1:
        return "its kernels are single numbers"
    outputs, inputs = weight.shape[:2]
    parts = separate(weight)
    count, before, after = len(parts.sources), outputs * inputs * size, len(parts.sources) * (size + outputs)
    if not count:
        return "its weight is zero"
    if after >= before:
        told = f"{count} of {outputs * inputs} kernels are distinct"
        return f"{told}: {after} multiply-accumulates a pixel would take the place of {before}"
    return None
