"""Which axis of a fold of channels its readers take for channels.

A linear layer's outputs that are folded into (channels, height, width) for a convolution (the decoder of a variational
autoencoder) have to be cut along the axis that the convolution reads, and not along the last one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.prune.labels import Op

READ_FIRST = {"conv", "conv_transpose", "batch_norm", "instance_norm", "group_norm", "prelu"}
"""Kinds of operators whose channels lie along axis 1."""
PASS = {"unary", "binary", "spatial", "cat", "channel_pad"}
"""Kinds that leave axes where they are."""
Order = tuple[int | None, ...]


def mark(ops: Sequence[Op]) -> None:
    """Note in `attrs["channel"]` of every reshape to more axes which of them is read as channels, where that shows."""
    readers: dict[str, list[Op]] = defaultdict(list)
    for op in ops:
        for name in op.inputs:
            readers[name].append(op)
    for op in ops:
        if op.kind == "reshape" and len(op.out_shape) > len(op.in_shapes[0]):
            axis = _read_axis(op, readers)
            if axis is not None:
                op.attrs["channel"] = axis


def _read_axis(fold: Op, readers: Mapping[str, Sequence[Op]]) -> int | None:
    """Follows the fold's axes through what moves them, breadth first, to the first operator that reads axis 1."""
    left: list[tuple[str, Order]] = [(fold.output, tuple(range(len(fold.out_shape))))]
    seen: set[str] = set()
    for name, order in left:  # grows while it is gone through
        for op in readers[name]:
            if op.kind in READ_FIRST and op.inputs[0] == name and len(order) > 1:
                return order[1]
            after = None if op.name in seen else _moved(op, name, order)
            seen.add(op.name)
            if after is not None:
                left.append((op.output, after))
    return None


def _moved(op: Op, name: str, order: Order) -> Order | None:
    """The axes of the fold along those of an operator's output, None along an axis that is another; or None."""
    from pipeline.prune.rules.movement import segments

    if op.kind in PASS and len(op.out_shape) == len(order):
        return order
    if op.kind == "permute":
        return tuple(order[int(axis)] for axis in op.attrs["order"])
    if op.kind == "reshape":
        after: list[int | None] = [None] * len(op.out_shape)
        for old, new in segments(op.in_shapes[0], op.out_shape):
            if len(old) == len(new) == 1:
                after[new[0]] = order[old[0]]
        return tuple(after)
    return None
