"""The contract of a train hook: a term that a recovery adds to its loss.

A plug-in is one file with a class `Hook(TrainHook)` that takes no arguments. Its life: made, `start` once with the
network as it is before its first step (also when a recovery is resumed, or starts over), `extra_loss` at every step,
`stop` once, whatever happened. All that a hook remembers follows from what `start` was given: that is what makes a
resumed recovery equal to one that was never stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn


class TrainHook(ABC):
    """A term of the loss with a lifecycle. strength: what the training multiplies it by, unless asked for another."""

    strength: ClassVar[float] = 1.0

    def start(self, module: nn.Module, dense: nn.Module) -> None:  # noqa: B027  (most hooks have nothing to prepare)
        """Look at the repaired network and its dense teacher; attach torch hooks here if any are needed."""

    @abstractmethod
    def extra_loss(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any, targets: Any) -> Tensor:
        """Scalar that is added, times a strength, to the loss of this batch.

        inputs: batch first; outputs: as the module gave them.
        """

    def stop(self) -> None:  # noqa: B027
        """Detach what `start` attached."""
