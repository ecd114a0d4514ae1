"""Convolutions: outputs are fresh, inputs are read; depthwise keeps its channels, a grouped one ties its groups.

Weight (out, in / groups, k…), transposed (in, out / groups, k…). With groups the position j inside a group goes from
every group at once, so that all groups stay equal; a depthwise convolution with multiplier m repeats each label
m times, and so does a transposed one. A transposed convolution with groups is tied on both sides in the same way.
"""

from __future__ import annotations

import numpy as np

from pipeline.prune.labels import Ids, Labels, LabelSpace, Op

KINDS = ("conv", "conv_transpose")


def _tied(ids: Ids, groups: int, space: LabelSpace) -> Ids:
    """Tie position j of every group; returns the labels of the first group."""
    table = ids.reshape(groups, -1)
    space.tie(np.broadcast_to(table[0], table.shape), table)
    return np.asarray(table[0])


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through a convolution over (N, C, spatial…)."""
    groups, weight = int(op.attrs["groups"]), op.params["weight"]
    channels_in, channels_out = op.in_shapes[0][1], op.out_shape[1]
    labels = space.tensors[op.inputs[0]]
    space.only(op, labels, (1,))
    into, out_of = (1, 0) if op.kind == "conv" else (0, 1)
    if groups > 1 and groups == channels_in:
        ids = space.along(op, 0, 1)
        out = np.repeat(ids, channels_out // groups)
        space.param(weight, 0, out if op.kind == "conv" else ids)
    elif groups == 1:
        space.param(weight, into, space.read(op, 1))
        out = space.produce(weight, out_of, channels_out)
    elif op.kind == "conv":
        space.param(weight, 1, _tied(space.read(op, 1), groups, space))
        out = space.produce(weight, 0, channels_out)
        _tied(out, groups, space)
    else:
        ids = space.read(op, 1)
        _tied(ids, groups, space)
        space.param(weight, 0, ids)
        out = np.tile(space.produce(weight, 1, channels_out // groups), groups)
    if "bias" in op.params:
        space.param(op.params["bias"], 0, out)
    space.tensors[op.output] = Labels.channels(out)
