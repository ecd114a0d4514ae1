"""Concatenation: labels are laid one after the other along the joined axis."""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import Labels, LabelSpace, Op

KINDS = ("cat",)


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through a concatenation along `attrs["axis"]`."""
    axis = int(op.attrs["axis"]) % len(op.out_shape)
    parts = [space.tensors[name] for name in op.inputs]
    if all(part.axes in ((axis,), ()) for part in parts):
        ids = [
            part.ids if part.axes else np.full(shape[axis], int(part.ids), dtype=np.int64)
            for part, shape in zip(parts, op.in_shapes, strict=True)
        ]
        space.tensors[op.output] = Labels((axis,), np.concatenate(ids))
        return
    full = [part.full(shape) for part, shape in zip(parts, op.in_shapes, strict=True)]
    if axis in {a for part in parts for a in part.axes} or axis == 0:
        space.tensors[op.output] = Labels.compress(np.concatenate(full, axis=axis))
        return
    for other in full[1:]:  # joined along another axis: the channels of all parts are the same channels
        space.tie(np.take(full[0], [0], axis=axis), np.take(other, [0], axis=axis))
    space.tensors[op.output] = parts[0]
