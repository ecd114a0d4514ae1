"""Fully connected layers: the last axis is read and a fresh one is written. Weight (out, in).

A product is the same with a weight or a bias that is computed: both carry labels of their own, and are tied.
An embedding writes a fresh last axis from nothing (weight (words, out)); a lookup by an index tensor picks rows of a
table, whose other axes go with it.
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import Labels, LabelSpace, Op

KINDS = ("linear", "product", "embedding", "lookup")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through y = x Wᵀ + b over the last axis, or through picking rows of a table."""
    labels = space.tensors[op.inputs[0]]
    last = len(op.out_shape) - 1
    if op.kind == "lookup":
        for name in op.inputs[1:]:
            space.freeze(space.tensors[name], f"'{op.name}' looks up by it")
        space.freeze(labels.at(0), f"'{op.name}' looks them up")
        shift = len(op.out_shape) - len(op.in_shapes[0])
        space.tensors[op.output] = labels.moved({axis: axis + shift for axis in labels.axes if axis})
        return
    if op.kind == "embedding":
        space.freeze(labels, f"'{op.name}' looks up by it")
        space.tensors[op.output] = Labels.channels(space.produce(op.params["weight"], 1, op.out_shape[-1]), last)
        return
    if op.kind == "product":
        _product(op, space)
        return
    space.param(op.params["weight"], 1, space.read(op, last))
    out = space.produce(op.params["weight"], 0, op.out_shape[-1])
    if "bias" in op.params:
        space.param(op.params["bias"], 0, out)
    space.tensors[op.output] = labels.replaced(last, out)


def _product(op: Op, space: LabelSpace) -> None:
    labels, weight = space.tensors[op.inputs[0]], space.tensors[op.inputs[1]]
    last = len(op.out_shape) - 1
    own, read, made = labels.at(last), weight.at(1), weight.at(0)
    reason = f"'{op.name}' multiplies them with channels that stay"
    if own is not None and read is not None:
        space.tie(own, read, reason)
        space.read(op, last)
    else:
        space.freeze(own, reason)
        space.freeze(read, reason)
    if op.inputs[1] in space.direct and made is not None:
        space.produced.add((space.direct[op.inputs[1]], 0))
    for name in op.inputs[2:]:
        bias = space.tensors[name].at(0)
        nothing = np.full(op.out_shape[-1], -1, dtype=np.int64)
        space.tie(nothing if made is None else made, nothing if bias is None else bias, reason)
    space.tensors[op.output] = labels.replaced(last, made)
