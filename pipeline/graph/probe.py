"""Find how every axis of every tensor depends on the widths of the groups, by narrowing and looking.

Each axis is   size = constant + sum over groups of coefficient x width.   Units are cut from the dense graph without
its weights, one a group, and shape inference says which axes shrank and by how much. Most axes depend on one group, so
many groups are cut at once: over n probes a group is cut in half of them, each group in a half of its own. An axis that
shrank alike in just such a half depends on that group alone, since the halves of two groups together are more than one
half; groups that turn out to share an axis are cut one by one. A last cut of all groups at once has to come out as the
sum says.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
    sizes = {group.id: group.size for group in topology.offered if group.size > 1}
    found = _coefficients(bare, dense, resolve, sizes, _sharing(topology))
    dims = {
        name: tuple(_dim(size, found[name, axis], sizes) for axis, size in enumerate(shape))
        for name, shape in dense.items()
    }
    if sizes:
        widths = {group: (size + 1) // 2 for group, size in sizes.items()}
        _check_sums(dims, _probe(bare, resolve, widths), widths)
    return Forms(dense, dims, tensor_types(bare))


def _sharing(topology: Topology) -> set[str]:
    """Groups that meet another one on an axis of a parameter."""
    homes = {unit: group.id for group in topology.offered for unit in group.units}
    axes = (units for axes in topology.params.values() for units in axes.values())
    met = ({homes[unit] for unit in np.unique(units).tolist() if unit in homes} for units in axes)
    return {group for groups in met if len(groups) > 1 for group in groups}


def _coefficients(
    bare: onnx.ModelProto,
    dense: Mapping[str, Shape],
    resolve: Resolve,
    sizes: Mapping[str, int],
    alone: Iterable[str],
) -> dict[tuple[str, int], dict[str, int]]:
    """(tensor, axis) -> coefficients of the groups that it depends on. alone: groups that are cut one by one."""

    def shrunk(groups: Iterable[str]) -> dict[tuple[str, int], int]:
        probed = _probe(bare, resolve, {group: sizes[group] - 1 for group in groups})
        lost = ((name, axis, dense[name][axis] - size) for name, s in probed.items() for axis, size in enumerate(s))
        return {(name, axis): units for name, axis, units in lost if units}

    found: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    single = [group for group in sizes if group in set(alone)]
    halves = _halves([group for group in sizes if group not in single])
    seen: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    for number in sorted(frozenset().union(*halves)):
        for place, units in shrunk(group for half, group in halves.items() if number in half).items():
            seen[place][number] = units
    for place, times in seen.items():
        owner = halves.get(frozenset(times))
        if owner is not None and len(set(times.values())) == 1:
            found[place][owner] = times.popitem()[1]
        else:
            single += [group for half, group in halves.items() if half <= times.keys()]
    for group in dict.fromkeys(single):
        for place, units in shrunk([group]).items():
            found[place][group] = units
    return found


def _halves(groups: Sequence[str]) -> dict[frozenset[int], str]:
    """In which probes each group is cut: half of all, and no two groups alike."""
    count = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= len(groups))
    combinations = itertools.combinations(range(count), count // 2)
    return {frozenset(half): group for half, group in zip(combinations, groups, strict=False)}


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
