"""Which inputs and outputs of a node take on half precision with it, as ONNX defines its operator.

An operator's schema ties its inputs and outputs by type variables; those whose variable admits float16 move together. A
tensor that the schema fixes to float32 (the scales of a Resize) stays, and so does the one that only says where to look
(its roi). An operator without such a variable has no half form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_graphsurgeon as gs
from onnx import defs

FIXED = frozenset({("Resize", 1), ("Resize", 2), ("Upsample", 1)})
"""Inputs that say where and how far, by operator and index: positions keep their digits."""
HALF, SINGLE = "float16", "float32"
"""What a cast adds to the name of the tensor that it reads, behind a slash."""


@dataclass(frozen=True)
class Ports:
    """Indices of the float32 inputs and outputs of a node that become half when it does."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def is_float32(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to hold float32."""
    return not tensor.is_empty() and tensor.dtype is not None and _dtype(tensor) == np.float32


def is_half(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known to hold float16."""
    return not tensor.is_empty() and tensor.dtype is not None and _dtype(tensor) == np.float16


def _dtype(tensor: gs.Tensor) -> object:
    """As numpy has it; types that numpy lacks are ONNX's numbers."""
    return tensor.dtype if isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)


def touches_float32(node: gs.Node) -> bool:
    """Whether a node reads or makes float32 beside what is fixed to it."""
    read = (tensor for index, tensor in enumerate(node.inputs) if (node.op, index) not in FIXED)
    return any(is_float32(tensor) for tensor in (*read, *node.outputs))


def is_border(node: gs.Node) -> bool:
    """Whether a node is a cast between float32 and half, which a network in half has wherever the two meet."""
    if node.op != "Cast":
        return False
    ends = node.inputs[0], node.outputs[0]
    return any(is_half(end) for end in ends) and any(is_float32(end) for end in ends)


def inner_graphs(node: gs.Node) -> list[gs.Graph]:
    """The graphs that an If, a Loop or a Scan holds."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def nodes_within(graph: gs.Graph) -> Iterator[gs.Node]:
    """Every node of a graph and of the graphs inside its nodes."""
    for node in graph.nodes:
        yield node
        for inner in inner_graphs(node):
            yield from nodes_within(inner)


def find_ports(node: gs.Node, opset: int) -> Ports | str:
    """What of a node that touches float32 becomes half, or the reason why nothing can."""
    if inner_graphs(node):
        return "it holds a graph of its own"
    unknown = next((t.name for t in (*node.inputs, *node.outputs) if not t.is_empty() and t.dtype is None), None)
    if unknown is not None:
        return f"the type of '{unknown}' is not known"
    forms = _forms(node.op, node.domain or "", opset)
    if forms is None:
        return f"ONNX does not know {node.op} in opset {opset}"
    inputs = tuple(i for i in _floats(node.inputs) if _moves(forms.inputs, i) and (node.op, i) not in FIXED)
    outputs = tuple(i for i in _floats(node.outputs) if _moves(forms.outputs, i))
    if len(outputs) < len(_floats(node.outputs)) or not (inputs or outputs):
        return f"ONNX has no {node.op} in half precision"
    return Ports(inputs, outputs)


def _floats(tensors: Sequence[gs.Tensor]) -> list[int]:
    return [index for index, tensor in enumerate(tensors) if is_float32(tensor)]


@dataclass(frozen=True)
class _Forms:
    """Whether each input and each output of an operator may be half; the last one counts for all that follow it."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]


@cache
def _forms(op: str, domain: str, opset: int) -> _Forms | None:
    try:
        schema = defs.get_schema(op, opset, "" if domain == "ai.onnx" else domain)
    except defs.SchemaError:
        return None
    halves = {each.type_param_str for each in schema.type_constraints if "tensor(float16)" in each.allowed_type_strs}
    inputs, outputs = ([part.type_str in halves for part in parts] for parts in (schema.inputs, schema.outputs))
    return _Forms(tuple(inputs), tuple(outputs))


def _moves(forms: tuple[bool, ...], index: int) -> bool:
    return bool(forms) and forms[min(index, len(forms) - 1)]
