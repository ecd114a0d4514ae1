"""One site of the table as a small graph that can be made at any channel counts, any number of times in a row.

Shapes are affine in the site's own channel counts (its dims). Weights are made anew: time depends on shapes, not on
values; they are scaled so that activations neither grow nor fade. Names and order are canonical, so that equal sites
give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pipeline.graph.inner import reads, renamed
from pipeline.graph.passes.base import is_parameter
from pipeline.graph.probe import DimShape, Forms, Shape
from pipeline.graph.sites import Links
from pipeline.nouns import Dim

Widths = tuple[int, ...]
POOL = 1 << 20


@dataclass(frozen=True)
class Axis:
    """A size as constant + sum of coefficients x the site's widths."""

    coefficients: tuple[float, ...]
    constant: float

    def size(self, widths: Widths) -> int:
        """The size at these widths."""
        return round(self.constant + sum(c * w for c, w in zip(self.coefficients, widths, strict=True)))


@dataclass(frozen=True)
class Template:
    """Nodes of a site with everything to instantiate them.

    nodes: in canonical order. inputs, outputs: tensors at its border. axes: shape of every tensor; dense: the same in
    the dense network. constants: values of initializers that are kept where their shape is. weights: names of what does
    not depend on the input and is more than one number. types: of its tensors, as ONNX numbers them.
    """

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Mapping[str, tuple[Axis, ...]]
    dense: Mapping[str, Shape]
    constants: Mapping[str, NDArray[np.generic]]
    weights: frozenset[str]
    types: Mapping[str, int]

    def shape(self, name: str, widths: Widths) -> Shape:
        """Shape of a tensor at these widths."""
        return tuple(axis.size(widths) for axis in self.axes[name])


# --- dims ----------------------------------------------------------------------------------------------------------


def independent(shapes: Sequence[DimShape]) -> tuple[Dim, ...]:
    """Channel counts that vary and do not follow from those before them, in the order of the shapes given."""
    groups = sorted({group for shape in shapes for dim in shape for group, _ in dim.terms})
    basis: list[Dim] = []
    for dim in dict.fromkeys(dim for shape in shapes for dim in shape if dim.terms):
        if _follow(dim, basis, groups) is None:
            basis.append(dim)
    return tuple(basis)


def _follow(dim: Dim, basis: Sequence[Dim], groups: Sequence[str]) -> Axis | None:
    """A dim as an affine form of others, None if it is none."""
    if not dim.terms:
        return Axis((0.0,) * len(basis), float(dim.constant))
    if not basis:
        return None
    matrix = np.array([_vector(other, groups) for other in basis], dtype=np.float64).T
    wanted = np.array(_vector(dim, groups), dtype=np.float64)
    solution = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    if float(np.max(np.abs(matrix @ solution - wanted))) > 1e-6:
        return None
    solution = np.round(solution, 9)
    constant = dim.constant - sum(float(c) * other.constant for c, other in zip(solution, basis, strict=True))
    return Axis(tuple(float(c) for c in solution), constant)


def _vector(dim: Dim, groups: Sequence[str]) -> list[int]:
    terms = dict(dim.terms)
    return [terms.get(group, 0) for group in groups]


# --- cutting a template out of the dense graph -----------------------------------------------------------------------


def cut_template(
    links: Links,
    nodes: frozenset[int],
    outputs: Sequence[str],
    forms: Forms,
    dims: Sequence[Dim],
    initializers: Mapping[str, onnx.TensorProto],
) -> Template:
    """The nodes that `outputs` depend on among those given, in an order that only their structure decides.

    initializers: of the graph, by name.
    """
    order, borders = _order(links, nodes, outputs)
    protos = tuple(links.nodes[index] for index in order)
    names = {name for node in protos for name in (*reads(node), *node.output) if name}
    groups = sorted({group for name in names for dim in forms.dims[name] for group, _ in dim.terms})
    known = names | set(borders) | set(outputs)
    axes = {name: tuple(_axis(dim, dims, groups) for dim in forms.dims[name]) for name in known}
    stored = [initializers[name] for name in names if name in initializers]
    constants = {t.name: numpy_helper.to_array(t) for t in stored if not (_is_weight(t) and is_parameter(t.name))}
    made = {name for i in order if i not in links.dynamic for name in links.nodes[i].output}
    weights = frozenset(made | {tensor.name for tensor in stored if _is_weight(tensor)})
    types = {name: forms.types.get(name, onnx.TensorProto.FLOAT) for name in known}
    return Template(protos, tuple(borders), tuple(outputs), axes, forms.dense, constants, weights, types)


def _axis(dim: Dim, dims: Sequence[Dim], groups: Sequence[str]) -> Axis:
    every = sorted({*groups, *(group for other in dims for group, _ in other.terms)})
    axis = _follow(dim, dims, every)
    assert axis is not None, "the dims of a site do not span its shapes"
    return axis


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer holds more than one floating number."""
    floating = tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return floating and int(np.prod(tensor.dims, dtype=np.int64)) > 1


def _order(links: Links, nodes: frozenset[int], outputs: Sequence[str]) -> tuple[list[int], list[str]]:
    """Depth first from the outputs along the inputs: node indices in execution order, and the border tensors met."""
    order: list[int] = []
    borders: list[str] = []
    seen: set[int] = set()

    def visit(name: str) -> None:
        index = links.makers.get(name)
        if index is None or index not in nodes:
            if links.moves(name) and name not in borders:
                borders.append(name)
            return
        if index not in seen:
            seen.add(index)
            for source in reads(links.nodes[index]):
                visit(source)
            order.append(index)

    for name in outputs:
        visit(name)
    return order, borders


# --- making it -----------------------------------------------------------------------------------------------------


class Builder:
    """A graph under construction with canonical names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._drawn = 0

    def input(self, shape: Shape, kind: int = onnx.TensorProto.FLOAT) -> str:
        """A new input of the graph."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Shape, kind: int = onnx.TensorProto.FLOAT) -> None:
        """Give out a tensor."""
        if all(info.name != name for info in self.outputs):
            self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def constant(self, array: NDArray[np.generic]) -> str:
        """A new initializer."""
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def random(self, shape: Shape, scale: float, offset: float = 0.0, kind: int = onnx.TensorProto.FLOAT) -> str:
        """A new initializer of normal values, other ones each time."""
        count = int(np.prod(shape, dtype=np.int64))
        self._drawn += 1
        pool = np.roll(_pool(), -(self._drawn * 7919) % POOL) if count > POOL else _pool()
        start = (self._drawn * 7919) % max(1, POOL - count)
        values = np.resize(pool, count) if count > POOL else pool[start : start + count]
        drawn = (values * np.float32(scale) + np.float32(offset)).reshape(shape)
        return self.constant(drawn.astype(helper.tensor_dtype_to_np_dtype(kind), copy=False))

    def add(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: object) -> str:
        """A new node; returns its first output."""
        names = self.names(outputs)
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        return names[0]

    def names(self, count: int) -> list[str]:
        """Names for the outputs of the next node."""
        return [f"t{len(self.nodes)}_{i}" for i in range(count)]

    def model(self, opset: int) -> bytes:
        """The finished model, the same bytes for the same calls."""
        graph = helper.make_graph(self.nodes, "row", self.inputs, self.outputs, self.initializers)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        return bytes(proto.SerializeToString(deterministic=True))


@cache
def _pool() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(POOL).astype(np.float32)


def place(
    builder: Builder,
    template: Template,
    widths: Widths,
    borders: Mapping[str, str],
    extra: tuple[int, str] | None = None,
) -> dict[str, str]:
    """Add one copy of a template; returns what its tensors are called.

    borders: names of its border tensors in the graph. extra: (position of a node, tensor of its result's shape) that is
    added to that node's result.
    """
    names = dict(borders)
    for position, node in enumerate(template.nodes):
        inputs = _inputs(builder, template, node, widths, names)
        outputs = builder.names(len(node.output))
        proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain, name=f"n{len(builder.nodes)}", input=inputs)
        proto.output.extend(new if old else "" for old, new in zip(node.output, outputs, strict=True))
        inner = (renamed(a, names, f"n{len(builder.nodes)}_") for a in _attributes(template, node, widths))
        proto.attribute.extend(sorted(inner, key=lambda attribute: attribute.name))
        builder.nodes.append(proto)
        names.update({old: new for old, new in zip(node.output, outputs, strict=True) if old})
        if extra is not None and extra[0] == position:
            names[node.output[0]] = builder.add("Add", [outputs[0], extra[1]])
    return names


def _inputs(
    builder: Builder, template: Template, node: onnx.NodeProto, widths: Widths, names: dict[str, str]
) -> list[str]:
    given = _shape_constants(template, node, widths)
    found = []
    for index, name in enumerate(node.input):
        if index in given:
            found.append(builder.constant(given[index]))
        elif not name:
            found.append("")
        else:
            if name not in names:
                names[name] = _initializer(builder, template, node, index, widths, name)
            found.append(names[name])
    for name in reads(node):
        if name not in names and name not in node.input:
            names[name] = _initializer(builder, template, node, -1, widths, name)
    for index in sorted(set(given) - set(range(len(node.input)))):
        found.extend("" for _ in range(index - len(found)))
        found.append(builder.constant(given[index]))
    return found


def _initializer(
    builder: Builder, template: Template, node: onnx.NodeProto, index: int, widths: Widths, name: str
) -> str:
    shape = template.shape(name, widths)
    kept = template.constants.get(name)
    if kept is None or kept.shape != shape:
        return _draw(builder, node, index, shape, template.types[name])
    return builder.constant(kept)


POSITIVE = {"BatchNormalization": (1, 4), "LayerNormalization": (1,), "InstanceNormalization": (1,)}


def _draw(builder: Builder, node: onnx.NodeProto, index: int, shape: Shape, kind: int) -> str:
    """Random weights that keep the scale of what flows: variance 1 / fan-in, norms near 1, biases near 0."""
    if index in POSITIVE.get(node.op_type, ()):
        return builder.random(shape, 0.01, 1.0, kind)
    if len(shape) < 2:
        return builder.random(shape, 0.05, kind=kind)
    fan_in = int(np.prod(shape[1:], dtype=np.int64)) if node.op_type in ("Conv", "ConvTranspose") else int(max(shape))
    return builder.random(shape, float(fan_in) ** -0.5, kind=kind)


def _attributes(template: Template, node: onnx.NodeProto, widths: Widths) -> list[onnx.AttributeProto]:
    """A node's attributes, with the groups that its weight now has."""
    attributes = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in node.attribute]
    if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in template.axes:
        dense, now = template.dense[node.input[1]], template.shape(node.input[1], widths)
        for attribute in attributes:
            if attribute.name == "group" and attribute.i > 1 and dense[1] == 1:
                attribute.i = now[0] * attribute.i // dense[0]
    if node.op_type == "Split":
        attributes = [a for a in attributes if a.name != "num_outputs"]
        for attribute in attributes:
            if attribute.name == "split":
                attribute.ints[:] = _parts(template, node, widths)
    return attributes


def _parts(template: Template, node: onnx.NodeProto, widths: Widths) -> list[int]:
    """Sizes that a Split gives: an attribute before opset 13, an input since then."""
    axis = _int_attribute(node, "axis")
    return [template.shape(name, widths)[axis] for name in node.output]


def _shape_constants(template: Template, node: onnx.NodeProto, widths: Widths) -> dict[int, NDArray[np.int64]]:
    """The inputs of a node that count or index channels, made from its shapes at these widths."""
    if not node.input or not node.input[0] or node.input[0] not in template.axes:
        return {}
    before, after = template.shape(node.input[0], widths), template.shape(node.output[0], widths)
    if node.op_type in ("Reshape", "Expand"):
        return {1: np.array(after, dtype=np.int64)}
    if node.op_type == "Split" and not any(attribute.name == "split" for attribute in node.attribute):
        return {1: np.array(_parts(template, node, widths), dtype=np.int64)}
    if node.op_type == "Pad":
        return _pads(template, node, before, after)
    if node.op_type == "Slice":
        return _slices(template, node, before, after)
    if node.op_type == "Gather":
        return _indices(template, node, before, after)
    if node.op_type == "Resize" and len(node.input) > 3 and node.input[3]:
        return {3: np.array(after, dtype=np.int64)}
    return {}


def _int_attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def _pads(template: Template, node: onnx.NodeProto, before: Shape, after: Shape) -> dict[int, NDArray[np.int64]]:
    old = template.constants.get(node.input[1])
    if old is None or len(old) != 2 * len(before):
        return {}
    pads = old.astype(np.int64)
    rank = len(before)
    for axis in range(rank):
        total, was = after[axis] - before[axis], int(pads[axis] + pads[axis + rank])
        if total != was:
            pads[axis] = total * int(pads[axis]) // was if was else total // 2
            pads[axis + rank] = total - pads[axis]
    return {1: pads}


def _slices(template: Template, node: onnx.NodeProto, before: Shape, after: Shape) -> dict[int, NDArray[np.int64]]:
    """Ranges along axes whose sizes changed; strided ones run to the end."""
    parts = [template.constants.get(name) if name else None for name in node.input[1:]]
    if len(parts) < 3 or any(part is None for part in parts):
        return {}
    starts, ends, axes = (np.array(part, dtype=np.int64) for part in parts[:3])
    steps = np.ones_like(starts) if len(parts) < 4 else np.array(parts[3], dtype=np.int64)
    full = template.dense[node.input[0]]
    for i, axis in enumerate(axes):
        if before[axis] == full[axis] or steps[i] < 0:
            continue
        if steps[i] == 1:
            starts[i] = min(max(int(starts[i]), 0), before[axis] - after[axis])
            ends[i] = starts[i] + after[axis]
        else:
            ends[i] = before[axis]
    return {1: starts, 2: ends}


def _indices(template: Template, node: onnx.NodeProto, before: Shape, after: Shape) -> dict[int, NDArray[np.int64]]:
    """Indices within what is there now; a permutation stays one."""
    old = template.constants.get(node.input[1])
    axis = _int_attribute(node, "axis")
    if old is None or before == template.dense[node.input[0]]:
        return {}
    if old.ndim == 0:
        return {1: np.array(min(int(old), before[axis] - 1), dtype=np.int64)}
    kept = [int(i) for i in np.asarray(old, dtype=np.int64).ravel() if 0 <= i < before[axis]]
    count = after[axis]
    filled = (kept + [i % before[axis] for i in range(count)])[:count]
    return {1: np.array(filled, dtype=np.int64)}
