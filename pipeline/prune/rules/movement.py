"""Data movement: labels move the way the elements do, and channel counts become constants.

reshape     axes that are merged or taken apart together are a segment, and labels move inside it. Channels that a
            reshape folds into several axes (heads x channels of a head) can only be cut as a box: the labels are
            tied over all but one of these axes: the one that a convolution behind it reads (folds.py), else the last
            one (channels of every head alike) or, where whole heads are wanted, the last but one. Labelled axes that
            are merged are frozen unless one of them is the only one that varies.
pad         adds channels of zeros with fresh labels: an addition ties them to the real channels of its other
            operand, and the pad then shrinks with them
shuffle     PixelShuffle takes r² channels for one, and ties them
unfold      a patch of k positions repeats each label k times
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.prune.labels import NONE, Ids, LabelledConstant, Labels, LabelSpace, Op

KINDS = (
    "reshape", "permute", "split", "slice", "gather", "channel_pad", "unsqueeze", "squeeze", "expand", "repeat",
    "select", "pixel_shuffle", "unfold",
)  # fmt: skip


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through an operator that moves elements without changing them."""
    labels = space.tensors[op.inputs[0]]
    if op.kind == "channel_pad":
        _pad(op, labels, space)
    elif op.kind in ("split", "slice", "gather"):
        _cut(op, labels, space)
    elif op.kind == "permute":
        order = [int(a) % len(op.out_shape) for a in op.attrs["order"]]
        space.tensors[op.output] = labels.moved({old: new for new, old in enumerate(order)})
    elif op.kind in ("expand", "repeat"):
        space.tensors[op.output] = _repeated(op, labels, space)
    elif op.kind == "select":
        _select(op, labels, space)
    elif op.kind in ("pixel_shuffle", "unfold"):
        _patches(op, labels, space)
    else:
        after = folded(op, labels, space)
        if op.kind == "reshape":
            for axis, size in enumerate(op.attrs["sizes"]):
                if size == -1 and after.at(axis) is not None:
                    space.freeze(after.at(axis), f"'{op.name}' folds them into the batch")
                    after = after.replaced(axis, None)
            ids = tuple(after.at(axis) for axis in range(len(op.out_shape)))
            space.constants.append(LabelledConstant(op.attrs["module"], "reshape", 0, ids, tuple(op.attrs["sizes"])))
        space.tensors[op.output] = after


def segments(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]]:
    """The finest runs of old and new axes of equal products."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, second = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        left, right = math.prod(old[first:i]), math.prod(new[second:j])
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                left, i = left * old[i], i + 1
        found.append((range(first, i), range(second, j)))
    return found


def folded(op: Op, labels: Labels, space: LabelSpace) -> Labels:
    """Labels of a reshaped tensor."""
    old, new = op.in_shapes[0], op.out_shape
    found: dict[int, Ids] = {}
    for before, after in segments(old, new):
        marked = [axis for axis in before if labels.at(axis) is not None]
        if len(marked) > 1:
            for axis in marked:
                space.freeze(labels.at(axis), f"'{op.name}' merges several axes that hold channels")
        if len(marked) != 1:
            continue
        ids = labels.at(marked[0])
        assert ids is not None
        inner = math.prod(old[a] for a in before if a > marked[0])
        outer = math.prod(old[a] for a in before if a < marked[0])
        table = np.tile(np.repeat(ids, inner), outer).reshape([new[a] for a in after])
        varying = [i for i in range(table.ndim) if not (table == np.take(table, [0], axis=i)).all()]
        if not varying:  # one channel, or none that can go
            at = next((i for i, a in enumerate(after) if new[a] == old[marked[0]]), None)
            if at is None:
                space.freeze(ids, f"'{op.name}' folds them into several axes")
            else:
                found[after[at]] = np.moveaxis(table, at, 0).reshape(new[after[at]], -1)[:, 0]
            continue
        own = varying[-2] if space.heads and len(varying) > 1 else varying[-1]
        wanted = op.attrs.get("channel", -1) - after[0]
        own = wanted if wanted in varying else own
        flat = np.moveaxis(table, own, 0).reshape(table.shape[own], -1)
        space.tie(np.broadcast_to(flat[:, :1], flat.shape), flat)
        found[after[own]] = flat[:, 0]
    return Labels(found)


def _repeated(op: Op, labels: Labels, space: LabelSpace) -> Labels:
    shift = len(op.out_shape) - len(op.in_shapes[0])
    found: dict[int, Ids] = {}
    for axis, ids in labels.by_axis.items():
        old, new = op.in_shapes[0][axis], op.out_shape[axis + shift]
        if op.kind == "expand" and old != new:
            space.freeze(ids, f"'{op.name}' repeats them")
        else:
            found[axis + shift] = np.tile(ids, new // old)
    return Labels(found)


def _select(op: Op, labels: Labels, space: LabelSpace) -> None:
    """x[:, 0], x[None] and the like: axes that an index takes away (`gone`), adds (`new`), or keeps in part (`cut`)."""
    gone, made, cut = set(op.attrs["gone"]), set(op.attrs["new"]), op.attrs["cut"]
    for axis in (*gone, *cut):
        space.freeze(labels.at(axis), f"'{op.name}' picks some of them by number")
    rest = iter(axis for axis in range(len(op.in_shapes[0])) if axis not in gone)
    found = {}
    for new in range(len(op.out_shape)):
        if new not in made:
            old = next(rest)
            ids = labels.at(old)
            if ids is not None:
                found[new] = ids[cut[old]] if old in cut else ids
    space.tensors[op.output] = Labels(found)


def _patches(op: Op, labels: Labels, space: LabelSpace) -> None:
    own = space.only(op, labels, (1,)).at(1)
    if own is None:
        space.tensors[op.output] = NONE
        return
    block = int(op.attrs["block"])
    if op.kind == "pixel_shuffle":
        table = own.reshape(-1, block)
        space.tie(np.broadcast_to(table[:, :1], table.shape), table)
        space.tensors[op.output] = Labels.channels(np.asarray(table[:, 0]))
    else:
        space.tensors[op.output] = Labels.channels(np.repeat(own, block))


def _cut(op: Op, labels: Labels, space: LabelSpace) -> None:
    axis, node = int(op.attrs["axis"]), str(op.attrs["module"])
    own = labels.at(axis)
    ids = space.along(op, 0, axis)

    def after(part: Ids) -> Labels:
        return labels if own is None else labels.replaced(axis, part)

    if op.kind == "split":
        pieces = np.split(ids, np.cumsum(op.attrs["sizes"])[:-1])
        for name, piece in zip(op.pieces, pieces, strict=True):
            space.tensors[name] = after(piece)
        space.constants.append(LabelledConstant(node, "split", axis, tuple(pieces)))
    elif op.kind == "slice":
        start, stop = int(op.attrs["start"]), int(op.attrs["stop"])
        space.tensors[op.output] = after(ids[start:stop])
        space.constants.append(LabelledConstant(node, "slice", axis, (ids[:start], ids[start:stop], ids[stop:])))
    else:
        indices = [int(i) for i in op.attrs["indices"]]
        space.tensors[op.output] = after(ids[indices])
        space.constants.append(LabelledConstant(node, "gather", axis, (ids,), indices=tuple(indices)))


def _pad(op: Op, labels: Labels, space: LabelSpace) -> None:
    axis, sides = int(op.attrs["axis"]), (int(op.attrs["before"]), int(op.attrs["after"]))
    inner = labels.at(axis)
    before, after = (np.full(n, -1, dtype=np.int64) if inner is None else space.fresh(n) for n in sides)
    space.tensors[op.output] = labels.replaced(axis, None if inner is None else np.concatenate([before, inner, after]))
    space.constants.append(LabelledConstant(str(op.attrs["module"]), "pad", axis, (before, after)))
