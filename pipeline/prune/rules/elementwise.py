"""Element by element: one operand keeps its labels, several are tied position by position under broadcasting.

An operand of size one along a labelled axis (a spatial attention map, a learned scalar) is not a channel of the other:
it stays, and is frozen if it carries labels of its own. A gated linear unit multiplies one half of its channels with
the other, so the halves are tied.
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import LabelSpace, Op

KINDS = ("unary", "binary", "prelu", "glu")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through y = f(x), y = x₁ ∘ x₂ ∘ …, PReLU and gated linear units."""
    labels = space.tensors[op.inputs[0]] if op.inputs else None
    if op.kind == "glu" and labels is not None:
        axis = int(op.attrs["axis"]) % len(op.out_shape)
        ids = labels.at(axis)
        if ids is not None:
            half = ids.reshape(2, -1)
            space.tie(half[0], half[1])
            labels = labels.replaced(axis, np.asarray(half[0]))
        space.tensors[op.output] = labels
        return
    if op.kind == "prelu" and labels is not None:
        if int(op.attrs.get("parameters", 1)) > 1:
            space.param(op.params["weight"], 0, space.along(op, 0, 1))
        space.tensors[op.output] = labels
        return
    operands = [(space.tensors[name], shape) for name, shape in zip(op.inputs, op.in_shapes, strict=True)]
    space.tensors[op.output] = space.joined(op, operands, op.out_shape)
