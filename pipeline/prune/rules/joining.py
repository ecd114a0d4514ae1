"""Concatenation and stacking: labels are laid one after the other along the joined axis, and tied along all others."""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import LabelSpace, Op

KINDS = ("cat", "stack")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through a concatenation along `attrs["axis"]`, or a stack along a new axis there."""
    rank = len(op.out_shape)
    axis = int(op.attrs["axis"]) % rank
    parts = [space.tensors[name] for name in op.inputs]
    shapes = list(op.in_shapes)
    if op.kind == "stack":
        parts = [part.moved({a: a + (a >= axis) for a in part.axes}) for part in parts]
        shapes = [(*shape[:axis], 1, *shape[axis:]) for shape in shapes]
    sizes = tuple(1 if a == axis else size for a, size in enumerate(op.out_shape))
    others = [
        (part.replaced(axis, None), tuple(1 if a == axis else size for a, size in enumerate(shape)))
        for part, shape in zip(parts, shapes, strict=True)
    ]
    result = space.joined(op, others, sizes)
    if any(part.at(axis) is not None for part in parts):
        pieces = []
        for part, shape in zip(parts, shapes, strict=True):
            ids = part.at(axis)
            pieces.append(np.full(shape[axis], -1, dtype=np.int64) if ids is None else ids)
        result = result.replaced(axis, np.concatenate(pieces))
    space.tensors[op.output] = result
