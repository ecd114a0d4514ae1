"""Small networks that say what the zoo says in other words: numpy's names, buffers, keywords, constants at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_nets import IMAGE, TOKENS, Apply, Image, Sequence


class Grid(nn.Module):
    """What every place of a map is multiplied by comes after the last layer (grids of YOLO, priors of SSD)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 2, 1)
        self.scale = nn.Parameter(torch.rand(1, 1, 8, 8) + 0.5)
        self.register_buffer("grid", torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) * self.scale + self.grid


class Directions(nn.Module):
    """A linear layer of normalised weights at the end (ArcFace)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.weight = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 1), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).mean((2, 3))
        return F.linear(F.normalize(x), F.normalize(self.weight)) * 16


class Blur(nn.Module):
    """The same fixed kernel for every channel (BlurPool)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(12, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, padding=1, groups=x.shape[1])


class Fixed(nn.Module):
    """Fixed filters over all channels (Sobel)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(12, 12, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class FrozenNorm(nn.Module):
    """A batch norm of buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(12) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Turned(nn.Module):
    """A table that is multiplied the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.table.T).mT.mT


def numpys(x: Tensor) -> Tensor:
    """Numpy's names of arguments, and keywords in any order."""
    x = torch.cat(axis=1, tensors=[x[:, 6:], x[:, :6]]) * x.mean(axis=(2, 3), keepdims=True)
    return x * x.softmax(axis=1) + torch.sum(keepdims=True, axis=1, input=x)


def turned(x: Tensor) -> Tensor:
    """The first four channels last."""
    return torch.cat([torch.narrow(x, start=-8, length=8, dim=1), x[:, :4]], 1)


IMAGES = {  # what stands in the middle, its channels, units of the layer before it
    "numpy's names": (lambda: Apply(numpys), 12, 6),
    "blur": (Blur, 12, 12),
    "fixed filters": (Fixed, 12, 12),
    "frozen norm": (FrozenNorm, 12, 12),
    "mT": (lambda: Apply(lambda x: x.flatten(2).mT.mT.unflatten(2, (8, 8))), 12, 12),
    "first of max": (lambda: Apply(lambda x: x * torch.max(x, 1, keepdim=True)[0]), 12, 12),
    "values of min": (lambda: Apply(lambda x: x * x.min(dim=1).values.unsqueeze(1)), 12, 12),
    "maximum": (lambda: Apply(lambda x: torch.max(x, other=x.neg()) + x.min(x.abs())), 12, 12),
    "narrow by names": (lambda: Apply(turned), 12, 12),
    "shuffle by name": (lambda: Apply(lambda x: F.channel_shuffle(x, groups=3)), 12, 12),
}
WRITTEN = {name: ((lambda make=make, out=out: Image(make(), out)), IMAGE) for name, (make, out, _) in IMAGES.items()}
WRITTEN |= {
    "grid": (Grid, IMAGE),
    "directions": (Directions, IMAGE),
    "turned": (lambda: Sequence(Turned()), TOKENS),
}
UNITS = {name: units for name, (_, _, units) in IMAGES.items()} | {"grid": 12, "directions": 12, "turned": 12}
