"""Element by element: one operand keeps its labels, several are tied position by position under broadcasting.

An operand of size one along a labelled axis (a spatial attention map, a learned scalar) is not a channel of the other:
it stays, and is frozen if it carries labels of its own.
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import NONE, Ids, Labels, LabelSpace, Op

KINDS = ("unary", "binary", "prelu", "softmax")


def _aligned(labels: Labels, shape: tuple[int, ...], op: Op, space: LabelSpace) -> Ids | None:
    """Labels of an operand on the output's axes (size one where it has none); None where it has no labels at all."""
    shift, out = len(op.out_shape) - len(shape), op.out_shape
    if not labels.axes:
        return None
    view = [1] * len(out)
    for axis, size in zip(labels.axes, labels.ids.shape, strict=True):
        if axis + shift == 0 or out[axis + shift] != size:
            space.freeze(labels, f"'{op.name}' broadcasts it over other channels")
            return None
        view[axis + shift] = size
    return labels.ids.reshape(view)


def _fixed(shape: tuple[int, ...], ids: Ids | None, axes: tuple[int, ...], op: Op) -> bool:
    """The operand has channels of its own along one of these axes that carry no label, so they cannot go."""
    shift = len(op.out_shape) - len(shape)
    sizes = {axis: shape[axis - shift] if axis >= shift else 1 for axis in axes}
    return any(size > 1 and (ids is None or ids.shape[axis] == 1) for axis, size in sizes.items())


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through y = f(x), y = x₁ ∘ x₂ ∘ …, and functions over one axis."""
    if op.kind == "prelu":
        ids = space.along(op, 0, 1) if len(op.in_shapes[0]) > 1 else np.full(1, -1, dtype=np.int64)
        if int(op.attrs.get("parameters", 1)) > 1:
            space.param(op.params["weight"], 0, ids)
        space.tensors[op.output] = space.tensors[op.inputs[0]]
        return
    if op.kind == "softmax":
        labels = space.tensors[op.inputs[0]]
        if int(op.attrs["axis"]) % len(op.out_shape) in labels.axes:
            space.freeze(labels, f"'{op.name}' is a softmax over them")
        space.tensors[op.output] = labels
        return
    operands = [
        _aligned(space.tensors[name], shape, op, space) for name, shape in zip(op.inputs, op.in_shapes, strict=True)
    ]
    labelled = [ids for ids in operands if ids is not None]
    if not labelled:
        space.tensors[op.output] = NONE
        return
    shape = np.broadcast_shapes(*(ids.shape for ids in labelled))
    axes = tuple(axis for axis, size in enumerate(shape) if size > 1)
    wide = [np.broadcast_to(ids, shape) for ids in labelled]
    merged = np.maximum.reduce(wide)
    stuck = np.logical_or.reduce([ids < 0 for ids in wide])
    if any(_fixed(s, ids, axes, op) for s, ids in zip(op.in_shapes, operands, strict=True)):
        stuck = np.ones_like(stuck)
    for ids in wide:
        space.tie(merged, ids)
        space.freeze(ids[stuck], f"'{op.name}' joins them with channels that stay")
    space.tensors[op.output] = Labels(axes, merged.reshape([shape[axis] for axis in axes]))
