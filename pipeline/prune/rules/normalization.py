"""Norms: batch and instance norm treat channels apart; layer, RMS and group norm mix them and are readers too.

A norm over channels computes its statistics over the channels that are left, so the network that is cut differs from
one whose channels are zeroed; the proof masks the statistics as well (`masked_norm` in execute.py). Group norm keeps
its number of groups: position j goes from every group at once. An L2 normalisation divides by the norm of what is
left, which a zero already gives.
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import LabelSpace, Op

KINDS = ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm", "normalize")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through a norm; its parameters follow the channels."""
    labels = space.tensors[op.inputs[0]]
    rank = len(op.in_shapes[0])
    if op.kind == "normalize":
        if labels.at(int(op.attrs["axis"]) % rank) is not None:
            space.read(op, int(op.attrs["axis"]) % rank)
    elif op.kind in ("layer_norm", "rms_norm"):
        first = rank - int(op.attrs["normalized_axes"])
        labelled = [axis for axis in labels.axes if axis >= first]
        if len(labelled) > 1 or (labelled and labelled != [rank - 1]):
            space.freeze(labels, f"'{op.name}' normalises over several axes")
        elif labelled:
            ids = space.read(op, rank - 1, "statistics", tuple(range(first, rank)))
            _follow(op, space, ids, rank - 1 - first)
    else:
        ids = space.along(op, 0, 1)
        if op.kind != "batch_norm":
            space.only(op, labels, (1,))
        if op.kind == "group_norm":
            space.read(op, 1, "statistics")
            table = ids.reshape(int(op.attrs["groups"]), -1)
            space.tie(np.broadcast_to(table[0], table.shape), table)
        _follow(op, space, ids, 0)
    space.tensors[op.output] = labels


def _follow(op: Op, space: LabelSpace, ids: np.ndarray, axis: int) -> None:
    for role in ("weight", "bias", "running_mean", "running_var"):
        if role in op.params:
            space.param(op.params[role], axis, ids)
