"""How large and how small the tensors of a network become on samples: one run of the model with gauges on every tensor.

    peak = max |x|,   rms = sqrt(mean x^2)   over all elements and samples, computed inside the model in float32

so that only two numbers a tensor and sample leave the runtime, however large the tensors are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from pipeline.graph.probe import with_shapes
from pipeline.graph.verify import Feed, open_session, true_inputs


@dataclass(frozen=True)
class Range:
    """Magnitudes of one tensor. peak: the largest, infinite or NaN where the tensor was; rms: root mean square."""

    peak: float
    rms: float


def find_ranges(model: onnx.ModelProto, feeds: Iterable[Feed]) -> dict[str, Range]:
    """The range of every float32 tensor that depends on the input or on weights, by name; without samples none at all.

    Raises DeployError where ONNX Runtime refuses the model.
    """
    names = _floats(model)
    peaks: dict[str, float] = dict.fromkeys(names, 0.0)
    squares: dict[str, list[float]] = {name: [] for name in names}
    session, ran = open_session(_gauged(model, names)), False
    for feed in feeds:
        found, ran = session.run(None, dict(feed)), True
        for name, peak, square in zip(names, found[::2], found[1::2], strict=True):
            peaks[name] = float(np.maximum(peaks[name], peak))  # a NaN stays one
            squares[name].append(float(square))
    return {name: Range(peaks[name], math.sqrt(np.mean(squares[name]))) for name in names} if ran else {}


def feeds_of(model: onnx.ModelProto, columns: Sequence[NDArray[Any]]) -> list[Feed]:
    """Samples, one array an input with the batch axis first, as feeds of the model's own batch.

    The last feed is filled with its last sample; a model whose batch is free gets one sample a feed.
    """
    infos = true_inputs(model)
    batch = infos[0].type.tensor_type.shape.dim[0].dim_value or 1
    feeds: list[Feed] = []
    for start in range(0, len(columns[0]), batch):
        parts = [column[start : start + batch] for column in columns]
        filled = [np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)]) for part in parts]
        feeds.append({info.name: part for info, part in zip(infos, filled, strict=True)})
    return feeds


def _floats(model: onnx.ModelProto) -> list[str]:
    """Float32 inputs of the graph and results of nodes, in order."""
    graph = with_shapes(model).graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info, *graph.output)}
    given = [info.name for info in true_inputs(model)]
    made = [name for node in model.graph.node for name in node.output if name]
    return [name for name in (*given, *made) if kinds.get(name) == TensorProto.FLOAT]


def _gauged(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """The model with the peak and the mean square of each tensor as its outputs, and none of its own."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.output[:]
    for index, name in enumerate(names):
        peak, square = f"gauge/{index}/peak", f"gauge/{index}/square"
        graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"{peak}/abs"]),
                helper.make_node("ReduceMax", [f"{peak}/abs"], [peak], keepdims=0),
                helper.make_node("Mul", [name, name], [f"{square}/mul"]),
                helper.make_node("ReduceMean", [f"{square}/mul"], [square], keepdims=0),
            ]
        )
        graph.output.extend(helper.make_tensor_value_info(each, TensorProto.FLOAT, ()) for each in (peak, square))
    return result
