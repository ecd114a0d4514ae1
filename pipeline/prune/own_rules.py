"""Rules of the user's own: what they leave in the label space is checked, where a mistake can still be named."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from pipeline.prune.capture import Network
from pipeline.prune.labels import Ids, Labels, LabelSpace, Op, Reader
from pipeline.prune.naming import kind_of, kind_of_node
from profiles.errors import DeployError, near_miss

HOW = ("zero", "softmax", "amax", "amin", "mean")
"""What a reader of the user's may ask for; statistics are masked in norms of torch alone."""


def apply_own(network: Network, op: Op, space: LabelSpace) -> None:
    """Run the user's rule for an operator. Raises DeployError naming what it left that does not fit the operator."""
    params, readers = set(space.params), len(space.readers)
    network.rules[op.kind](op, space)
    for name in op.pieces or (op.output,):
        _check_output(network, op, name, space)
    for name, axis in space.params.keys() - params:
        _check_parameter(network, op, name, axis, space.params[name, axis])
    for reader in space.readers[readers:]:
        _check_reader(op, reader)


def _check_output(network: Network, op: Op, name: str, space: LabelSpace) -> None:
    labels = space.tensors.get(name)
    if not isinstance(labels, Labels):
        where = "space.tensors[name] for every name of op.pieces" if op.pieces else "space.tensors[op.output]"
        raise DeployError(f"the rule for '{op.kind}' sets no labels of its output '{name}'.", f"set {where}.")
    shape = network.shapes.get(name)
    if shape is None:  # a piece that nothing reads
        return
    for axis, ids in labels.by_axis.items():
        size = shape[axis] if 0 <= axis < len(shape) else None
        _check_size(op, f"its output '{name}'", axis, ids, size)
        if ids.size and (ids.min() < -1 or ids.max() >= space.count):
            raise DeployError(
                f"the rule for '{op.kind}' makes labels up: {int(ids.max())} along axis {axis} of '{name}'.",
                "take labels from the inputs, from space.produce, or from space.fresh.",
            )


def _check_parameter(network: Network, op: Op, name: str, axis: int, ids: Ids) -> None:
    graph = network.graph
    tensors = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    shapes = {key: tuple(value.shape) for key, value in tensors}
    if name not in shapes:
        raise DeployError(
            f"the rule for '{op.kind}' names the parameter '{name}', which is not there. "
            f"{near_miss(name, op.params.values())}",
            "take the names from op.params.",
        )
    _check_size(op, f"the parameter '{name}'", axis, ids, shapes[name][axis] if 0 <= axis < len(shapes[name]) else None)


def _check_reader(op: Op, reader: Reader) -> None:
    if reader.how not in HOW:
        raise DeployError(f"the rule for '{op.kind}' reads with how = '{reader.how}'. {near_miss(reader.how, HOW)}")
    shape = op.in_shapes[0] if reader.op == op.name and reader.input == 0 and op.in_shapes else ()
    size = shape[reader.axis] if 0 <= reader.axis < len(shape) else None
    _check_size(op, "its first input", reader.axis, reader.ids, size)


def _check_size(op: Op, what: str, axis: int, ids: Ids, size: int | None) -> None:
    if size is None:
        raise DeployError(f"the rule for '{op.kind}' labels axis {axis} of {what}, which has no such axis.")
    if np.shape(ids) != (size,):
        given = f"{np.shape(ids)[0]} labels" if np.ndim(ids) == 1 else f"labels of shape {np.shape(ids)}"
        raise DeployError(f"the rule for '{op.kind}' gives {given} along axis {axis} of {what}, which has {size}.")


def unmet(network: Network, model: nn.Module, files: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence for every kind that a rule file names and the network does not have. files: (kind, file) pairs."""
    there = {kind_of_node(network.graph, node) for node in network.graph.graph.nodes}
    known = {name for name in there | {kind_of(m) for m in model.modules()} if name}
    known = {name for name in known if not name.startswith(("torch.", "pipeline.", "_operator."))}
    return [
        f"{file} names '{kind}', which the network does not have. {near_miss(kind, known)}"
        for kind, file in files
        if kind not in there
    ]
