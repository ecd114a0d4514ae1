"""Running a captured graph with something put in where channels are mixed: masks, or gates that take gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.prune.labels import Reader

Touch = Callable[[Reader, Tensor], Tensor]


class TouchedRun(fx.Interpreter):
    """Runs a graph; the input of every reader passes through `touch` first.

    skip: additions that give one operand only.
    """

    def __init__(
        self, graph: fx.GraphModule, readers: tuple[Reader, ...], touch: Touch, skip: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(graph)
        self.readers = {reader.op: reader for reader in readers}
        self.touch, self.skip = touch, skip or {}

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
            touched = self.touch(reader, args[0])
            return getattr(self, n.op)(n.target, (touched, *args[1:]), kwargs)


class MaskedRun(TouchedRun):
    """Runs a graph with some units zeroed at every reader; norms over channels take their statistics over the rest."""

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
        return x * self._vector(reader, x)

    def run_node(self, n: fx.Node) -> Any:
        reader = self.readers.get(n.name)
        module = self.submodules.get(str(n.target)) if n.op == "call_module" else None
        if reader is None or not isinstance(module, nn.LayerNorm | nn.GroupNorm):
            return super().run_node(n)
        (x, *_), _ = self.fetch_args_kwargs_from_env(n)
        return masked_norm(module, x, self._vector(reader, x))


def masked_norm(module: nn.LayerNorm | nn.GroupNorm, x: Tensor, mask: Tensor) -> Tensor:
    """A layer or group norm whose mean and variance see only the unmasked channels.

    x (N, …), mask broadcastable to x.
    """
    mask = mask.expand_as(x)
    if isinstance(module, nn.LayerNorm):
        y = _standardised(x, mask, x.dim() - 1, module.eps)
        view = [1] * (x.dim() - 1) + [-1]
    else:
        folded = (x.shape[0], module.num_groups, -1)
        y = _standardised(x.reshape(folded), mask.reshape(folded), 2, module.eps).reshape(x.shape)
        view = [1, -1] + [1] * (x.dim() - 2)
    if module.weight is not None:
        y = y * module.weight.reshape(view)
    if module.bias is not None:
        y = y + module.bias.reshape(view)
    return y


def _standardised(x: Tensor, mask: Tensor, axis: int, eps: float) -> Tensor:
    count = mask.sum(axis, keepdim=True)
    mean = (x * mask).sum(axis, keepdim=True) / count
    variance = ((x - mean) ** 2 * mask).sum(axis, keepdim=True) / count
    return (x - mean) / torch.sqrt(variance + eps)
