"""The loss that pulls a pruned network towards the dense one.

Classification (logits of shape (N, C) with integer targets of shape (N,)), after Hinton, Vinyals and Dean 2015:

    loss = alpha · T² · KL(softmax(teacher / T) ‖ softmax(student / T)) + (1 − alpha) · task loss

Anything else: the mean squared difference of the outputs over the variance of the teacher's, in the place of the KL
term; several outputs are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.outputs import tensors

TaskLoss = Callable[[Any, Any], Tensor]


def distil(outputs: Any, teacher: Any, targets: Any, loss: TaskLoss, *, alpha: float, temperature: float) -> Tensor:
    """Scalar loss of a batch. outputs, teacher: a tensor or a tuple of tensors, of the same shapes.

    teacher: not looked at where alpha is 0.
    """
    pull = imitation(outputs, teacher, targets, temperature) if alpha > 0 else tensors(outputs)[0].new_zeros(())
    task = loss(outputs, targets) if alpha < 1 else pull.new_zeros(())
    return alpha * pull + (1 - alpha) * task


def imitation(outputs: Any, teacher: Any, targets: Any, temperature: float) -> Tensor:
    """The distillation term alone."""
    if _classifies(outputs, targets):
        student = nn.functional.log_softmax(outputs / temperature, dim=1)
        wanted = nn.functional.log_softmax(teacher / temperature, dim=1)
        return nn.functional.kl_div(student, wanted, reduction="batchmean", log_target=True) * temperature**2
    pairs = zip(tensors(outputs), tensors(teacher), strict=True)
    terms = [
        (mine - theirs).square().mean() / theirs.var().clamp_min(1e-12)
        for mine, theirs in pairs
        if theirs.is_floating_point()  # what is chosen by scores has no distance
    ]
    return torch.stack(terms).mean()


def _classifies(outputs: Any, targets: Any) -> bool:
    integer = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
    return integer and isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1
