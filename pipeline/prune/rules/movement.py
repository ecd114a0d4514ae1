"""Data movement: the operator is applied to the labels themselves, and its channel counts become constants.

reshape, permute, split, slice, gather and pad only move elements, so the labels of the result are the labels of the
operand moved the same way. A pad adds channels of zeros with fresh labels: an addition ties them to the real
channels of its other operand, and the pad then shrinks with them. A reshape that folds labelled channels into several
labelled axes cannot be cut into a box and is frozen (a channel shuffle never gets here: capture makes it one gather).
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import Ids, LabelledConstant, Labels, LabelSpace, Op

KINDS = ("reshape", "permute", "split", "slice", "gather", "channel_pad", "unsqueeze", "squeeze", "expand")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through an operator that moves elements without changing them."""
    labels = space.tensors[op.inputs[0]]
    if op.kind == "channel_pad":
        _pad(op, labels, space)
    elif op.kind in ("split", "slice", "gather"):
        _cut(op, labels, space)
    elif op.kind == "permute":
        order = [int(a) for a in op.attrs["order"]]
        space.tensors[op.output] = Labels.compress(np.transpose(labels.full(op.in_shapes[0]), order))
    elif op.kind == "expand":
        kept = all(
            op.in_shapes[0][a] == op.out_shape[a + len(op.out_shape) - len(op.in_shapes[0])] for a in labels.axes
        )
        if not kept or len(op.in_shapes[0]) != len(op.out_shape):
            space.freeze(labels, f"'{op.name}' repeats them")
            labels = Labels((), np.array(-1, dtype=np.int64))
        space.tensors[op.output] = labels
    else:
        full = labels.full(op.in_shapes[0])
        moved = Labels.compress(full.reshape((1, *op.out_shape[1:])))
        space.tensors[op.output] = moved
        if op.kind == "reshape":
            _reshape(op, moved, space)


def _reshape(op: Op, moved: Labels, space: LabelSpace) -> None:
    if len(moved.axes) > 1:
        space.freeze(moved, f"'{op.name}' folds them into several axes")
    ids: list[Ids | None] = [None] * len(op.out_shape)
    for axis in moved.axes:
        ids[axis] = moved.ids if len(moved.axes) == 1 else None
    space.constants.append(LabelledConstant(op.attrs["module"], "reshape", 0, tuple(ids), (-1, *op.out_shape[1:])))


def _whole(op: Op, labels: Labels, axis: int, space: LabelSpace) -> Ids:
    """Labels along one axis, -1 where there are none; labels over more axes are frozen."""
    if labels.axes == (axis,):
        return labels.ids
    if axis in labels.axes:
        space.freeze(labels, f"'{op.name}' ({op.kind}) cuts them along one of several axes")
    return np.full(op.in_shapes[0][axis], -1, dtype=np.int64)


def _after(labels: Labels, ids: Ids, axis: int) -> Labels:
    return Labels((axis,), ids) if axis in labels.axes else labels


def _cut(op: Op, labels: Labels, space: LabelSpace) -> None:
    axis, node = int(op.attrs["axis"]), str(op.attrs["module"])
    ids = _whole(op, labels, axis, space)
    if op.kind == "split":
        pieces = np.split(ids, np.cumsum(op.attrs["sizes"])[:-1])
        for name, piece in zip(op.pieces, pieces, strict=True):
            space.tensors[name] = _after(labels, piece, axis)
        space.constants.append(LabelledConstant(node, "split", axis, tuple(pieces)))
    elif op.kind == "slice":
        start, stop = int(op.attrs["start"]), int(op.attrs["stop"])
        space.tensors[op.output] = _after(labels, ids[start:stop], axis)
        space.constants.append(LabelledConstant(node, "slice", axis, (ids[:start], ids[start:stop], ids[stop:])))
    else:
        indices = [int(i) for i in op.attrs["indices"]]
        space.tensors[op.output] = _after(labels, ids[indices], axis)
        space.constants.append(LabelledConstant(node, "gather", axis, (ids,), indices=tuple(indices)))


def _pad(op: Op, labels: Labels, space: LabelSpace) -> None:
    axis = int(op.attrs["axis"])
    before, after = space.fresh(int(op.attrs["before"])), space.fresh(int(op.attrs["after"]))
    if labels.axes not in ((axis,), ()):
        space.freeze(labels, f"'{op.name}' pads one of several labelled axes")
        space.tensors[op.output] = Labels((), np.array(-1, dtype=np.int64))
        return
    inner = labels.ids if labels.axes else np.full(op.in_shapes[0][axis], -1, dtype=np.int64)
    space.tensors[op.output] = Labels((axis,), np.concatenate([before, inner, after]))
    space.constants.append(LabelledConstant(str(op.attrs["module"]), "pad", axis, (before, after)))
