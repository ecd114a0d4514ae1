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


class Picked(nn.Module):
    """Channels in an order that a buffer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 5, 4, 11, 10, 9, 8, 7, 6]))
        self.register_buffer("places", torch.arange(8) % 2 == 0)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order][..., self.places]


class Repeated(nn.Module):
    """One kernel repeated for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.repeat(x.shape[1], 1, 1, 1), padding=1, groups=12)


class Standardised(nn.Conv2d):
    """A convolution of standardised weights."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedTwice(nn.Module):
    """A layer of standardised weights that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(12, 12, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class Scaled(nn.Conv2d):
    """The same with a gain for every output, by a batch norm over the weight (NFNets)."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.3).view(-1)
        weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Masked(nn.Conv2d):
    """A convolution that sees what is above and to the left (PixelCNN)."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("mask", (torch.arange(9) < 4).float().view(1, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=1)


class Binary(nn.Conv2d):
    """A convolution of signs; the gradient passes as if they were the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + (self.weight.sign() - self.weight).detach(), self.bias, padding=1)


class Twice(nn.Module):
    """A computed weight of which a part is read elsewhere too: it stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.c = nn.Parameter(torch.randn(12, 12, 1, 1)), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.c(x), self.weight / self.weight.norm()) * self.weight.mean()


class Decoder(nn.Module):
    """A linear layer whose outputs are folded into a map (the decoder of a variational autoencoder)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.fc = nn.Conv2d(3, 12, 3, 2, 1), nn.Linear(192, 6), nn.Linear(6, 256)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        code = self.inner(F.relu(self.a(x)).flatten(1))
        return self.out(F.relu(self.up(F.relu(self.fc(code).view(-1, 16, 4, 4)))))


class ByViews(nn.Module):
    """A pixel shuffle written out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv = nn.Conv2d(12, 20, 1), nn.Conv2d(5, 12, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.up(x).view(n, 5, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return self.conv(y.reshape(n, 5, 2 * h, 2 * w))


class Cross(nn.Module):
    """Queries of the tokens, keys and values of another width (the decoder of a detection transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = F.relu(self.memory(x[:, :4]))
        return x + self.attention(x, memory, memory, need_weights=False)[0]


class Words(nn.Module):
    """An embedding whose table is the weight of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        return self.head(x + F.relu(self.mix(x)))


class Long(nn.Module):
    """A convolution whose map is read as a sequence by an LSTM of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.first, self.cell = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 6, 3, 2, 1), None
        self.cell = nn.LSTM(24, 10, batch_first=True, bidirectional=True)
        self.b, self.out = nn.Linear(20, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.relu(self.a(x)))
        y, _ = self.cell(y.permute(0, 3, 1, 2).reshape(y.shape[0], y.shape[3], 24))
        return self.out(F.relu(self.b(y[:, -1])))


def encoder() -> nn.Module:
    """Two layers of torch's own that normalise after each sum."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 16, batch_first=True), 2, enable_nested_tensor=False)


def upsampled(x: Tensor) -> Tensor:
    """Channels and places that are repeated one by one."""
    return torch.repeat_interleave(x.repeat_interleave(2, 1), dim=-1, repeats=3)


def dotted(x: Tensor) -> Tensor:
    """Equations with dots, and without a result."""
    return x * torch.einsum("...hw,...hw->...h", x, x).unsqueeze(-1) + torch.einsum("...ij,...jk", x, x)


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
    "order of a buffer": (Picked, 12, 12),
    "one kernel": (Repeated, 12, 12),
    "weight standardisation": (lambda: Standardised(12, 12, 3), 12, 12),
    "weight standardisation twice": (StandardisedTwice, 12, 12),
    "scaled weights": (lambda: Scaled(12, 12, 3), 12, 12),
    "pixel shuffle by views": (ByViews, 12, 12),
    "repeat interleave": (lambda: Apply(upsampled), 24, 12),
    "instance norm as a function": (lambda: Apply(F.instance_norm), 12, 12),
    "einsum with dots": (lambda: Apply(dotted), 12, 12),
    "transposed depthwise multiplier": (
        lambda: nn.Sequential(nn.ConvTranspose2d(12, 24, 2, 2, groups=12), nn.BatchNorm2d(24)), 24, 12,
    ),
    "shuffle by name": (lambda: Apply(lambda x: F.channel_shuffle(x, groups=3)), 12, 12),
}  # fmt: skip
WRITTEN = {name: ((lambda make=make, out=out: Image(make(), out)), IMAGE) for name, (make, out, _) in IMAGES.items()}
WRITTEN |= {
    "grid": (Grid, IMAGE),
    "decoder": (Decoder, IMAGE),
    "long short-term memory": (Long, IMAGE),
    "cross attention": (lambda: Sequence(Cross()), TOKENS),
    "encoder that normalises last": (lambda: Sequence(encoder()), TOKENS),
    "directions": (Directions, IMAGE),
    "turned": (lambda: Sequence(Turned()), TOKENS),
}
UNITS = {name: IMAGES[name][2] if name in IMAGES else 12 for name in WRITTEN}
