"""Running a captured graph with something put in where channels are mixed: masks, or gates that take gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.prune.labels import Reader

Touch = Callable[[Reader, Tensor], Tensor]


class TouchedRun(fx.Interpreter):
    """Runs a graph; the input of every reader passes through `touch` first.

    What `touch` is given has the samples first: where they lie along another axis (tokens first), it is moved for it,
    and where they are folded into the leading axis (windows of attention, frames joined along it), they are unfolded.
    skip: additions that give one operand only.
    """

    def __init__(
        self, graph: fx.GraphModule, readers: tuple[Reader, ...], touch: Touch, skip: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(graph)
        self.readers = {reader.op: reader for reader in readers}
        self.touch, self.skip = touch, skip or {}
        self.samples = 0

    def run(self, *args: Any, initial_env: dict[fx.Node, Any] | None = None, enable_io_processing: bool = True) -> Any:
        """What the graph gives for these inputs; the first says how many samples there are."""
        self.samples = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else 0
        return super().run(*args, initial_env=initial_env, enable_io_processing=enable_io_processing)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.skip:
            return args[self.skip[target]]
        return super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        reader = self.readers.get(n.name)
        if reader is None:
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return getattr(self, n.op)(n.target, (self._touched(reader, args[0]), *args[1:]), kwargs)

    def _touched(self, reader: Reader, x: Tensor) -> Tensor:
        if reader.samples:
            axis = reader.axis + 1 if reader.axis < reader.samples else reader.axis
            moved = dataclasses.replace(reader, axis=axis, samples=0)
            return self._touched(moved, x.movedim(reader.samples, 0)).movedim(0, reader.samples)
        folded = self.samples and reader.axis and len(x) > self.samples and len(x) % self.samples == 0
        if not folded:
            return self.touch(reader, x)
        open_ = dataclasses.replace(reader, axis=reader.axis + 1)
        if reader.stacked:
            apart = x.reshape(-1, self.samples, *x.shape[1:]).transpose(0, 1)
            return self.touch(open_, apart).transpose(0, 1).flatten(0, 1)
        return self.touch(open_, x.reshape(self.samples, -1, *x.shape[1:])).flatten(0, 1)


class MaskedRun(TouchedRun):
    """Runs a graph with some units gone at every reader: zeroed, or left out of its statistics (`Reader.how`)."""

    def __init__(
        self, graph: fx.GraphModule, readers: tuple[Reader, ...], keep: Tensor, skip: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(graph, readers, self._mask, skip)
        self.keep = keep

    def _vector(self, reader: Reader, x: Tensor) -> Tensor:
        mask = self.keep[torch.from_numpy(reader.ids).long()].to(x.dtype)
        view = [1] * x.dim()
        view[reader.axis] = -1
        return mask.reshape(view)

    def _mask(self, reader: Reader, x: Tensor) -> Tensor:
        mask = self._vector(reader, x)
        if reader.how in FILLS:
            return x.masked_fill(mask == 0, FILLS[reader.how])
        return x * mask

    def run_node(self, n: fx.Node) -> Any:
        reader = self.readers.get(n.name)
        if reader is not None and reader.how == "statistics":
            (x, *_), _ = self.fetch_args_kwargs_from_env(n)
            module = self.submodules[str(n.target)]
            assert isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)
            return masked_norm(module, x, self._vector(reader, x))
        result = super().run_node(n)
        if reader is not None and reader.how == "mean":
            kept = self.keep[torch.from_numpy(reader.ids).long()]
            return result * (kept.numel() / kept.sum())
        return result


FILLS = {"softmax": -math.inf, "amax": -math.inf, "amin": math.inf}


def masked_norm(module: nn.LayerNorm | nn.GroupNorm | nn.RMSNorm, x: Tensor, mask: Tensor) -> Tensor:
    """A norm over channels whose statistics see only the unmasked ones.

    x (N, …), mask broadcastable to x. An RMS norm takes no mean away.
    """
    mask = mask.expand_as(x)
    if isinstance(module, nn.GroupNorm):
        folded = (x.shape[0], module.num_groups, -1)
        y = _standardised(x.reshape(folded), mask.reshape(folded), (2,), module.eps).reshape(x.shape)
        view = [1, -1] + [1] * (x.dim() - 2)
    else:
        axes = tuple(range(x.dim() - len(module.normalized_shape), x.dim()))
        eps = module.eps if module.eps is not None else torch.finfo(x.dtype).eps
        y = _standardised(x, mask, axes, eps, centred=isinstance(module, nn.LayerNorm))
        view = [1] * axes[0] + list(module.normalized_shape)
    if module.weight is not None:
        y = y * module.weight.reshape(view)
    bias = getattr(module, "bias", None)
    return y if bias is None else y + bias.reshape(view)


def _standardised(x: Tensor, mask: Tensor, axes: tuple[int, ...], eps: float, *, centred: bool = True) -> Tensor:
    count = mask.sum(axes, keepdim=True)
    mean = (x * mask).sum(axes, keepdim=True) / count if centred else torch.zeros_like(count)
    variance = ((x - mean) ** 2 * mask).sum(axes, keepdim=True) / count
    return (x - mean) / torch.sqrt(variance + eps)
