"""Check that a model is valid, and that two models compute the same.

    max_abs = max |a - b|,   max_rel = max |a - b| / max |a|   per output, the worst of them,   cosine = a.b / (|a| |b|)

The relative difference is to the largest value of the output, since single values may be as near to zero as they like.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from profiles.errors import DeployError

Feed = Mapping[str, NDArray[Any]]
"""Input name -> array."""

Reference = Callable[..., Any]
"""Called with the input arrays in the model's order, gives one array or a sequence of them."""


@dataclass(frozen=True)
class Difference:
    """The largest differences over all outputs and inputs tried, and the smallest cosine."""

    max_abs: float
    max_rel: float
    cosine: float

    def worse(self, other: Difference) -> Difference:
        """The worse of the two in every number."""
        gaps = max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel)
        return Difference(*gaps, min(self.cosine, other.cosine))


def compare_outputs(
    reference: Reference | Path | onnx.ModelProto, model: Path | onnx.ModelProto, inputs: Sequence[Feed]
) -> Difference:
    """Run both on the same inputs. Outputs are matched by position.

    Raises DeployError where the runtime refuses a model, where outputs differ in number or shape, or are not finite.
    """
    candidate = open_session(model)
    run = _reference(reference)
    worst = Difference(0.0, 0.0, 1.0)
    for feed in inputs:
        expected, got = run(feed), _run(candidate, feed)
        if len(expected) != len(got):
            raise DeployError(f"the model has {len(got)} outputs where {len(expected)} were expected.")
        for a, b in zip(expected, got, strict=True):
            one = difference(np.asarray(a), np.asarray(b))
            worst = worst.worse(one)
    return worst


def difference(a: NDArray[Any], b: NDArray[Any]) -> Difference:
    """Of one output; `a` is what was expected. Raises DeployError where shapes differ or values are not finite."""
    if a.shape != b.shape:
        raise DeployError(f"an output has shape {list(b.shape)} where {list(a.shape)} was expected.")
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DeployError("an output holds values that are not finite.")
    if x.size == 0:
        return Difference(0.0, 0.0, 1.0)
    gap = float(np.max(np.abs(x - y)))
    size = float(np.max(np.abs(x)))
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    cosine = float(x @ y) / norms if norms else float(gap == 0)
    return Difference(gap, gap / size if size else gap, min(cosine, 1.0))


def _reference(reference: Reference | Path | onnx.ModelProto) -> Callable[[Feed], list[Any]]:
    if isinstance(reference, Path | onnx.ModelProto):
        session = open_session(reference)
        return lambda feed: _run(session, feed)

    def call(feed: Feed) -> list[Any]:
        result = reference(*feed.values())
        return list(result) if isinstance(result, tuple | list) else [result]

    return call


def _run(session: Any, feed: Feed) -> list[Any]:
    return list(session.run(None, dict(feed)))


def open_session(model: Path | onnx.ModelProto) -> Any:
    """An ONNX Runtime session on one CPU thread. Raises DeployError with the runtime's own words."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DeployError(f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from error


def seeded_inputs(model: onnx.ModelProto, seed: int = 0, count: int = 2) -> list[dict[str, NDArray[Any]]]:
    """Random inputs of a model with static shapes: standard normal floats, integers 0 and 1.

    Raises DeployError where an axis has no fixed size.
    """
    rng = np.random.default_rng(seed)
    feeds = []
    for _ in range(count):
        feed = {}
        for info in true_inputs(model):
            shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
            if not all(shape):
                text = f"the input '{info.name}' has no fixed size on every axis: {shape}."
                raise DeployError(text, "export with a fixed batch.")
            dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            drawn = rng.standard_normal(shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, shape)
            feed[info.name] = np.asarray(drawn).astype(dtype)
        feeds.append(feed)
    return feeds


def true_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a model that no initializer fills."""
    filled = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in filled]


def check_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """Checker and strict shape inference; returns the model with inferred shapes. Raises DeployError."""
    try:
        onnx.checker.check_model(model)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise DeployError(f"the model is not valid ONNX: {lines[0] if lines else error}") from error
