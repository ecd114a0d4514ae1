"""Spatial operators: pooling, resizing, spatial padding and slicing, means over space. Channels pass through untouched.

A reduction over a labelled axis mixes channels without a weight to take the mask and is frozen.
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import Labels, LabelSpace, Op

KINDS = ("spatial", "reduce")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through an operator over the spatial axes."""
    labels = space.tensors[op.inputs[0]]
    if op.kind == "reduce":
        rank = len(op.in_shapes[0])
        gone = {int(a) % rank for a in op.attrs["axes"]}
        if gone & set(labels.axes):
            space.freeze(labels, f"'{op.name}' reduces over them")
            space.tensors[op.output] = Labels((), np.array(-1, dtype=np.int64))
            return
        if not op.attrs["keepdim"]:
            labels = Labels(tuple(a - sum(g < a for g in gone) for a in labels.axes), labels.ids)
    elif labels.axes not in ((1,), ()):
        space.freeze(labels, f"'{op.name}' moves along an axis that holds channels")
        labels = Labels((), np.array(-1, dtype=np.int64))
    space.tensors[op.output] = labels
