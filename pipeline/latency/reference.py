"""Small ONNX models of our own: the reference that all rows are ratios to, an empty graph, the grid's convolutions.

The reference is fixed for good, because stored ratios mean nothing without it: a stem, four 3x3 convolutions of 32
channels at 16x16 and a pooled head, some 10 million multiplications, long enough to time and short enough to repeat.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR = 8


@lru_cache(maxsize=1)
def reference() -> bytes:
    """The reference network, the same bytes for ever."""
    nodes, weights, last = [], [], "x"
    for index, channels in enumerate((3, 32, 32, 32, 32)):
        name = f"conv{index}"
        weights.append(_weight(f"{name}.w", (32, channels, 3, 3), index))
        nodes.append(helper.make_node("Conv", [last, f"{name}.w"], [name], name=name, pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [name], [f"{name}.r"], name=f"{name}.relu"))
        last = f"{name}.r"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["y"], name="pool"))
    return _model(nodes, weights, (1, 3, 16, 16), (1, 32, 1, 1))


@lru_cache(maxsize=1)
def empty() -> bytes:
    """Next to nothing: what one inference costs before any work."""
    return _model([helper.make_node("Relu", ["x"], ["y"], name="relu")], [], (1, 8), (1, 8))


def chain(kind: str, width: int, size: int, copies: int, element: int = TensorProto.FLOAT) -> bytes:
    """`copies` of y = relu(conv(x)) at one width. kind: 3x3, 1x1 or depthwise; size: height and width of the map.

    element: ONNX's number of the type of all its numbers.
    """
    kernel = 1 if kind == "1x1" else 3
    groups = width if kind == "depthwise" else 1
    nodes, weights, last = [], [], "x"
    for index in range(copies):
        name = f"conv{index}"
        weights.append(_weight(f"{name}.w", (width, width // groups, kernel, kernel), index, element))
        pad = kernel // 2
        nodes.append(helper.make_node("Conv", [last, f"{name}.w"], [name], name=name, pads=[pad] * 4, group=groups))
        last = "y" if index == copies - 1 else f"{name}.r"
        nodes.append(helper.make_node("Relu", [name], [last], name=f"{name}.relu"))
    return _model(nodes, weights, (1, width, size, size), (1, width, size, size), element)


def _weight(name: str, shape: tuple[int, ...], seed: int, element: int = TensorProto.FLOAT) -> onnx.TensorProto:
    """Seeded weights scaled to keep activations of order one, so that no denormal numbers slow a row down."""
    values = np.random.default_rng(seed).standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(element)), name)


def _model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    into: tuple[int, ...],
    out: tuple[int, ...],
    element: int = TensorProto.FLOAT,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "row",
        [helper.make_tensor_value_info("x", element, into)],
        [helper.make_tensor_value_info("y", element, out)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    return bytes(model.SerializeToString(deterministic=True))
