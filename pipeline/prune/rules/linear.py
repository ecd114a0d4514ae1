"""Fully connected layers: the last axis is read and a fresh one is written. Weight (out, in)."""

from __future__ import annotations

from pipeline.prune.labels import Labels, LabelSpace, Op

KINDS = ("linear",)


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through y = x Wᵀ + b over the last axis."""
    last = len(op.in_shapes[0]) - 1
    space.param(op.params["weight"], 1, space.read(op, 0, last))
    out = space.produce(op.params["weight"], 0, op.out_shape[-1])
    if "bias" in op.params:
        space.param(op.params["bias"], 0, out)
    space.tensors[op.output] = Labels.channels(out, last)
