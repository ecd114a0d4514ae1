"""The padded shortcut of the CIFAR ResNets written as a fixed 1x1 convolution, which Torch-Pruning can prune.

Its weights are 0 and 1: output channel `pad + i` is input channel `i`, at every second position. Outputs are identical.
They are never trained: that would be a projection that the others do not have.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.nets import BasicBlock


class Selecting(nn.Module):
    """A block of nets.py whose shortcut selects channels by a convolution."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        inputs, outputs = block.conv1.in_channels, block.conv2.out_channels
        self.select = nn.Conv2d(inputs, outputs, 1, block.stride, bias=False)
        weight = torch.zeros_like(self.select.weight)
        weight[block.pad : block.pad + inputs, :, 0, 0] = torch.eye(inputs)
        self.select.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of branch and selected channels."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.select(x))


def freed(model: nn.Module) -> nn.Module:
    """A copy whose padded shortcuts are convolutions."""
    found = copy.deepcopy(model)
    for stage in list(found.modules()):
        for name, block in list(stage.named_children()):
            if isinstance(block, nn.Module) and getattr(block, "pad", False) and hasattr(block, "conv2"):
                setattr(stage, name, Selecting(block).train(block.training))  # type: ignore[arg-type]
    return fixed(found)


def fixed(model: nn.Module, *, still: bool = True) -> nn.Module:
    """The same network, its selections left out of training; with still=False they get gradients."""
    for module in model.modules():
        if hasattr(module, "select"):
            module.select.weight.requires_grad_(not still)  # type: ignore[union-attr]
    return model
