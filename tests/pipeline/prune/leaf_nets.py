"""Networks with code that cannot be traced, or that other tracers give up at, as people write it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Around(nn.Module):
    """conv - something in the middle - conv - conv, (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.middle = nn.Conv2d(3, 8, 3, 1, 1), middle
        self.b, self.c = nn.Conv2d(8, 12, 3, 1, 1), nn.Conv2d(12, 5, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(F.relu(self.a(x)) - 0.3)
        return self.c(F.relu(self.b(y))).mean((2, 3))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Branch(nn.Module):
    """Decides by its data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.times = Inner(), 2

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            for _ in range(self.times):
                x = self.inner(x)
            return x
        return x * 2


class Deeper(nn.Module):
    """The module that decides lies inside one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.branch = nn.Conv2d(8, 8, 1), Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.branch(x))


class Positive(nn.Module):
    """Gives a number that depends on data."""

    def forward(self, x: Tensor) -> bool:
        return bool(x.sum() > 0)


class Asks(nn.Module):
    """Branches on what a module inside says of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.conv = Positive(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.positive(x) else x


class Scales(nn.Module):
    """A tensor and a number that depends on data."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        return x, x.mean().item()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = Scales()

    def forward(self, x: Tensor) -> Tensor:
        y, factor = self.scales(x)
        return y * factor


class Pairs(nn.Module):
    """Decides by its data and gives a dict."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.sum() > 0:
            return {"one": x, "two": x * 2}
        return {"one": -x, "two": x}


class FromPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = Pairs()

    def forward(self, x: Tensor) -> Tensor:
        found = self.pairs(x)
        return sum((value for _, value in found.items()), found["one"])


class Both(NamedTuple):
    one: Tensor
    two: Tensor


class Doubles(nn.Module):
    """Decides by its data and gives a named tuple."""

    def forward(self, x: Tensor) -> Both:
        if x.sum() > 0:
            return Both(x, x * 2)
        return Both(x, -x)


class FromDoubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.doubles = Doubles()

    def forward(self, x: Tensor) -> Tensor:
        both = self.doubles(x)
        return both.one + both.two


class Picks(nn.Module):
    """A shape that depends on data."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x[x > 0].shape[0]


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.detach().numpy() * 2)


class Loose(nn.Module):
    """Decides by its data in a way that TorchScript does not take."""

    def forward(self, *several: Tensor, **named: Tensor) -> Tensor:
        (x,) = several
        return x if x.sum() > 0 else -x


class Writes(nn.Module):
    """Writes into an activation, and asks nothing of the data."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y[:, 0] = 0.5
        return y


class Sized(nn.Module):
    """Writes into an activation and gives its sizes beside it, as blocks on patches do."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        y = x * 1
        y[:, 0] = 0.5
        return y, (y.shape[2], y.shape[3])


class FromSized(nn.Module):
    """Reads the sizes that came with a tensor, and decides by them."""

    def __init__(self) -> None:
        super().__init__()
        self.sized = Sized()

    def forward(self, x: Tensor) -> Tensor:
        y, (height, width) = self.sized(x)
        y = y.flatten(2).reshape(-1, 8, height, width)
        return y / (height * width) if height > 4 else y


class Swish(torch.autograd.Function):
    """x sigmoid(x) with a backward of its own: twice the true one."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return 2 * gradient * s * (1 + x * (1 - s))


swish = Swish.apply


class ByFunction(nn.Module):
    """how: through the class, or through a name that `apply` was kept under."""

    def __init__(self, how: str = "class") -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x) if self.how == "class" else swish(x)


class Reshapes(nn.Module):
    """What einops does: shapes are asked and used, dimensions folded and unfolded."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        for number, block in enumerate(self.blocks):
            x = block(x) + x if number else block(x)
        if x.shape[2] > 4 and len(x) > 0:
            x = torch.relu(x)
        n, c, h, w = x.shape
        assert isinstance(x, Tensor) and c == 8
        return x.reshape(n, c, h * w).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)


class Outputs(nn.Module):
    """Several outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 5, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = F.relu(self.a(x))
        return {"out": self.b(y), "aux": [y.mean((1, 2, 3)), (x * 2,)]}


class Rectified(nn.Module):
    """Compiled with an activation that works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = -x
        return self.act(self.conv(x))


class Remembers(nn.Module):
    """Decides by its data, with a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + self.shift.to(x.dtype)
        return x


class Defaults(nn.Module):
    """Decides by its data, with arguments that may be left out or named."""

    def forward(self, x: Tensor, by: float = 2.0, plus: float = 0.5, turned: bool = False) -> Tensor:
        if x.sum() > 0 and not turned:
            x = x * by
        return x + plus


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.defaults = Defaults()

    def forward(self, x: Tensor) -> Tensor:
        return self.defaults(x, plus=-0.25) + self.defaults(x, 3.0, turned=True)


class HoldsScript(nn.Module):
    """Decides by its data, with TorchScript inside."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.script = torch.jit.script(Inner().eval())

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.script(x)
        return x
