"""Channel labels: every channel of every tensor carries one, operators tie them, what is tied goes together.

A label is an integer. Labels lie along single axes of a tensor (of a feature map along axis 1, of an attention map over
channels along two): a position goes when its label does, an axis without labels stays whole. So every cut is a box by
construction. Rules (`rules/`) hand out fresh labels, tie pairs, freeze what must stay, and say which parameter axes and
which constants a label touches. The connected components of the ties are the units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Op:
    """One operator of the captured network, in neutral terms: what rules see of it.

    inputs and output name tensors (activations, or parameters used directly). Shapes include the batch axis.
    params: role (`weight`, `bias`, `running_mean`, …) -> state-dict name. attrs: by kind (groups, axis, sizes, …).
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    in_shapes: tuple[tuple[int, ...], ...]
    out_shape: tuple[int, ...]
    params: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labels:
    """Labels of one tensor: axis -> one label for each position along it, -1 for a position that always stays."""

    by_axis: Mapping[int, Ids] = field(default_factory=dict)

    @classmethod
    def channels(cls, ids: Ids, axis: int = 1) -> Labels:
        """Labels along one axis."""
        return cls({axis: np.asarray(ids, dtype=np.int64)})

    def at(self, axis: int) -> Ids | None:
        """Labels along an axis, None where it has none."""
        return self.by_axis.get(axis)

    @property
    def axes(self) -> tuple[int, ...]:
        """The labelled axes, ascending."""
        return tuple(sorted(self.by_axis))

    @property
    def ids(self) -> Ids:
        """Labels along the only labelled axis. Raises ValueError where there are more or none."""
        (ids,) = self.by_axis.values()
        return ids

    def replaced(self, axis: int, ids: Ids | None) -> Labels:
        """The same with other labels along one axis, None for none."""
        rest = {a: own for a, own in self.by_axis.items() if a != axis}
        return Labels(rest if ids is None else rest | {axis: ids})

    def moved(self, to: Mapping[int, int]) -> Labels:
        """The same with axes renumbered; those not named are dropped."""
        return Labels({to[axis]: ids for axis, ids in self.by_axis.items() if axis in to})


NONE = Labels()


@dataclass(frozen=True)
class Reader:
    """An operator that mixes channels: the place where a channel that goes is felt. ids: labels along `axis`.

    how: what stands for a channel that is gone. "zero" almost everywhere; "statistics" where mean and variance are
    taken over the rest, "softmax" and "amax" where it is minus infinity, "amin" infinity, "mean" where the mean is
    over the rest. over: the axes of a statistic or a reduction. samples: the axis of the samples in what it reads.
    stacked: they lie there several times, all of them once and then all of them again (two frames joined along it).
    """

    op: str
    input: int
    axis: int
    ids: Ids
    how: str = "zero"
    over: tuple[int, ...] = ()
    samples: int = 0
    stacked: bool = False


@dataclass(frozen=True)
class LabelledConstant:
    """A `nouns.Constant` whose entries are still labels."""

    node: str
    kind: str
    axis: int
    ids: tuple[Ids | None, ...]
    sizes: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()


class LabelSpace:
    """Where rules leave what they find: labels of tensors, ties, frozen labels, parameter axes, constants, readers.

    aliases: name of a parameter -> the first name of the same memory. heads: in a fold of channels into several axes
    the last but one is cut (whole attention heads), else the last (channels of every head alike).
    """

    def __init__(self, aliases: Mapping[str, str] | None = None, *, heads: bool = False) -> None:
        self.aliases = dict(aliases or {})
        self.heads = heads
        self.tensors: dict[str, Labels] = {}
        self.direct: dict[str, str] = {}
        self.params: dict[tuple[str, int], Ids] = {}
        self.produced: set[tuple[str, int]] = set()
        self.constants: list[LabelledConstant] = []
        self.readers: list[Reader] = []
        self.frozen: list[tuple[Ids, str]] = []
        self._ties: list[tuple[Ids, Ids]] = []
        self._count = 0

    @property
    def count(self) -> int:
        """Labels handed out so far."""
        return self._count

    def fresh(self, n: int) -> Ids:
        """n labels that nothing is tied to yet."""
        ids = np.arange(self._count, self._count + n, dtype=np.int64)
        self._count += n
        return ids

    def tie(self, a: Ids, b: Ids, reason: str = "it is tied to channels that stay") -> None:
        """Labels at the same position belong to one unit; one beside a -1 stays."""
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self._ties.append((a[both].ravel(), b[both].ravel()))
        self.freeze(a[b < 0], reason)
        self.freeze(b[a < 0], reason)

    def freeze(self, labels: Labels | Ids | None, reason: str) -> None:
        """These labels are never cut."""
        if isinstance(labels, Labels):
            for ids in labels.by_axis.values():
                self.freeze(ids, reason)
        elif labels is not None:
            found = np.unique(labels)
            found = found[found >= 0]
            if found.size:
                self.frozen.append((found, reason))

    def param(self, name: str, axis: int, ids: Ids) -> None:
        """The axis of a parameter carries these labels; a parameter that is shared ties them."""
        first = self.aliases.get(name, name)
        known = self.params.get((first, axis))
        if known is None:
            self.params[first, axis] = ids
        else:
            self.tie(known, ids, f"'{name}' is shared with a layer whose channels stay")
        self.params.setdefault((name, axis), ids)

    def produce(self, name: str, axis: int, n: int) -> Ids:
        """n labels made by this axis of a weight: fresh ones, or those it has where the weight is shared."""
        ids = self.params.get((self.aliases.get(name, name), axis))
        if ids is None:
            ids = self.fresh(n)
        self.param(name, axis, ids)
        self.produced.add((name, axis))
        return ids

    def along(self, op: Op, index: int, axis: int) -> Ids:
        """Labels of an input along one axis, -1 where it has none."""
        ids = self.tensors[op.inputs[index]].at(axis)
        return np.full(op.in_shapes[index][axis], -1, dtype=np.int64) if ids is None else ids

    def read(self, op: Op, axis: int, how: str = "zero", over: tuple[int, ...] = ()) -> Ids:
        """`along` of the first input, and the operator is noted as a reader of these channels."""
        ids = self.along(op, 0, axis)
        self.readers.append(Reader(op.name, 0, axis, ids, how, over))
        return ids

    def only(self, op: Op, labels: Labels, axes: Sequence[int]) -> Labels:
        """Labels along these axes; those along others are frozen, since the operator works across them."""
        for axis in labels.axes:
            if axis not in axes:
                self.freeze(labels.at(axis), f"'{op.name}' ({op.kind}) works across them")
        return Labels({axis: ids for axis, ids in labels.by_axis.items() if axis in axes})

    def joined(self, op: Op, operands: Sequence[tuple[Labels, Sequence[int]]], shape: Sequence[int]) -> Labels:
        """Labels of operands of given shapes that are broadcast to `shape`, tied position by position."""
        found: dict[int, Ids] = {}
        for axis, size in enumerate(shape):
            parts: list[Ids | None] = []
            for labels, own in operands:
                at = axis - (len(shape) - len(own))
                if at < 0:
                    continue
                if own[at] == 1 and size != 1:
                    self.freeze(labels.at(at), f"'{op.name}' broadcasts it over other channels")
                else:
                    parts.append(labels.at(at))
            labelled = [ids for ids in parts if ids is not None]
            if not labelled:
                continue
            reason = f"'{op.name}' joins them with channels that stay"
            if len(labelled) < len(parts):
                for ids in labelled:
                    self.freeze(ids, reason)
                continue
            found[axis] = np.maximum.reduce(labelled)
            for ids in labelled:
                self.tie(found[axis], ids, reason)
        return Labels(found)

    def units(self) -> Ids:
        """Component number of every label, shape (labels,)."""
        if not self._count:
            return np.zeros(0, dtype=np.int64)
        left = np.concatenate([a for a, _ in self._ties]) if self._ties else np.zeros(0, dtype=np.int64)
        right = np.concatenate([b for _, b in self._ties]) if self._ties else np.zeros(0, dtype=np.int64)
        graph = coo_array((np.ones(left.size, dtype=np.int8), (left, right)), shape=(self._count, self._count))
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)
