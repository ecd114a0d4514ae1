"""Channel labels: every channel of every tensor carries one, operators tie them, what is tied goes together.

A label is an integer. A tensor's labels vary over a few of its axes only (for a feature map over axis 1), so they are
kept as an array over these axes. Rules (`rules/`) hand out fresh labels, tie pairs, freeze what must stay, and say
which parameter axes and which constants a label touches. The connected components of the ties are the units.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Labels of one tensor: `ids` has the sizes of `axes` (ascending, the batch axis never among them)."""

    axes: tuple[int, ...]
    ids: Ids

    @classmethod
    def channels(cls, ids: Ids, axis: int = 1) -> Labels:
        """Labels that vary over one axis."""
        return cls((axis,), np.asarray(ids, dtype=np.int64))

    def full(self, shape: Sequence[int]) -> Ids:
        """Labels of every element of a tensor of this shape with a batch of one; unlabelled tensors give -1."""
        view = [1] * len(shape)
        for axis, size in zip(self.axes, self.ids.shape, strict=True):
            view[axis] = size
        return np.broadcast_to(self.ids.reshape(view), (1, *shape[1:]))

    @classmethod
    def compress(cls, full: Ids) -> Labels:
        """Inverse of `full`: drops the axes over which nothing varies."""
        axes, ids = [], full
        for axis in range(1, full.ndim):
            head = np.take(ids, [0], axis=axis)
            if full.shape[axis] > 1 and bool((ids == head).all()):
                ids = head
            elif full.shape[axis] > 1:
                axes.append(axis)
        return cls(tuple(axes), np.ascontiguousarray(ids.reshape([ids.shape[a] for a in axes])).astype(np.int64))

    @property
    def axis(self) -> int | None:
        """The only axis over which labels vary, or None where there are more or fewer."""
        return self.axes[0] if len(self.axes) == 1 else None


NONE = Labels((), np.array(-1, dtype=np.int64))


@dataclass(frozen=True)
class Reader:
    """An operator that mixes channels: the place where a channel that goes is felt. ids: labels along `axis`."""

    op: str
    input: int
    axis: int
    ids: Ids


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
    """Where rules leave what they find: labels of tensors, ties, frozen labels, parameter axes, constants, readers."""

    def __init__(self) -> None:
        self.tensors: dict[str, Labels] = {}
        self.params: dict[tuple[str, int], Ids] = {}
        self.produced: set[tuple[str, int]] = set()
        self.constants: list[LabelledConstant] = []
        self.readers: list[Reader] = []
        self.frozen: list[tuple[Ids, str]] = []
        self._ties: list[tuple[Ids, Ids]] = []
        self._count = 0

    def fresh(self, n: int) -> Ids:
        """n labels that nothing is tied to yet."""
        ids = np.arange(self._count, self._count + n, dtype=np.int64)
        self._count += n
        return ids

    def tie(self, a: Ids, b: Ids) -> None:
        """Labels at the same position belong to one unit. -1 on either side ties nothing."""
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if both.any():
            self._ties.append((a[both].ravel(), b[both].ravel()))

    def freeze(self, labels: Labels | Ids, reason: str) -> None:
        """These labels are never cut."""
        ids = labels.ids if isinstance(labels, Labels) else labels
        ids = np.unique(ids)
        ids = ids[ids >= 0]
        if ids.size:
            self.frozen.append((ids, reason))

    def param(self, name: str, axis: int, ids: Ids) -> None:
        """The axis of a parameter carries these labels; a parameter that is shared ties them."""
        known = self.params.get((name, axis))
        if known is None:
            self.params[name, axis] = ids
        else:
            self.tie(known, ids)

    def produce(self, name: str, axis: int, n: int) -> Ids:
        """n fresh labels, made by this axis of a weight."""
        ids = self.fresh(n)
        self.param(name, axis, ids)
        self.produced.add((name, axis))
        return ids

    def along(self, op: Op, index: int, axis: int) -> Ids:
        """Labels of an input along one axis; what varies over other axes is frozen, since the operator mixes them."""
        labels = self.tensors[op.inputs[index]]
        size = op.in_shapes[index][axis]
        if labels.axes == (axis,):
            return labels.ids
        if labels.axes:
            self.freeze(labels, f"'{op.name}' ({op.kind}) reads its channels along several axes")
        return np.full(size, -1, dtype=np.int64)

    def read(self, op: Op, index: int, axis: int) -> Ids:
        """`along`, and the operator is noted as a reader of these channels."""
        ids = self.along(op, index, axis)
        self.readers.append(Reader(op.name, index, axis, ids))
        return ids

    def units(self) -> Ids:
        """Component number of every label, shape (labels,)."""
        if not self._count:
            return np.zeros(0, dtype=np.int64)
        left = np.concatenate([a for a, _ in self._ties]) if self._ties else np.zeros(0, dtype=np.int64)
        right = np.concatenate([b for _, b in self._ties]) if self._ties else np.zeros(0, dtype=np.int64)
        graph = coo_array((np.ones(left.size, dtype=np.int8), (left, right)), shape=(self._count, self._count))
        return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)
