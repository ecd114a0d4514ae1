"""SCOP: units scored against Gaussian knockoffs of the inputs, drawn in the principal axes of the calibration inputs.

I = |γ| (β − (1 − β)), β trained as the share of real features in a mixture with the knockoff's (Tang et al., SCOP:
Scientific Control for Reliable Neural Network Pruning, NeurIPS 2020). The paper's knockoffs come from a pre-trained
GAN. Here they are second-order Gaussian knockoffs in the space of the first AXES principal components: it needs no
training, and first and second moments of the inputs are kept. `_knockoffs.py` has the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.nouns import Ranking
from pipeline.prune.criteria._knockoffs import rank_against
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs", "gradients")
AXES = 64


class PrincipalAxes:
    """The first principal components of inputs (N, …), found from their N x N products."""

    def __init__(self, x: Tensor) -> None:
        self.shape = x.shape[1:]
        flat = x.flatten(1)
        self.mean = flat.mean(0)
        centred = flat - self.mean
        squares, mixed = torch.linalg.eigh((centred @ centred.T).double())
        real = [int(i) for i in range(len(squares) - 1, -1, -1) if squares[i] > 1e-6 * squares[-1]][:AXES]
        self.axes = (mixed[:, real] / squares[real].sqrt()).T.float() @ centred

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates (N, k) along the components."""
        coordinates: Tensor = (x.flatten(1) - self.mean) @ self.axes.T
        return coordinates

    def decode(self, code: Tensor) -> Tensor:
        """The inputs (N, …) that lie at these coordinates."""
        flat: Tensor = code @ self.axes + self.mean
        return flat.reshape(len(code), *self.shape)


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by what their real features are worth beyond those of Gaussian knockoffs."""
    return rank_against(evidence, lambda x, seed: PrincipalAxes(x))
