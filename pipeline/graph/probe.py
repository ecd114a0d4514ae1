"""Find how every axis of every tensor depends on the widths of the groups, by narrowing and looking.

Each axis is   size = constant + sum over groups of coefficient x width.   One unit of one group is cut at a time from
the dense graph without its weights, and shape inference says which axes shrank and by how much. A last cut of all
groups at once has to come out as the sum says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx

from pipeline.graph.inner import reads
from pipeline.graph.narrow import narrow, shell
from pipeline.graph.passes.base import is_parameter
from pipeline.nouns import Cut, Dim, KeepUnits, PruningPlan, Topology
from profiles.errors import DeployError

FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)

Resolve = Callable[[PruningPlan], Cut]
Shape = tuple[int, ...]
DimShape = tuple[Dim, ...]


@dataclass(frozen=True)
class Forms:
    """Shapes of all tensors of a dense graph, as numbers and as sums of group widths; their types by ONNX's numbers."""

    dense: Mapping[str, Shape]
    dims: Mapping[str, DimShape]
    types: Mapping[str, int]


def find_forms(model: onnx.ModelProto, topology: Topology, resolve: Resolve) -> Forms:
    """Probe every offered group. Raises DeployError where a shape cannot be inferred or is no such sum."""
    bare = without_weights(model)
    dense = tensor_shapes(bare)
    _check_known(bare, dense)
    found: dict[str, list[dict[str, int]]] = {name: [{} for _ in shape] for name, shape in dense.items()}
    groups = [group for group in topology.offered if group.size > 1]
    for group in groups:
        probed = _probe(bare, resolve, {group.id: group.size - 1})
        for name, shape in probed.items():
            for axis, size in enumerate(shape):
                if size != dense[name][axis]:
                    found[name][axis][group.id] = dense[name][axis] - size
    sizes = {group.id: group.size for group in groups}
    dims = {
        name: tuple(_dim(size, terms, sizes) for size, terms in zip(dense[name], axes, strict=True))
        for name, axes in found.items()
    }
    if groups:
        widths = {group.id: (group.size + 1) // 2 for group in groups}
        _check_sums(dims, _probe(bare, resolve, widths), widths)
    return Forms(dense, dims, tensor_types(bare))


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its floating parameters as inputs that have a shape and no values."""
    bare = shell(model)
    graph = bare.graph
    for tensor in model.graph.initializer:
        if is_parameter(tensor.name) and tensor.data_type in FLOATING:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            graph.initializer.append(tensor)
    return bare


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the inferred shapes of all tensors; large weights are not sent through shape inference."""
    inferred = onnx.shape_inference.infer_shapes(without_weights(model), data_prop=True)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    result.graph.value_info.extend(inferred.graph.value_info)
    return result


def tensor_shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Inferred static shapes of all tensors, initializers included."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {tensor.name: tuple(int(n) for n in tensor.dims) for tensor in inferred.initializer}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[info.name] = tuple(int(dim.dim_value) for dim in dims)
    return shapes


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Inferred element types of all tensors, initializers included, as ONNX numbers them."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    infos = (*inferred.input, *inferred.value_info, *inferred.output)
    found = {info.name: int(info.type.tensor_type.elem_type) for info in infos}
    return found | {tensor.name: int(tensor.data_type) for tensor in inferred.initializer}


def _check_known(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> None:
    for node in model.graph.node:
        for name in node.output:
            if name and name not in shapes:
                raise DeployError(
                    f"the shape that {node.op_type} '{node.name}' makes cannot be inferred.",
                    "the latency table needs fixed shapes: export with a fixed batch.",
                )


def _probe(bare: onnx.ModelProto, resolve: Resolve, widths: Mapping[str, int]) -> dict[str, Shape]:
    plan = PruningPlan(tuple(KeepUnits(group, tuple(range(width))) for group, width in widths.items()))
    cut = narrow(bare, resolve(plan))
    known = {name for node in bare.graph.node for name in (*reads(node), *node.output)}
    return {name: shape for name, shape in tensor_shapes(cut).items() if name in known}


def _dim(size: int, terms: Mapping[str, int], sizes: Mapping[str, int]) -> Dim:
    constant = size - sum(coefficient * sizes[group] for group, coefficient in terms.items())
    return Dim(tuple(sorted(terms.items())), constant)


def _check_sums(dims: Mapping[str, DimShape], probed: Mapping[str, Shape], widths: Mapping[str, int]) -> None:
    for name, shape in probed.items():
        expected = tuple(dim.size(widths) for dim in dims[name])
        if expected != shape:
            raise DeployError(
                f"the shape of '{name}' does not follow from the group widths: "
                f"{list(shape)} where {list(expected)} was expected.",
                "freeze its layer with prune.freeze.",
            )
