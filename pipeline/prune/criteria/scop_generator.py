"""SCOP against a generator: units scored against knockoff inputs made by a small autoencoder, trained in seconds.

As `scop`, I = |γ| (β − (1 − β)) with β trained on mixtures (Tang et al., SCOP, NeurIPS 2020), and closer to the
published form, whose control comes from a pre-trained GAN: the code space is that of a convolutional variational
autoencoder trained on the calibration inputs alone,

    loss = ‖x − d(z)‖² / Var x + PRIOR · KL(q(z | x) ‖ N(0, 1)),    z ~ q(z | x) = N(e(x), σ(x)²)

Codes are drawn from the normal distribution that fits the codes of the calibration inputs, which closes the gap between
them and the prior. It sees inputs of two spatial axes at no more than SIZE pixels a side; finer detail, as all that the
code leaves out, comes from another sample. Inputs without two spatial axes get `scop`'s principal axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.nouns import Ranking
from pipeline.prune.criteria._knockoffs import Code, rank_against
from pipeline.prune.criteria.scop import PrincipalAxes
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs", "gradients")
SIZE, CODE, WIDTH = 32, 48, 16
STEPS, BATCH, RATE, PRIOR = 300, 32, 3e-3, 3e-4


class Generator(nn.Module):
    """A variational autoencoder for inputs (N, C, H, W), each channel standardised, of at most SIZE pixels a side."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        channels, self.full = x.shape[1], tuple(x.shape[2:])
        self.mean: Tensor = x.mean((0, 2, 3), keepdim=True)
        self.spread: Tensor = x.std((0, 2, 3), keepdim=True, correction=0).clamp_min(1e-6)
        self.size = tuple(min(SIZE, -(-side // 4) * 4) for side in self.full)
        inner = (2 * WIDTH, self.size[0] // 4, self.size[1] // 4)
        flat = inner[0] * inner[1] * inner[2]
        self.down = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, 2, 1), nn.ReLU(), nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(flat, 2 * CODE),
        )  # fmt: skip
        self.up = nn.Sequential(
            nn.Linear(CODE, flat), nn.ReLU(), nn.Unflatten(1, inner),
            nn.ConvTranspose2d(2 * WIDTH, WIDTH, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(WIDTH, channels, 4, 2, 1),
        )  # fmt: skip

    def shrunk(self, x: Tensor) -> Tensor:
        """Standardised inputs at the size that the generator sees."""
        standardised: Tensor = (x - self.mean) / self.spread
        return F.interpolate(standardised, self.size, mode="area")

    def encode(self, x: Tensor) -> Tensor:
        """Means (N, CODE) of the codes."""
        mean: Tensor = self.down(self.shrunk(x))[:, :CODE]
        return mean

    def decode(self, code: Tensor) -> Tensor:
        """Inputs (N, C, H, W) for the codes."""
        made: Tensor = F.interpolate(self.up(code), self.full, mode="bilinear", align_corners=False)
        return made * self.spread + self.mean

    def loss(self, x: Tensor) -> Tensor:
        """Squared error of shrunken inputs, rebuilt from a draw of their codes, plus the divergence from the prior."""
        mean, log_variance = self.down(x).split(CODE, 1)
        made = self.up(mean + torch.randn_like(mean) * (0.5 * log_variance).exp())
        prior: Tensor = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return F.mse_loss(made, x) + PRIOR * prior


def train(x: Tensor, seed: int) -> Generator:
    """A generator that has learned these inputs, (N, C, H, W). The global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(x)
        small = generator.shrunk(x)
        optimizer = torch.optim.Adam(generator.parameters(), lr=RATE)
        for _ in range(STEPS):
            loss = generator.loss(small[torch.randint(len(small), (BATCH,))])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return generator.eval()


def _code(x: Tensor, seed: int) -> Code:
    return train(x, seed) if x.dim() == 4 else PrincipalAxes(x)


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by what their real features are worth beyond those of generated inputs."""
    return rank_against(evidence, _code)
