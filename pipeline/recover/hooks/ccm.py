"""CCM: rewards channels whose maps are correlated, so that more of them become combinations of others.

    extra = − Σ_layers mean_{i, j} |corr(F_i, F_j)|,      F_i = map of channel i, averaged over the batch

Wang et al., Enhanced Linear Representation Redundancy, 2023 (the sign, the average over the batch and over all pairs,
and maps after every ReLU, as in their code; their λ is the strength, 0.004 to 0.05). Redundancy is gathered, and a
criterion such as `independence` then finds channels that the rest can make up.

ReLUs are found where they run: while the network computes, every call of a ReLU (ReLU6 is one) passes through a torch
function mode, whether it comes from a module, from a function, from a method or from a captured graph. The mode is
entered by a hook before the network's forward and left by one behind it. Averaged at once, a map costs one image's
memory. Axis 1 is taken for the channels; outputs of less than two positions a channel (behind a pooling or a linear
layer) are no maps. A channel that does not vary has correlation 0. Nothing is kept where gradients are off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from pipeline.recover.hooks.base import TrainHook
from profiles.errors import UsageError

SILENT = 1e-8
"""Added to a map's sum of squares, so that rounding in a constant map is no pattern."""

RELUS = {F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class Hook(TrainHook):
    """Minus the mean absolute correlation of channel maps, summed over all ReLUs."""

    strength = 0.01

    def __init__(self) -> None:
        self._maps: list[Tensor] = []
        self._attached: list[RemovableHandle] = []

    def start(self, module: nn.Module, dense: nn.Module) -> None:
        """Watch the network's ReLUs."""
        before, behind = _watching(self._maps)
        self._attached = [
            module.register_forward_pre_hook(before),
            module.register_forward_hook(behind, always_call=True),
        ]

    def extra_loss(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any, targets: Any) -> Tensor:
        """The term for the maps of the last forward. Raises UsageError for a network without ReLU maps."""
        if not self._maps:
            raise UsageError(
                "the hook 'ccm' found no map behind a ReLU in this network.", "take it out of recover.hooks."
            )
        terms = [correlation(maps) for maps in self._maps]
        self._maps.clear()
        return -torch.stack(terms).sum()

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._attached:
            handle.remove()
        self._attached = []
        self._maps.clear()


def correlation(maps: Tensor) -> Tensor:
    """Mean absolute correlation over all pairs of channels of maps (C, spatial…), each with itself included."""
    rows = maps.flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / (rows.square().sum(1, keepdim=True) + SILENT).sqrt()
    return (rows @ rows.T).abs().mean()


class _Relus(TorchFunctionMode):
    """Keeps the batch means of what ReLUs give."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def __torch_function__(
        self, func: Any, types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kept = _is_relu(func, args, kwargs or {}) and torch.is_grad_enabled()
        if kept and result.dim() > 2 and result[0, 0].numel() > 1:
            self.maps.append(result.mean(0))
        return result


def _is_relu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A ReLU, or the clipping from 0 on that the module ReLU6 is."""
    return func in RELUS or (func is F.hardtanh and kwargs.get("min_val", (*args, -1.0, -1.0)[1]) == 0)


def _watching(maps: list[Tensor]) -> tuple[Callable[[nn.Module, Any], None], Callable[[nn.Module, Any, Any], None]]:
    """Forward hooks that fill the list. Functions, not methods: a copy of the network then shares them."""
    mode = _Relus(maps)

    def before(module: nn.Module, args: Any) -> None:
        maps.clear()
        mode.__enter__()  # type: ignore[no-untyped-call]

    def behind(module: nn.Module, args: Any, result: Any) -> None:
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return before, behind
