"""Operators over some axes: pooling, resizing, padding, rolls, slices of space; reductions; softmax.

What runs along an unlabelled axis leaves channels alone. A sum over channels is felt as zeros; a mean, a maximum or a
softmax over channels is taken over those that are left (the mean of a spatial attention map, softmax of attention
across channels): the network that is cut differs there from one whose channels are zeroed, and the proof's reference
takes them over the rest as well. A mean that is written as a sum over a number (`x.sum(1) / x.shape[1]`) keeps the
number of channels of the dense network, as every number that a forward takes from a shape does: there a channel that
goes counts as zero. Every other reduction over channels freezes them.
"""

from __future__ import annotations

from pipeline.prune.labels import Labels, LabelSpace, Op

KINDS = ("spatial", "reduce", "softmax")
HOW = {"sum": "zero", "mean": "mean", "amax": "amax", "amin": "amin"}


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through an operator along `attrs["axes"]`."""
    labels = space.tensors[op.inputs[0]]
    for name in op.inputs[1:]:
        space.freeze(space.tensors[name], f"'{op.name}' ({op.kind}) is steered by them")
    rank = len(op.in_shapes[0])
    axes = {int(a) % rank for a in op.attrs["axes"]}
    met = sorted(axes & set(labels.axes))
    if op.kind == "reduce":
        _reduce(op, space, labels, axes, met)
        return
    for axis in met:
        if op.kind == "softmax" and len(met) == 1 and not op.attrs.get("log"):
            space.read(op, axis, "softmax")
        elif op.kind == "softmax":
            space.freeze(labels.at(axis), f"'{op.name}' is a softmax over them")
        else:
            space.freeze(labels.at(axis), f"'{op.name}' moves along an axis that holds channels")
            labels = labels.replaced(axis, None)
    space.tensors[op.output] = labels


def _reduce(op: Op, space: LabelSpace, labels: Labels, axes: set[int], met: list[int]) -> None:
    how = HOW.get(str(op.attrs["how"]))
    if len(met) == 1 and how is not None:
        space.read(op, met[0], how, tuple(sorted(axes)))
    else:
        for axis in met:
            space.freeze(labels.at(axis), f"'{op.name}' reduces over them")
    kept = [axis for axis in labels.axes if axis not in axes]
    gone = axes if not op.attrs["keepdim"] else set()
    space.tensors[op.output] = labels.moved({axis: axis - sum(g < axis for g in gone) for axis in kept})
