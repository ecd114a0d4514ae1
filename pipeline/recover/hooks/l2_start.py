"""Keeps the weights near where the repair left them.

    extra = 1/2 · Σ ‖w − w_start‖²   over all weights of two or more axes

The repair's least-squares solution is a good start that a large learning rate forgets; the term pulls back to it
(L2-SP: Li, Grandvalet and Davoine 2018, Explicit Inductive Bias for Transfer Learning with Convolutional Networks).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.recover.hooks.base import TrainHook


class Hook(TrainHook):
    """Half the squared distance from the start."""

    strength = 0.01

    def __init__(self) -> None:
        self._start: dict[str, Tensor] = {}

    def start(self, module: nn.Module, dense: nn.Module) -> None:
        """Remember the weights of the repaired network."""
        self._start = {name: p.detach().clone() for name, p in module.named_parameters() if p.ndim > 1}

    def extra_loss(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any, targets: Any) -> Tensor:
        """The distance of all weights from their start."""
        moved = [(p - self._start[name]).square().sum() for name, p in module.named_parameters() if name in self._start]
        return torch.stack(moved).sum() / 2

    def stop(self) -> None:
        """Forget them."""
        self._start = {}
