"""Products of activations: matmul, einsum and scaled dot-product attention.

    matmul      y[…, i, j] = Σ_k a[…, i, k] b[…, k, j]: the k of both operands are tied and read, i and j pass
    attention   softmax(s q kᵀ + mask) v: the channels of q and k are tied and read, those of v pass, heads are tied
    einsum      equal letters are tied, a letter that is summed is read

The scale s is a number in the captured graph: attention over d channels of which some go keeps 1 / √d of the dense
network, so that cutting channels of q and k is the same as zeroing them. Attention across channels (softmax over the
channels of k, as in EdgeNeXt and XCiT) is two matmuls with a softmax between: see pooling.py for what changes there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.prune.labels import Ids, Labels, LabelSpace, Op

KINDS = ("matmul", "attention", "einsum")


def apply(op: Op, space: LabelSpace) -> None:
    """Propagate labels through a product of activations."""
    _mark_weights(op, space)
    if op.kind == "einsum":
        _einsum(op, space)
    elif op.kind == "matmul":
        _matmul(op, space)
    else:
        _attention(op, space)


def _mark_weights(op: Op, space: LabelSpace) -> None:
    """A parameter that is multiplied makes the channels of its axes."""
    for name in op.inputs:
        if name in space.direct:
            space.produced |= {(space.direct[name], axis) for axis in space.tensors[name].axes}


def _contract(op: Op, space: LabelSpace, axis: int, others: Sequence[Ids | None]) -> None:
    """Read the first operand along an axis whose labels must be those of the others."""
    own = space.tensors[op.inputs[0]].at(axis)
    every = [own, *others]
    labelled = [ids for ids in every if ids is not None]
    for ids in labelled:
        if len(labelled) == len(every):
            space.tie(labelled[0], ids)
        else:
            space.freeze(ids, f"'{op.name}' multiplies them with channels that stay")
    if own is not None:
        space.read(op, axis)


def _leading(op: Op, space: LabelSpace, parts: Sequence[tuple[Labels, tuple[int, ...]]], rank: int) -> Labels:
    shape = op.out_shape[: len(op.out_shape) - rank]
    cut = [
        (Labels({a: ids for a, ids in labels.by_axis.items() if a < len(own) - rank}), own[: len(own) - rank])
        for labels, own in parts
    ]
    return space.joined(op, cut, shape)


def _matmul(op: Op, space: LabelSpace) -> None:
    (left, right), (a, b) = (space.tensors[name] for name in op.inputs), op.in_shapes
    if len(a) < 2 or len(b) < 2:
        for labels in (left, right):
            space.freeze(labels, f"'{op.name}' multiplies a vector")
        space.tensors[op.output] = Labels()
        return
    _contract(op, space, len(a) - 1, [right.at(len(b) - 2)])
    result = _leading(op, space, [(left, a), (right, b)], 2)
    rank = len(op.out_shape)
    result = result.replaced(rank - 2, left.at(len(a) - 2))
    space.tensors[op.output] = result.replaced(rank - 1, right.at(len(b) - 1))


def _attention(op: Op, space: LabelSpace) -> None:
    q, k, v = (space.tensors[name] for name in op.inputs[:3])
    sq, sk, sv = op.in_shapes[:3]
    _contract(op, space, len(sq) - 1, [k.at(len(sk) - 1)])
    for labels, shape in ((k, sk), (v, sv)):
        space.freeze(labels.at(len(shape) - 2), f"'{op.name}' attends over them")
    result = _leading(op, space, [(q, sq), (k, sk), (v, sv)], 2)
    if len(op.inputs) > 3:
        mask, shape = space.tensors[op.inputs[3]], op.in_shapes[3]
        for axis in (len(shape) - 1, len(shape) - 2):
            space.freeze(mask.at(axis), f"'{op.name}' is masked by them")
        if len(shape) > 2:
            result = space.joined(
                op, [(result, op.out_shape[:-2]), (_leading_of(mask, shape), shape[:-2])], op.out_shape[:-2]
            )
    rank = len(op.out_shape)
    result = result.replaced(rank - 2, q.at(len(sq) - 2))
    space.tensors[op.output] = result.replaced(rank - 1, v.at(len(sv) - 1))


def _leading_of(labels: Labels, shape: tuple[int, ...]) -> Labels:
    return Labels({a: ids for a, ids in labels.by_axis.items() if a < len(shape) - 2})


def _einsum(op: Op, space: LabelSpace) -> None:
    left, right = str(op.attrs["equation"]).split("->")
    terms = left.split(",")
    labels: dict[str, list[Ids | None]] = {}
    for term, name in zip(terms, op.inputs, strict=True):
        for axis, letter in enumerate(term):
            labels.setdefault(letter, []).append(space.tensors[name].at(axis))
    read = False
    found: dict[int, Ids] = {}
    for letter, every in labels.items():
        known = [ids for ids in every if ids is not None]
        if not known:
            continue
        merged = np.maximum.reduce(known)
        summed = letter not in right
        bad = len(known) < len(every) or (summed and (read or letter not in terms[0])) or terms[0].count(letter) > 1
        for ids in known:
            space.tie(merged, ids)
            if bad:
                space.freeze(ids, f"'{op.name}' multiplies them with channels that stay")
        if summed and not bad:
            space.read(op, terms[0].index(letter))
            read = True
        elif not summed:
            found[right.index(letter)] = merged
    space.tensors[op.output] = Labels(found)
