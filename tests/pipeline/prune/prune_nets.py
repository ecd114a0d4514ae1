"""Small networks, one for each way in which channels are coupled."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 12), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)))


class Flat(nn.Module):
    """Flatten into a linear layer, sizes taken from the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc = conv(3, 8, stride=2), nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(x.view(x.size(0), x.shape[1] * x.shape[2] * x.shape[3]))


class Residual(nn.Module):
    """shortcut: identity, projection or pad (zero-padded, strided)."""

    def __init__(self, shortcut: str) -> None:
        super().__init__()
        out, stride = (8, 1) if shortcut == "identity" else (16, 2)
        self.shortcut = shortcut
        self.stem = conv(3, 8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, stride, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.project = nn.Conv2d(8, out, 1, stride) if shortcut == "projection" else nn.Identity()
        self.head = Head(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut == "pad":
            y += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        else:
            y += self.project(x)
        return self.head(F.relu(y))


class Depthwise(nn.Module):
    """multiplier: outputs for each input of the depthwise layer."""

    def __init__(self, multiplier: int = 1) -> None:
        super().__init__()
        self.a = conv(3, 8)
        self.dw = conv(8, 8 * multiplier, groups=8)
        self.pw, self.head = conv(8 * multiplier, 12, 1), Head(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pw(self.dw(self.a(x))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b, self.head = conv(3, 8), conv(8, 12, groups=2), conv(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.g(self.a(x))))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 6), conv(3, 8), conv(14, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], dim=1)))


class Split(nn.Module):
    """how: chunk, split or slice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c, self.head = conv(3, 12), conv(6, 6), conv(12, 8), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "chunk":
            left, right = x.chunk(2, dim=1)
        elif self.how == "split":
            left, right = torch.split(x, [6, 6], 1)
        else:
            left, right = x[:, :6], x[:, 6:]
        return self.head(self.c(torch.cat((left, self.b(right)), 1)))


class Shuffle(nn.Module):
    """how: reshape (view, transpose, view) or module."""

    def __init__(self, how: str = "reshape") -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.head = conv(3, 12), conv(12, 8), Head(8)
        self.shuffle = nn.ChannelShuffle(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "module":
            return self.head(self.b(self.shuffle(x)))
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.head(self.b(x))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b, self.head = (
            conv(3, 12),
            nn.Conv2d(12, 6, 1),
            nn.Conv2d(6, 12, 1),
            conv(12, 8),
            Head(8),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(self.b(x * gate))


class Normed(nn.Module):
    """GroupNorm and a channels-last LayerNorm, with a layer scale that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gn = nn.Conv2d(3, 12, 3, 1, 1), nn.GroupNorm(3, 12)
        self.ln, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.gamma = nn.Parameter(torch.zeros(12))
        self.head = Head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.gn(self.a(x)))
        y = self.down(F.gelu(self.up(self.ln(x.permute(0, 2, 3, 1))))) * self.gamma
        return self.head(x + y.permute(0, 3, 1, 2))


class Transposed(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.up = conv(3, 8, stride=2), nn.ConvTranspose2d(8, 6, 2, 2, groups=groups)
        self.act, self.b = nn.PReLU(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.up(self.a(x))))


class Odd(nn.Module):
    """An operator without a rule in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(torch.cumsum(self.a(x), dim=1))))


class Branching(nn.Module):
    """A module whose forward depends on data, and so cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return x * 2


class Partly(nn.Module):
    """One module inside cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.odd, self.b, self.c, self.head = conv(3, 8), Branching(), conv(8, 8), conv(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.odd(self.a(x)))))


NETS = {
    "chain": Chain,
    "flat": Flat,
    "residual identity": lambda: Residual("identity"),
    "residual projection": lambda: Residual("projection"),
    "residual pad": lambda: Residual("pad"),
    "depthwise": Depthwise,
    "depthwise multiplier": lambda: Depthwise(2),
    "grouped": Grouped,
    "concat": Concat,
    "chunk": lambda: Split("chunk"),
    "split": lambda: Split("split"),
    "slice": lambda: Split("slice"),
    "shuffle": Shuffle,
    "shuffle module": lambda: Shuffle("module"),
    "squeeze-excite": SqueezeExcite,
    "normed": Normed,
    "transposed": Transposed,
    "transposed grouped": lambda: Transposed(2),
}


def example() -> tuple[Tensor, ...]:
    return (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


@torch.no_grad()
def lived_in(model: nn.Module) -> nn.Module:
    """Norms with statistics of real inputs, and scales and shifts of their own."""
    source = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.copy_(torch.rand(module.weight.shape, generator=source) + 0.5)
            module.bias.copy_(torch.rand(module.bias.shape, generator=source) * 0.6 - 0.3)
            module.momentum = None
    model.train()(torch.randn(64, 3, 8, 8, generator=source))
    return model.eval()


def lively(model: nn.Module) -> nn.Module:
    """Norms, biases and layer scales all different, so that no two channels tie."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(0.1, 0.6)
        for name, parameter in model.named_parameters():
            if name == "gamma":
                parameter.uniform_(0.5, 1.5)
    return model.eval()
