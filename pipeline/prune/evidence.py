"""What rankings are made from, each computed once and shared: samples, outputs, losses, gate gradients, maps, Grams."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.nouns import Topology
from pipeline.outputs import tensors
from pipeline.prune.capture import Network
from pipeline.prune.execute import TouchedRun
from pipeline.prune.labels import Reader
from pipeline.prune.maps import Gram, Maps, affordable, grams, maps
from profiles.errors import DeployError

MAP_SAMPLES = 64

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
        return joined(self.inputs)

    def digest(self) -> str:
        """SHA-256 of the samples and their targets, 64 hex digits; batches do not count."""
        total = hashlib.sha256()
        for value in (*self.joined(), *([] if self.targets is None else [self.targets])):
            total.update(f"{value.dtype} {list(value.shape)}\0".encode())
            total.update(value.contiguous().numpy().data)
        return total.hexdigest()


Answers = tuple[Tensor, ...]
"""All that a network says of some samples, an entry an output, the samples along the first axis of each."""


def answers(outputs: Any, count: int, axes: Sequence[int | None] = ()) -> Answers:
    """What the outputs of a network say of so many samples. axes: `Network.answers`.

    Outputs that do not depend on the samples (fixed anchors) and indices, which have no distance, are left out. Raises
    DeployError where nothing is left.
    """
    found, given = [], tensors(outputs)
    for each, axis in zip(given, axes or [0] * len(given), strict=True):
        if axis is not None and each.is_floating_point():
            turned = each.movedim(axis, 0)
            found.append(turned if len(turned) == count else turned.reshape(count, -1, *turned.shape[1:]))
    if not found:
        shapes = ", ".join(f"{list(each.shape)} of {str(each.dtype).removeprefix('torch.')}" for each in given)
        raise DeployError(
            f"the network gives no scores of its samples, only {shapes or 'no tensors'}.",
            "let it return what it chooses by, not what it chose.",
        )
    return tuple(found)


@torch.no_grad()
def require_scores(network: Network) -> None:
    """Raise DeployError for outputs that cannot be compared sample by sample with those of a cut network."""
    outputs, count = network.graph(*network.example), len(network.example[0])
    answers(outputs, count, network.answers)
    for number, (each, axis) in enumerate(zip(tensors(outputs), network.answers, strict=True), 1):
        if axis != 0 and each.shape[:1] != (1,):
            raise DeployError(
                f"output {number} of the network has the shape {list(each.shape)} for {count} samples: they do not lie "
                "along its first axis, as a device gives them.",
                "return it with the samples first, or leave it out where it is the same for all of them.",
            )


def divergence(outputs: Answers, dense: Answers) -> Tensor:
    """How far outputs are from the dense network's, per sample, shape (N,).

    Logits (N, K > 1) as the only output: KL(softmax dense ‖ softmax outputs) in nats. Everything else: squared error
    relative to the variance of the dense output over all samples that are given at once, the mean over outputs where
    there are several. Entries that the dense network leaves infinite (masked ones) are left out.
    """
    if len(dense) == 1 and dense[0].dim() == 2 and dense[0].shape[1] > 1:
        (own,), (wanted,) = outputs, dense
        return F.kl_div(F.log_softmax(own, 1), F.log_softmax(wanted, 1), reduction="none", log_target=True).sum(1)
    return torch.stack([_error(own, wanted) for own, wanted in zip(outputs, dense, strict=True)]).mean(0)


def _error(own: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of an output, per sample, over its variance; over a millionth of its square where that is more."""
    known = wanted.isfinite()
    finite = wanted[known] if not bool(known.all()) else wanted
    if not finite.numel():
        return wanted.new_zeros(len(wanted))
    scale = finite.var(correction=0).clamp_min(1e-6 * float(finite.square().mean())).clamp_min(1e-12)
    return torch.where(known, own - wanted, 0.0).reshape(len(own), -1).square().mean(1) / scale


def joined(batches: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The inputs of several batches, or the answers for them, as those of one."""
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


@dataclass(frozen=True)
class Evidence:
    """The shared evidence of one network.

    samples: of the calibration data; none at all where the project has no data. units: number of unit ids. loss: the
    project's, None for its default (cross-entropy).
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
        return self.topology.count

    @cached_property
    def gate_gradients(self) -> Tensor:
        """∂L_n/∂m_i for every sample n and unit i, shape (samples, units).

        The gates on all readers of a unit are summed (the chain rule). Without targets the loss is that of labels
        drawn from the network's own predictions (the Fisher information of the model itself); outputs that are no
        logits, and several outputs, each on its own scale, take a random read-out of unit variance.
        """
        source = torch.Generator().manual_seed(self.seed)
        told = self.samples.targets is not None and self.loss is not None
        scales = () if told or len(self.network.answers) < 2 else _scales(joined(self.outputs))
        rows = [
            _gate_gradients(self.network, batch, targets, self.loss, self.units, source, scales)
            for batch, targets in self.batches()
        ]
        return torch.cat(rows)

    @cached_property
    def maps(self) -> Maps:
        """Feature maps of the units of every offered group, as the layers that mix them read them.

        From the first MAP_SAMPLES samples, fewer where the network is large.
        """
        return maps(self.network, self.samples.first(min(MAP_SAMPLES, affordable(self.network))).joined())

    @cached_property
    def grams(self) -> dict[str, Gram]:
        """Second moments of what each layer reads, from all samples."""
        return grams(self.network, self.samples.joined())

    @cached_property
    def outputs(self) -> tuple[Answers, ...]:
        """What the dense network says of each batch."""
        return outputs_of(self.network.graph, self.samples, self.network.answers)

    def batches(self) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Batches of inputs with their targets, None where the calibration data gives none."""
        start = 0
        for batch in self.samples.inputs:
            stop = start + len(batch[0])
            yield batch, None if self.samples.targets is None else self.samples.targets[start:stop]
            start = stop

    def gated(self, inputs: tuple[Tensor, ...], gates: Tensor) -> Any:
        """The network's outputs with every unit multiplied by its gate where it is read; takes gradients.

        gates: shape (units,), or (samples, units) for gates of each sample's own.
        """

        def touch(reader: Reader, x: Tensor) -> Tensor:
            if reader.how == "statistics":  # gated where the norm's channels are mixed
                return x
            ids = torch.from_numpy(reader.ids).long()
            own = torch.where(ids < 0, torch.ones((), dtype=gates.dtype), gates[..., ids.clamp_min(0)])
            view = [len(own) if gates.dim() == 2 else 1] + [1] * (x.dim() - 1)
            view[reader.axis] = len(ids)
            return x * own.reshape(view)

        return TouchedRun(self.network.graph, self.network.readers, touch).run(*inputs)

    def answers(self, outputs: Any, count: int) -> Answers:
        """What outputs of this network, or of a changed one, say of so many samples."""
        return answers(outputs, count, self.network.answers)

    def task_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The project's loss (mean over the batch)."""
        source = torch.Generator().manual_seed(self.seed)
        return _loss(outputs, targets, self.loss, source, len(targets), self.network.answers)


@torch.no_grad()
def outputs_of(model: nn.Module, samples: Samples, axes: Sequence[int | None]) -> tuple[Answers, ...]:
    """What a network says of each batch. axes: `Network.answers`."""
    return tuple(answers(model(*batch), len(batch[0]), axes) for batch in samples.inputs)


def mean_divergence(model: nn.Module, samples: Samples, dense: Sequence[Answers], axes: Sequence[int | None]) -> float:
    """Mean over samples of a network's divergence from the dense one. dense: what that says of each batch.

    axes: `Network.answers`.
    """
    return float(divergence(joined(outputs_of(model, samples, axes)), joined(dense)).mean())


def _gate_gradients(
    network: Network,
    batch: tuple[Tensor, ...],
    targets: Tensor | None,
    loss: Loss | None,
    units: int,
    source: torch.Generator,
    scales: Sequence[float],
) -> Tensor:
    taken: list[tuple[Reader, Tensor]] = []

    def tap(reader: Reader, x: Tensor) -> Tensor:
        if reader.how == "statistics":  # a gate behind the norm, where its channels are mixed, is the whole gate
            return x
        tapped = x.detach().requires_grad_() if not x.requires_grad else x.view_as(x)
        taken.append((reader, tapped))
        return tapped

    outputs = TouchedRun(network.graph, network.readers, tap).run(*batch)
    value = _loss(outputs, targets, loss, source, len(batch[0]), network.answers, scales)
    gradients = torch.autograd.grad(value, [x for _, x in taken], materialize_grads=True)
    size = len(batch[0])
    result = torch.zeros(size, units + 1)
    for (reader, x), gradient in zip(taken, gradients, strict=True):
        product = (
            (gradient * x).detach().movedim(reader.axis, 1).flatten(2)
            if x.dim() > 2
            else (gradient * x).detach().unsqueeze(2)
        )
        columns = torch.from_numpy(reader.ids).long()
        result.index_add_(1, torch.where(columns < 0, units, columns), product.sum(2) * size)
    return result[:, :units]


def _scales(found: Answers) -> tuple[float, ...]:
    """Standard deviation of each output, of what is finite of it; 1 for one that is constant."""
    finite = [each.detach()[each.isfinite()] for each in found]
    spread = [float(each.std(correction=0)) if each.numel() else 0.0 for each in finite]
    return tuple(each if each > 1e-6 else 1.0 for each in spread)


def _loss(
    outputs: Any,
    targets: Tensor | None,
    loss: Loss | None,
    source: torch.Generator,
    count: int,
    axes: Sequence[int | None],
    scales: Sequence[float] = (),
) -> Tensor:
    """A loss of outputs of so many samples; of what they say where there are no targets or no loss for them.

    axes: `Network.answers`. scales: of several outputs; left out, those of these samples.
    """
    if targets is not None and loss is not None:
        return loss(outputs, targets)
    if targets is not None and isinstance(outputs, Tensor):
        return F.cross_entropy(outputs, targets)
    found = answers(outputs, count, axes)
    if len(found) == 1 and found[0].dim() == 2 and found[0].shape[1] > 1:
        (logits,) = found
        own = torch.multinomial(logits.detach().softmax(1), 1, generator=source).squeeze(1)
        return F.cross_entropy(logits, own)
    if len(found) > 1:
        found = tuple(each / scale for each, scale in zip(found, scales or _scales(found), strict=True))
    drawn = [torch.randn(each.shape, generator=source).masked_fill(~each.isfinite(), 0.0) for each in found]
    read = [(each.nan_to_num() * weight).flatten(1).sum(1) for each, weight in zip(found, drawn, strict=True)]
    return torch.stack(read).sum(0).mean()
