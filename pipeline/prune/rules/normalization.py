"""Norms: batch and instance norm treat channels apart; layer norm and group norm mix them and are readers too.

A norm over channels computes its statistics over the channels that are left, so the network that is cut differs from
one whose channels are zeroed; the proof masks the statistics as well (`masked_norm` in proof.py). Group norm keeps its
number of groups: position j goes from every group at once.
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import LabelSpace, Op

KINDS = ("batch_norm", "instance_norm", "layer_norm", "group_norm")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through a norm; its parameters follow the channels."""
    labels = space.tensors[op.inputs[0]]
    axis = len(op.in_shapes[0]) - 1 if op.kind == "layer_norm" else 1
    if op.kind == "layer_norm" and int(op.attrs.get("normalized_axes", 1)) != 1:
        space.freeze(labels, f"'{op.name}' normalises over several axes")
        space.tensors[op.output] = labels
        return
    mixes = op.kind in ("layer_norm", "group_norm")
    ids = space.read(op, 0, axis) if mixes else space.along(op, 0, axis)
    if op.kind == "group_norm":
        table = ids.reshape(int(op.attrs["groups"]), -1)
        space.tie(np.broadcast_to(table[0], table.shape), table)
    for role in ("weight", "bias", "running_mean", "running_var"):
        if role in op.params:
            space.param(op.params[role], 0, ids)
    space.tensors[op.output] = labels
