"""What rankings are made from, each computed once and shared: calibration batches, outputs, losses, gate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.nouns import Topology
from pipeline.prune.capture import Network
from pipeline.prune.execute import TouchedRun
from pipeline.prune.labels import Reader

Loss = Callable[..., Tensor]
"""(outputs, targets) -> scalar mean over the batch."""


@dataclass(frozen=True)
class Samples:
    """Calibration samples. inputs: a tuple for each batch, a tensor an input. targets: of all in order, or None."""

    inputs: Sequence[tuple[Tensor, ...]]
    targets: Tensor | None = None

    @property
    def count(self) -> int:
        """Samples in all batches."""
        return sum(len(batch[0]) for batch in self.inputs)

    def first(self, limit: int) -> Samples:
        """The first samples, cut inside a batch where needed."""
        batches, room = [], limit
        for batch in self.inputs:
            if room <= 0:
                break
            batches.append(tuple(x[:room] for x in batch))
            room -= len(batch[0])
        return Samples(batches, None if self.targets is None else self.targets[: min(limit, self.count)])

    def joined(self) -> tuple[Tensor, ...]:
        """All samples as one batch."""
        return tuple(torch.cat(column) for column in zip(*self.inputs, strict=True))


def divergence(outputs: Tensor, dense: Tensor) -> Tensor:
    """How far outputs are from the dense network's, per sample, shape (N,).

    Logits (N, K > 1): KL(softmax dense ‖ softmax outputs) in nats. Everything else: squared error relative to the
    variance of the dense outputs.
    """
    if dense.dim() == 2 and dense.shape[1] > 1:
        return F.kl_div(F.log_softmax(outputs, 1), F.log_softmax(dense, 1), reduction="none", log_target=True).sum(1)
    error = (outputs - dense).flatten(1).square().mean(1)
    return error / dense.flatten(1).var().clamp_min(1e-12)


@dataclass(frozen=True)
class Evidence:
    """The shared evidence of one network.

    units: number of unit ids. loss: the project's, None for its default (cross-entropy).
    """

    network: Network
    samples: Samples
    loss: Loss | None = None
    seed: int = 0

    @property
    def topology(self) -> Topology:
        """The network's topology."""
        return self.network.topology

    @property
    def units(self) -> int:
        """One more than the largest unit id."""
        return max((max(g.units) for g in self.topology.groups if g.units), default=-1) + 1

    @cached_property
    def gate_gradients(self) -> Tensor:
        """∂L_n/∂m_i for every sample n and unit i, shape (samples, units).

        The gates on all readers of a unit are summed (the chain rule). Without targets the loss is that of labels
        drawn from the network's own predictions (the Fisher information of the model itself); outputs that are no
        logits take a random read-out of unit variance.
        """
        rows, start = [], 0
        source = torch.Generator().manual_seed(self.seed)
        for batch in self.samples.inputs:
            size = len(batch[0])
            targets = None if self.samples.targets is None else self.samples.targets[start : start + size]
            rows.append(_gate_gradients(self.network, batch, targets, self.loss, self.units, source))
            start += size
        return torch.cat(rows)


def _gate_gradients(
    network: Network,
    batch: tuple[Tensor, ...],
    targets: Tensor | None,
    loss: Loss | None,
    units: int,
    source: torch.Generator,
) -> Tensor:
    taken: list[tuple[Reader, Tensor]] = []

    def tap(reader: Reader, x: Tensor) -> Tensor:
        tapped = x.detach().requires_grad_() if not x.requires_grad else x.view_as(x)
        tapped.retain_grad()
        taken.append((reader, tapped))
        return tapped

    outputs = TouchedRun(network.graph, network.readers, tap).run(*batch)
    value = _loss(outputs, targets, loss, source)
    value.backward()  # type: ignore[no-untyped-call]
    size = len(batch[0])
    result = torch.zeros(size, units + 1)
    for reader, x in taken:
        if x.grad is None:
            continue
        product = (
            (x.grad * x).detach().movedim(reader.axis, 1).flatten(2)
            if x.dim() > 2
            else (x.grad * x).detach().unsqueeze(2)
        )
        columns = torch.from_numpy(reader.ids).long()
        result.index_add_(1, torch.where(columns < 0, units, columns), product.sum(2) * size)
    return result[:, :units]


def _loss(
    outputs: Tensor | Sequence[Tensor], targets: Tensor | None, loss: Loss | None, source: torch.Generator
) -> Tensor:
    if targets is not None and loss is not None:
        return loss(outputs, targets)
    if targets is not None and isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, targets)
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    if first.dim() == 2 and first.shape[1] > 1:
        own = torch.multinomial(first.detach().softmax(1), 1, generator=source).squeeze(1)
        return F.cross_entropy(first, own)
    readout = torch.randn(first.shape, generator=source)
    return (first * readout).flatten(1).sum(1).mean()
