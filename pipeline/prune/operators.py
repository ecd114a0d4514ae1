"""Operations that count or index channels, as leaf modules with names: their numbers are data that surgery rewrites.

In a captured graph each of them is a module at the root (`channel_pad_0`, `residual_add_3`, …), so the ONNX node that
the exporter makes of it carries the same name as its scope.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResidualAdd(nn.Module):
    """Sum of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Reshape(nn.Module):
    """Reshape that keeps the batch axis; sizes: the target shape without it."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(int(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape((-1, *self.sizes))

    def extra_repr(self) -> str:
        return f"{self.sizes}"


class ChannelPad(nn.Module):
    """Adds channels of zeros before and after along one axis."""

    def __init__(self, before: int, after: int, axis: int) -> None:
        super().__init__()
        self.before, self.after, self.axis = before, after, axis

    def forward(self, x: Tensor) -> Tensor:
        if not self.before and not self.after:
            return x
        sides = [0, 0] * (x.dim() - self.axis)
        sides[-2:] = [self.before, self.after]
        return nn.functional.pad(x, sides)

    def extra_repr(self) -> str:
        return f"{self.before}, {self.after}, axis={self.axis}"


class ChannelSplit(nn.Module):
    """Cuts one axis into pieces of given sizes."""

    def __init__(self, sizes: Sequence[int], axis: int) -> None:
        super().__init__()
        self.sizes, self.axis = tuple(int(size) for size in sizes), axis

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, list(self.sizes), self.axis)

    def extra_repr(self) -> str:
        return f"{self.sizes}, axis={self.axis}"


class ChannelSlice(nn.Module):
    """The positions start … stop - 1 of one axis."""

    def __init__(self, start: int, stop: int, axis: int) -> None:
        super().__init__()
        self.start, self.stop, self.axis = start, stop, axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.narrow(x, self.axis, self.start, self.stop - self.start)

    def extra_repr(self) -> str:
        return f"{self.start}, {self.stop}, axis={self.axis}"


class ChannelGather(nn.Module):
    """Picks positions of one axis in a given order; a channel shuffle becomes one of these."""

    indices: Tensor

    def __init__(self, indices: Sequence[int], axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", torch.tensor([int(i) for i in indices], dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, self.axis, self.indices)

    def extra_repr(self) -> str:
        return f"{len(self.indices)} positions, axis={self.axis}"
