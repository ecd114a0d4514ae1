"""How a network's weights lie in memory: with all channels of a place side by side (NHWC), which is faster.

A convolution hands the layout of its weight on to what it gives, so that everything behind it runs in it. Outputs are
those of any other layout but for rounding. benchmarks/layout.py says what it is worth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def channels_last(module: nn.Module) -> None:
    """Lay the weights of all 2-D convolutions out with channels last, in place."""
    _lay(module, torch.channels_last)


def channels_first(module: nn.Module) -> None:
    """Lay them out as torch makes them."""
    _lay(module, torch.contiguous_format)


def _lay(module: nn.Module, layout: torch.memory_format) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)


def as_before(cut: Tensor, whole: Tensor) -> Tensor:
    """A copy of what is left of a tensor, in that tensor's layout."""
    last = whole.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last) and not whole.is_contiguous()
    return cut.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
