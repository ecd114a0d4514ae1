"""Small networks, one for each family of operators that people's networks hold beyond plain convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

IMAGE = (1, 3, 8, 8)
TOKENS = (1, 6, 12)


class Classifier(nn.Module):
    """Mean over space or tokens, then a linear layer."""

    def __init__(self, channels: int, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes, self.fc = axes, nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(self.axes))


class Image(nn.Module):
    """A convolution, something in the middle, a convolution and a classifier."""

    def __init__(self, middle: nn.Module, out: int = 12) -> None:
        super().__init__()
        self.a, self.middle, self.b, self.head = nn.Conv2d(3, 12, 3, 1, 1), middle, nn.Conv2d(out, 8, 1), None
        self.head = Classifier(8, (2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.middle(self.a(x)))))


class Sequence(nn.Module):
    """A linear layer over tokens, something in the middle, a linear layer and a classifier."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.middle, self.b, self.head = nn.Linear(12, 12), middle, nn.Linear(12, 8), Classifier(8, (1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.middle(self.a(x)))))


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class TransposedGroups(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(12, 12, 2, 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class Shared(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class SharedBranches(nn.Module):
    """Two residual branches with a convolution in common."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, 1, 1), Classifier(12, (2, 3))
        self.one, self.two = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.one(F.relu(self.conv(x)))
        return self.head(x + self.two(F.relu(self.conv(x))))


class Tied(nn.Module):
    """Two layers with one weight; the second reads what the first writes in the same order."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(x)))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.conv = nn.Parameter(torch.full((12, 1, 1), 1e-6)), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv(x)


class ChannelsFirstNorm(nn.Module):
    """The layer norm of ConvNeXt's channels-first layout, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FunctionalNorm(nn.LayerNorm):
    """A subclass whose forward calls the function on its own parameters."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class SpatialAttention(nn.Module):
    """CBAM's map: mean and maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(both))


class Attention(nn.Module):
    """how: fused (3, heads, channels), separate, or interleaved (heads, 3 x channels). sdpa: the fused function."""

    def __init__(self, how: str = "fused", *, sdpa: bool = True) -> None:
        super().__init__()
        self.how, self.sdpa, self.heads = how, sdpa, 3
        if how == "separate":
            self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        else:
            self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        if self.how == "fused":
            q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.how == "separate":
            q, k, v = (f(x).view(n, length, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        else:
            q, k, v = self.qkv(x).view(n, length, self.heads, -1).transpose(1, 2).chunk(3, dim=3)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return x + self.proj(y.transpose(1, 2).reshape(n, length, c))


class CrossCovariance(nn.Module):
    """Attention across channels (XCiT, EdgeNeXt): normalised q and k, a temperature, softmax over the channels of k."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.temperature = nn.Linear(12, 36), nn.Linear(12, 12), nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 3, c // 3).permute(2, 0, 3, 4, 1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        y = (weights.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(n, length, c)
        return x + self.proj(y)


class Windows(nn.Module):
    """Shifted windows of a channels-last map, with a table of relative positions and a mask made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.table = nn.Linear(12, 36), nn.Parameter(torch.randn(49, 3))
        self.register_buffer("index", torch.randint(0, 49, (16 * 16,), generator=torch.Generator().manual_seed(0)))
        self.proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(x.permute(0, 2, 3, 1), shifts=(-2, -2), dims=(1, 2))
        n, h, w, c = x.shape
        windows = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.attention(windows).reshape(windows.shape[0], 16, 3, 3, c // 3).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) + self.table[self.index].view(16, 16, -1).permute(2, 0, 1).unsqueeze(0)
        mask = x.new_zeros((h // 4 * (w // 4), 16, 16))
        mask[1:, :8] = -100.0
        scores = scores.view(n, mask.shape[0], 3, 16, 16) + mask.unsqueeze(1).unsqueeze(0)
        y = scores.view(-1, 3, 16, 16).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 16, c)).view(n, h // 4, w // 4, 4, 4, c)
        return torch.roll(y.permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c), (2, 2), (1, 2)).permute(0, 3, 1, 2)


class PatchEmbedding(nn.Module):
    """Patches, a class token, a table of positions, one encoder layer of nn.MultiheadAttention; the class token out."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.zeros(1, 1, 12))
        self.position = nn.Parameter(torch.randn(1, 5, 12) * 0.02)
        self.norm, self.attention = nn.LayerNorm(12), nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down, self.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(n, -1, -1), x], 1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x[:, 0])


class Pyramid(nn.Module):
    """Two scales joined from above (FPN) and from below (PAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(12, 16, 3, 2, 1), nn.Conv2d(16, 20, 3, 2, 1)
        self.side, self.top = nn.Conv2d(16, 10, 1), nn.Conv2d(20, 10, 1)
        self.down, self.out = nn.Conv2d(10, 10, 3, 2, 1), nn.Conv2d(10, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(F.relu(low))
        top = self.top(high)
        side = self.side(low) + F.interpolate(top, size=low.shape[-2:], mode="nearest")
        return self.out(F.relu(self.down(side) + top))


class C2f(nn.Module):
    """A split, a chain of blocks on one half, all joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(12, 16, 1), nn.Conv2d(32, 12, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(F.silu(block(parts[-1])) for block in self.blocks)
        return self.last(torch.cat(parts, 1))


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.5)) * 2


class Stochastic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(12, 12, 1), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(x))


class TwoInputs(nn.Module):
    """Two inputs, and a dict with a list in it for an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor, y: Tensor, scale: Tensor | None = None) -> dict[str, object]:
        z = F.relu(self.a(x) + self.b(y))
        z = z if scale is None else z * scale
        return {"map": self.c(z), "levels": [self.c(F.max_pool2d(z, 2))]}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.cell, self.b, self.c = (
            nn.Linear(12, 12), nn.GRU(12, 10, batch_first=True), nn.Linear(10, 12), nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cell(self.a(x))
        return self.c(F.relu(self.b(y)))


class ByShape(nn.Module):
    """Control flow on shapes, asserts and padding to a multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 12, "twelve channels"
        if x.shape[-1] % 3:
            x = F.pad(x, (0, 3 - x.shape[-1] % 3))
        return self.conv(x) if x.dim() == 4 else x


class SplitAttention(nn.Module):
    """Branches weighted by a softmax over the branches (SK, ResNeSt)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(12, 12, 3, 1, 1), nn.Conv2d(12, 12, 1)
        self.fc = nn.Conv2d(12, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.one(x), self.two(x)], dim=1)
        weights = self.fc(both.sum(1).mean((2, 3), keepdim=True)).view(x.size(0), 2, 12, 1, 1).softmax(1)
        return (both * weights).sum(1)


@fx.wrap
def hidden(x: Tensor, size: int) -> Tensor:
    """A function that asks torch.fx to stay out, with control flow on shapes."""
    return F.relu(x) if x.shape[1] == size else x


class Positional(nn.Module):
    """Positions computed from the size of the input, the same for every sample, through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(2, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[0], *x.shape[2:])
        return x + self.project(torch.stack([ones.cumsum(1), ones.cumsum(2)], 1))


class ZeroedBias(nn.Module):
    """A fused layer of which a part of the bias is zeroed in the forward (the keys of Swin v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.fc.bias.clone()
        bias[4:8].zero_()
        return F.linear(x, self.fc.weight, bias)


class WritesView(nn.Module):
    """Writes into a part of an activation and reads the whole again."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        y.view(-1).mul_(0.5)
        return y + x


class Expanded(nn.Module):
    """A gate that is expanded to what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid().expand_as(x)


class Cast(nn.Module):
    """Attention that insists on single precision."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.sigmoid(x.to(dtype=torch.float32))).type_as(x)


class InPlace(nn.Module):
    """Later readers of an activation that was written over see what was written."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = F.relu(x, inplace=True)
        x += y
        return x.add_(1.0) + y


IMAGES = {
    "transposed": lambda: TransposedGroups(1),
    "transposed grouped": lambda: TransposedGroups(3),
    "transposed depthwise": lambda: TransposedGroups(12),
    "shared": Shared,
    "layer scale": LayerScale,
    "layer norm": ChannelsFirstNorm,
    "functional norm": lambda: FunctionalNorm(12),
    "group norm": lambda: nn.GroupNorm(3, 12),
    "one group norm": lambda: nn.GroupNorm(1, 12),
    "group norm without parameters": lambda: nn.GroupNorm(3, 12, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(12, affine=True),
    "instance norm without parameters": lambda: nn.InstanceNorm2d(12),
    "prelu": lambda: nn.PReLU(12),
    "spatial attention": SpatialAttention,
    "channel softmax": lambda: nn.Softmax(1),
    "windows": Windows,
    "pyramid": Pyramid,
    "c2f": C2f,
    "stochastic depth": Stochastic,
    "by shape": ByShape,
    "split attention": SplitAttention,
    "in place": InPlace,
    "wrapped": lambda: Apply(lambda x: hidden(x, 12)),
    "positional": Positional,
    "cast": Cast,
    "expanded gate": Expanded,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 12, 3, 1, 1)),
    "repeat": lambda: Apply(lambda x: x.repeat(1, 1, 2, 1)),
    "flip": lambda: Apply(lambda x: torch.flip(x, (2,))),
    "channel slice": lambda: Apply(lambda x: torch.cat([x[:, 6:], x[:, :6]], 1)),
    "einsum": lambda: Apply(lambda x: torch.einsum("nchw,ncij->nhwij", x, x).flatten(3).permute(0, 3, 1, 2)[:, :12]),
}
RESIZED = {
    "pixel shuffle": (lambda: nn.PixelShuffle(2), 3),
    "pixel unshuffle": (lambda: nn.PixelUnshuffle(2), 48),
    "glu": (lambda: nn.GLU(1), 6),
    "unfold": (lambda: Apply(lambda x: F.unfold(x, 3, padding=1).reshape(x.shape[0], 108, 8, 8)), 108),
}
SEQUENCES = {
    "attention": Attention,
    "attention written out": lambda: Attention(sdpa=False),
    "attention separate": lambda: Attention("separate"),
    "attention interleaved": lambda: Attention("interleaved"),
    "cross covariance": CrossCovariance,
    "tied weights": Tied,
    "zeroed bias": ZeroedBias,
    "rms norm": lambda: nn.RMSNorm(12),
    "layer norm without parameters": lambda: nn.LayerNorm(12, elementwise_affine=False),
    "encoder layer": lambda: nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, norm_first=True),
}
ZOO = {
    **{name: (lambda make=make: Image(make()), IMAGE) for name, make in IMAGES.items()},
    **{name: (lambda make=make, out=out: Image(make(), out), IMAGE) for name, (make, out) in RESIZED.items()},
    **{name: (lambda make=make: Sequence(make()), TOKENS) for name, make in SEQUENCES.items()},
    "patch embedding": (PatchEmbedding, IMAGE),
    "recurrent": (Recurrent, TOKENS),
}


def example(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
