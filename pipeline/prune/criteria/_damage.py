"""What criteria that change a network and watch its loss share: the loss of the change, and how much work they may ask.

The loss is the project's where the calibration data has labels. Without them it is the divergence from the dense
network's outputs: for logits KL(dense ‖ changed), which is the cross-entropy averaged over all labels that the dense
network would draw, less a constant. Unlike the loss of the labels themselves it is least for the dense network.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pipeline.nouns import Topology
from pipeline.prune.evidence import Answers, Evidence, divergence, joined

Batch = tuple[tuple[Tensor, ...], Tensor | None, Answers]
"""Inputs, targets or None, and what the dense network says, of the same samples."""


class Shelf:
    """All calibration samples with their targets and dense outputs, from which batches are taken by index."""

    def __init__(self, evidence: Evidence) -> None:
        self.inputs = evidence.samples.joined()
        self.targets = evidence.samples.targets
        self.dense = joined(evidence.outputs)

    def __len__(self) -> int:
        return len(self.dense[0])

    def take(self, chosen: Tensor) -> Batch:
        """The samples with these indices."""
        return (
            tuple(x[chosen] for x in self.inputs),
            None if self.targets is None else self.targets[chosen],
            tuple(each[chosen] for each in self.dense),
        )


def damage(evidence: Evidence, outputs: Any, targets: Tensor | None, dense: Answers) -> Tensor:
    """Mean loss over a batch: the project's where there are targets, else the divergence from the dense outputs."""
    if targets is not None:
        return evidence.task_loss(outputs, targets)
    return divergence(evidence.answers(outputs, len(dense[0])), dense).mean()


def macs(topology: Topology) -> int:
    """Multiplications that one sample costs."""
    return sum(math.prod(layer.shape) * layer.positions for layer in topology.layers)
