"""Layers that read a group as least-squares problems, and what each removal costs there.

A layer reads rows X of its patches, d columns of them from this group, and gives Y = X Wᵀ. With the covariance A of X
(`evidence.grams`; constants are given back by the bias) and W scaled to tr(W A Wᵀ) = 1 over all columns of the layer,
an error is relative to the variance of the layer's output, and errors of several readers add up:

    without repair      E(R) = 1_Rᵀ G 1_R,   G_ij = Σ_readers tr(W_i A_ij W_jᵀ)                       `quadratic`
    with re-solving     E(R) = Σ_readers tr(W_R (P_RR)⁻¹ W_Rᵀ),   P = (A + λ I)⁻¹                     `eliminate`

Both see one layer at a time on the dense network's activations. Columns of other groups keep their weights in the first
and help in the second. A grouped convolution counts as its groups. Readers without a Gram matrix (transposed
convolutions, norms over channels, attention) are left out where the group has others; where it has none they count as
if each channel were read for itself, from `evidence.maps`: W = I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.nouns import ChannelGroup
from pipeline.prune.evidence import Evidence
from pipeline.prune.maps import Gram
from pipeline.prune.merge import RIDGE


@dataclass(frozen=True)
class Reading:
    """What one layer reads of a group, in float64.

    covariance: (d, d) of all its columns. weight: (outputs, d), scaled. at: (units, times), the columns of each unit.
    """

    covariance: Tensor
    weight: Tensor
    at: Tensor

    @property
    def own(self) -> Tensor:
        """Columns of the group, unit by unit, shape (units · times,)."""
        return self.at.reshape(-1)


def readings(evidence: Evidence, group: ChannelGroup) -> list[Reading]:
    """The readings of a group, one for each layer (and group of a grouped convolution) that reads it."""
    network = evidence.network
    targets = {node.name: str(node.target) for node in network.graph.graph.nodes}
    layers = dict.fromkeys(targets[r.op] for r in network.readers if np.isin(group.units, r.ids).all())
    found = [
        reading
        for name in layers
        if name in evidence.grams
        for reading in _of_layer(network.graph.get_parameter(f"{name}.weight"), evidence.grams[name], group)
    ]
    return found or [_of_maps(seen) for seen in evidence.maps[group.id]] or [_of_maps(torch.zeros(1, group.size, 1, 1))]


def _of_layer(weight: Tensor, gram: Gram, group: ChannelGroup) -> list[Reading]:
    covariance = gram.covariance.double()
    scaled = _scaled(weight.detach().double().reshape(len(covariance), -1, covariance.shape[1]), covariance)
    at = torch.from_numpy(np.stack([np.flatnonzero(gram.columns == unit) for unit in group.units]))
    return [Reading(own, rows, at) for own, rows in zip(covariance, scaled, strict=True)]


def _of_maps(seen: Tensor) -> Reading:
    """Maps (samples, units, height, width) as a layer whose outputs are its inputs."""
    rows = seen.double().movedim(1, 0).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    covariance = rows @ rows.T / rows.shape[1]
    units = len(rows)
    eye = torch.eye(units, dtype=torch.double)
    return Reading(covariance, _scaled(eye[None], covariance[None])[0], torch.arange(units)[:, None])


def _scaled(weight: Tensor, covariance: Tensor) -> Tensor:
    """Weights (parts, outputs, d) for which the outputs of all parts vary by 1 in all, or 0 where they do not vary."""
    variance = ((weight @ covariance) * weight).sum()
    return weight * (variance.rsqrt() if variance > 0 else 0.0)


def quadratic(found: Sequence[Reading]) -> Tensor:
    """G, shape (units, units): symmetric, positive semidefinite; sums to the number of layers that read this alone."""
    tables = []
    for reading in found:
        weight = reading.weight[:, reading.own]
        tables.append(by_unit(reading.covariance[reading.own][:, reading.own] * (weight.T @ weight), reading))
    return torch.stack(tables).sum(0)


def by_unit(table: Tensor, reading: Reading) -> Tensor:
    """Sums over the columns of each pair of units: (units · times, units · times) -> (units, units)."""
    units, times = reading.at.shape
    return table.reshape(units, times, units, times).sum((1, 3))


def eliminate(found: Sequence[Reading], order: Sequence[int] | None = None) -> tuple[list[int], list[float]]:
    """The order of removal in which each unit adds the least error after re-solving, and what each adds.

    order: a given order instead, which is priced. The exact greedy, by downdates of P that are applied when they are
    read: for u units of t columns u² t² (u t + outputs) operations and (u t)² numbers a reading.
    """
    states = [_Elimination(reading) for reading in found]
    units = len(found[0].at)
    taken, added = [], []
    left = torch.ones(units, dtype=torch.bool)
    for turn in range(units):
        if order is None:
            errors = torch.stack([state.errors() for state in states]).sum(0)
            unit = int(torch.where(left, errors, torch.inf).argmin())
        else:
            unit = order[turn]
        left[unit] = False
        taken.append(unit)
        added.append(sum(state.remove(unit) for state in states))
    return taken, added


class _Elimination:
    """One layer that loses unit after unit and is solved again each time: P = P₀ − F Fᵀ, and the weights of the rest.

    Removing unit i, with P_ii = L Lᵀ:  F gains P_:i L⁻ᵀ,  W loses (W_i L⁻ᵀ)(P_:i L⁻ᵀ)ᵀ,  the error grows by ‖W_i L⁻ᵀ‖².
    """

    def __init__(self, reading: Reading) -> None:
        own = reading.own
        self.units, self.times = reading.at.shape
        ridged = reading.covariance.clone()
        ridged.diagonal().add_(RIDGE * ridged.diagonal().mean() + 1e-8)
        self.start = torch.cholesky_inverse(torch.linalg.cholesky(ridged))[own][:, own]
        self.weight = reading.weight[:, own].T.contiguous()
        tall = self.start.reshape(self.units, self.times, self.units, self.times)
        self.blocks = tall.diagonal(0, 0, 2).movedim(2, 0).clone()
        self.factor = torch.empty_like(self.start)
        self.done = 0

    def errors(self) -> Tensor:
        """What each unit would add, shape (units,); of no meaning for those that are gone."""
        rows = self.weight.view(self.units, self.times, -1)
        if self.times == 1:
            return rows.square().sum((1, 2)) / self.blocks.flatten()
        inverse: Tensor = torch.linalg.inv(self.blocks)
        return (inverse * (rows @ rows.transpose(1, 2))).sum((1, 2))

    def remove(self, unit: int) -> float:
        """Take a unit away and solve the rest again; gives the error that this adds."""
        own = slice(unit * self.times, (unit + 1) * self.times)
        behind = self.factor[:, : self.done]
        across = self.start[:, own] - behind @ behind[own].T
        lower = torch.linalg.cholesky(across[own])
        step = torch.linalg.solve_triangular(lower, across.T, upper=False).T
        moved = torch.linalg.solve_triangular(lower, self.weight[own], upper=False)
        self.factor[:, self.done : self.done + self.times] = step
        self.done += self.times
        self.weight -= step @ moved
        self.weight[own] = 0
        tall = step.view(self.units, self.times, self.times)
        self.blocks -= tall @ tall.transpose(1, 2)
        self.blocks[unit] = torch.eye(self.times, dtype=tall.dtype)
        return float(moved.square().sum())
