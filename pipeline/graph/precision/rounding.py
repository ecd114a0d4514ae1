"""How far rounding to half moves the outputs of a network, and how far it may.

`spelt_out` makes every rounding of a network in half a cast to half and back in a network of float32, which any runtime
carries out. It is needed because ONNX Runtime's x86 kernels have hardly any half arithmetic: they widen, compute whole
stretches in float32 and round at the end, so that running the network there shows neither rounding nor overflow.

Each rounding multiplies what it rounds by 1 + d with |d| <= u = 2^-11. What reaches an output passes n roundings at
most: one a result that is computed in half, one more for each weight that goes into it. With independent errors of
mean 0 (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4)

    |(1 + d_1) … (1 + d_n) - 1|  <=  exp(k sqrt(n) u + n u^2 / (1 - u)) - 1
                                     with probability at least  1 - 2 exp(-k^2 (1 - u)^2 / 2)

and k is what makes that hold for all compared values together but with probability DOUBT. The bound is relative to the
largest value of an output: that single values add up from larger parts of both signs, whose errors then weigh more, is
met by the errors of many parts being independent. The networks of benchmarks/projects stay 9 to 60 times below the
bound; one that exceeds it loses digits to half precision itself.
"""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.graph.probe import tensor_types

UNIT = 2.0**-11
DOUBT = 1e-6
EXACT = frozenset(
    {
        "Abs", "Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
        "GlobalMaxPool", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape",
        "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators whose result is exact in half when what they read is."""


def spelt_out(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network in float32 with each result rounded to half that is half in `model`."""
    halves = _halves(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for tensor in graph.initializer:
        if tensor.name in halves:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    nodes = []
    for node in graph.node:
        made = [index for index, name in enumerate(node.output) if name in halves]
        for attribute in node.attribute if node.op_type == "Cast" and made else ():
            attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for index in made:
            name = node.output[index]
            exact, half = f"{name}/exact", f"{name}/rounded"
            node.output[index] = exact
            nodes.append(helper.make_node("Cast", [exact], [half], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    return result


def allowed(model: onnx.ModelProto, values: int) -> float:
    """Largest difference of `values` outputs that rounding explains, relative to the largest value of an output."""
    count = roundings(model)
    k = math.sqrt(2 * math.log(2 * max(1, values) / DOUBT)) / (1 - UNIT)
    return math.expm1(k * math.sqrt(count) * UNIT + count * UNIT**2 / (1 - UNIT))


def roundings(model: onnx.ModelProto) -> int:
    """The most roundings to half on a way from the inputs to an output of a model that is in half precision."""
    halves = _halves(model)
    weights = halves & {tensor.name for tensor in model.graph.initializer}
    count: dict[str, int] = {}
    for node in model.graph.node:
        before = max((count.get(name, 0) for name in node.input), default=0)
        own = sum(name in weights for name in node.input) if node.op_type not in EXACT else 0
        for name in node.output:
            count[name] = before + own + (name in halves and node.op_type not in EXACT)
    return max((count.get(info.name, 0) for info in model.graph.output), default=0)


def _halves(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the tensors of a model that are half."""
    return frozenset(name for name, kind in tensor_types(model).items() if kind == TensorProto.FLOAT16)
