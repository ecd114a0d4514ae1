"""Knockoffs: inputs that look like the calibration inputs and say nothing about them, and what units do with them.

SCOP (Tang et al., NeurIPS 2020) runs a network on an input and on its knockoff and lets every unit mix what it gives
for the two, A = β ⊙ A_real + (1 − β) ⊙ A_knock, β in [0, 1] from ½. Only β is trained, for the loss on the real input:
a unit whose real features are no better than the control's may go. The score of a unit is

    I = |γ| (β − (1 − β))    γ: its scale in a norm

Chosen here: units are mixed where they are read, so that β is shared over a coupled group by construction; |γ| is the
mean over all norms of the unit, and where it has none the standard deviation of what its readers see, which is what |γ|
is behind a norm; scores are shifted by the lowest of the whole network, so that they are non-negative and keep their
order, within groups and between them. The knockoff runs unmixed; the mixed half runs on from the mixture, as published.

Knockoffs of inputs are made in a code space (principal axes of the inputs, or a trained generator's): a code is drawn
from N(μ, Σ) of the codes. In the principal axes of the codes Σ is diagonal, and this is the second-order knockoff with
s = diag Σ (Candès et al. 2018): same mean and covariance, and no correlation with what it stands in for. What the code
does not hold comes from another sample, so that it too is distributed as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.nouns import Ranking
from pipeline.prune.criteria._damage import Shelf, damage, macs
from pipeline.prune.criteria._filters import NORMS
from pipeline.prune.criteria.base import by_score
from pipeline.prune.evidence import Evidence
from pipeline.prune.execute import TouchedRun
from pipeline.prune.labels import Reader

STEPS, RATE, BETAS = 200, 0.02, (0.5, 0.9)
WORK = 4e11
"""Multiplications of all forward passes on real inputs together, as far as LEAST samples a step allow."""
LEAST, MOST = 4, 64


class Code(Protocol):
    """A code space for inputs of one kind."""

    def encode(self, x: Tensor) -> Tensor:
        """Codes (N, k) of inputs (N, …)."""
        ...

    def decode(self, code: Tensor) -> Tensor:
        """What the codes (N, k) say of the inputs, (N, …)."""
        ...


def redrawn(codes: Tensor, source: torch.Generator) -> Tensor:
    """Second-order Gaussian knockoffs of codes, both (N, k): draws from the normal distribution of their moments.

    Codes that have no covariance (one sample, or constant inputs and so no axes) stay as they are.
    """
    if len(codes) < 2 or not codes.shape[1]:
        return codes
    mean = codes.mean(0)
    scales, axes = torch.linalg.eigh(torch.cov(codes.T.double()).reshape(codes.shape[1], -1))
    drawn = torch.randn(codes.shape, generator=source, dtype=torch.float64) * scales.clamp_min(0).sqrt()
    moved: Tensor = mean + (drawn @ axes.T).to(codes.dtype)
    return moved


@torch.no_grad()
def knockoffs(x: Tensor, code: Code, source: torch.Generator) -> Tensor:
    """A knockoff for each of these inputs, (N, …): a code drawn anew, and what the code leaves out from another one."""
    codes = code.encode(x)
    left_out = x - code.decode(codes)
    return code.decode(redrawn(codes, source)) + left_out[torch.randperm(len(x), generator=source)]


def rank_against(evidence: Evidence, coder: Callable[[Tensor, int], Code]) -> list[Ranking]:
    """Rank units by how much more the loss wants their real features than the control's. coder: of inputs and seed."""
    if not evidence.topology.offered:
        return []
    source = torch.Generator().manual_seed(evidence.seed)
    shelf = Shelf(evidence)
    control = tuple(
        knockoffs(x, coder(x, evidence.seed), source)
        if x.is_floating_point()
        else x[torch.randperm(len(x), generator=source)]
        for x in shelf.inputs
    )
    trust, spread = _train(evidence, shelf, control, source)
    scores = _scale(evidence, spread) * (2 * trust - 1)
    offered = [unit for group in evidence.topology.offered for unit in group.units]
    return by_score(evidence.topology, (scores - scores[offered].min()).clamp_min(0))


def _train(
    evidence: Evidence, shelf: Shelf, control: tuple[Tensor, ...], source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """β of every unit after training, and the standard deviation of its real features, both (units,)."""
    each = int(WORK / max(1, macs(evidence.topology) * STEPS))
    each = min(max(LEAST, min(MOST, each)), len(shelf))
    trust = nn.Parameter(torch.full((evidence.units,), 0.5))
    optimizer = torch.optim.Adam([trust], lr=RATE, betas=BETAS)
    seen = _Spread(evidence.units)
    for step in range(STEPS):
        at = step * each % len(shelf)
        if at < each:
            order = torch.randperm(len(shelf), generator=source)
        chosen = order[torch.arange(at, at + each) % len(shelf)]
        inputs, targets, dense = shelf.take(chosen)
        unmixed: dict[str, Tensor] = {}
        with torch.no_grad():
            _run(evidence, tuple(x[chosen] for x in control), _keep(unmixed))
            if step == 0:
                _run(evidence, inputs, seen.see)
        outputs = _run(evidence, inputs, _mix(unmixed, trust))
        (trust.grad,) = torch.autograd.grad(damage(evidence, outputs, targets, dense), trust)
        optimizer.step()
        with torch.no_grad():
            trust.clamp_(0, 1)
    return trust.detach(), seen.deviation()


def _run(evidence: Evidence, inputs: tuple[Tensor, ...], touch: Callable[[Reader, Tensor], Tensor]) -> object:
    return TouchedRun(evidence.network.graph, evidence.network.readers, touch).run(*inputs)


def _keep(into: dict[str, Tensor]) -> Callable[[Reader, Tensor], Tensor]:
    def touch(reader: Reader, x: Tensor) -> Tensor:
        into[reader.op] = x
        return x

    return touch


def _mix(unmixed: dict[str, Tensor], trust: Tensor) -> Callable[[Reader, Tensor], Tensor]:
    def touch(reader: Reader, x: Tensor) -> Tensor:
        if reader.how == "statistics":  # mixed behind the norm
            return x
        ids = torch.from_numpy(reader.ids).long()
        own = torch.where(ids < 0, torch.ones(()), trust[ids.clamp_min(0)])
        view = [1] * x.dim()
        view[reader.axis] = -1
        return torch.lerp(unmixed[reader.op], x, own.reshape(view).expand_as(x))

    return touch


class _Spread:
    """Standard deviation of every unit over samples and positions, as its readers see it."""

    def __init__(self, units: int) -> None:
        self.sums = torch.zeros(3, units + 1, dtype=torch.float64)

    def see(self, reader: Reader, x: Tensor) -> Tensor:
        flat = x.movedim(reader.axis, 0).flatten(1).double()
        ids = torch.from_numpy(reader.ids).long() % self.sums.shape[1]
        count = torch.full((len(ids),), float(flat.shape[1]), dtype=torch.float64)
        self.sums.index_add_(1, ids, torch.stack([count, flat.sum(1), flat.square().sum(1)]))
        return x

    def deviation(self) -> Tensor:
        count, total, squares = self.sums[:, :-1]
        count = count.clamp_min(1)
        variance: Tensor = squares / count - (total / count).square()
        return variance.clamp_min(0).sqrt().float()


def _scale(evidence: Evidence, spread: Tensor) -> Tensor:
    """|γ| of every unit, mean over its norms; `spread` where it has none."""
    total, count = torch.zeros(evidence.units), torch.zeros(evidence.units)
    for name, axes in evidence.topology.params.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not isinstance(evidence.network.graph.get_submodule(path), NORMS):
            continue
        value = evidence.network.graph.get_parameter(name).detach().abs()
        for axis, units in axes.items():
            scale = value.movedim(axis, 0).flatten(1).mean(1) if value.dim() > 1 else value
            here = np.flatnonzero(units >= 0)
            ids = torch.from_numpy(units[here]).long()
            total.index_add_(0, ids, scale[torch.from_numpy(here)])
            count.index_add_(0, ids, torch.ones(len(ids)))
    return torch.where(count > 0, total / count.clamp_min(1), spread)
