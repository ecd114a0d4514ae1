"""Operations that count or index channels, as leaf modules with names: their numbers are data that surgery rewrites.

In a captured graph each of them is a module at the root (`channel_pad_0`, `residual_add_3`, …), so the ONNX node that
the exporter makes of it carries the same name as its scope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualAdd(nn.Module):
    """Sum of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Reshape(nn.Module):
    """Reshape to `sizes`; -1 stands where the batch goes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(int(size) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(self.sizes)

    def extra_repr(self) -> str:
        return f"{self.sizes}"


class ChannelPad(nn.Module):
    """Adds channels of zeros before and after along one axis."""

    def __init__(self, before: int, after: int, axis: int) -> None:
        super().__init__()
        self.before, self.after, self.axis = before, after, axis

    def forward(self, x: Tensor) -> Tensor:
        if not self.before and not self.after:
            return x
        sides = [0, 0] * (x.dim() - self.axis)
        sides[-2:] = [self.before, self.after]
        return nn.functional.pad(x, sides)

    def extra_repr(self) -> str:
        return f"{self.before}, {self.after}, axis={self.axis}"


class ChannelSplit(nn.Module):
    """Cuts one axis into pieces of given sizes."""

    def __init__(self, sizes: Sequence[int], axis: int) -> None:
        super().__init__()
        self.sizes, self.axis = tuple(int(size) for size in sizes), axis

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, list(self.sizes), self.axis)

    def extra_repr(self) -> str:
        return f"{self.sizes}, axis={self.axis}"


class ChannelSlice(nn.Module):
    """The positions start … stop - 1 of one axis."""

    def __init__(self, start: int, stop: int, axis: int) -> None:
        super().__init__()
        self.start, self.stop, self.axis = start, stop, axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.narrow(x, self.axis, self.start, self.stop - self.start)

    def extra_repr(self) -> str:
        return f"{self.start}, {self.stop}, axis={self.axis}"


class ChannelGather(nn.Module):
    """Picks positions of one axis in a given order; a channel shuffle becomes one of these."""

    indices: Tensor

    def __init__(self, indices: Sequence[int], axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", torch.tensor([int(i) for i in indices], dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.index_select(x, self.axis, self.indices)

    def extra_repr(self) -> str:
        return f"{len(self.indices)} positions, axis={self.axis}"


class InTraining(nn.Module):
    """A module that only acts while training (stochastic depth): in eval mode it gives its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.module(x)) if self.training else x


class Applied(nn.Module):
    """A function of the user's as one operator: an autograd function, whose own backward stays, or TorchScript's."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.function, "apply", self.function)(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Applied:
        return Applied(self.function).train(self.training)

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__qualname__", self.function))


class ScaledAttention(nn.Module):
    """softmax(scale q kᵀ + mask) v over (…, positions, channels); the scale stays when channels go."""

    def __init__(self, scale: float, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.scale, self.dropout, self.causal = scale, dropout, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, self.causal, scale=self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, dropout={self.dropout}, causal={self.causal}"


class Normalize(nn.Module):
    """x / ‖x‖₂ along one axis."""

    def __init__(self, axis: int, eps: float) -> None:
        super().__init__()
        self.axis, self.eps = axis, eps

    def forward(self, x: Tensor) -> Tensor:
        length = cast(Tensor, x.norm(2.0, self.axis, keepdim=True))
        return x / length.clamp_min(self.eps)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


class RMSNorm(nn.RMSNorm):
    """The same norm in operations that every ONNX opset has."""

    def __init__(self, source: nn.RMSNorm) -> None:
        super().__init__(source.normalized_shape, source.eps, source.weight is not None)
        self.weight = source.weight

    def forward(self, x: Tensor) -> Tensor:
        axes = list(range(-len(self.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        y: Tensor = x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
        return y if self.weight is None else y * self.weight


class Einsum(nn.Module):
    """torch.einsum of a fixed equation."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *operands: Tensor) -> Tensor:
        return torch.einsum(self.equation, *operands)

    def extra_repr(self) -> str:
        return self.equation


class Attention(nn.Module):
    """nn.MultiheadAttention written out, so that its projections are layers like any other.

    in_proj where query, key and value are one tensor, else q_proj, k_proj and v_proj.
    """

    in_proj_bias = None  # what torch's own encoder layer asks, so that it takes the path through `forward`

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = source.num_heads, source.batch_first
        self.width, self.dropout = source.embed_dim, source.dropout
        self.out_proj = _linear(source.out_proj.weight, source.out_proj.bias)
        bias = source.in_proj_bias
        parts: list[Tensor | None] = [None] * 3 if bias is None else list(bias.detach().chunk(3))
        joint = cast("nn.Parameter | None", source.in_proj_weight)  # None where key or value have a width of their own
        weights: list[Tensor] = [source.q_proj_weight, source.k_proj_weight, source.v_proj_weight]
        if joint is not None:
            self.in_proj = _linear(joint, bias)
            weights = list(joint.detach().chunk(3))
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, parts, strict=True))
        self.attention = ScaledAttention(1.0 / math.sqrt(source.head_dim), source.dropout)

    @staticmethod
    def covers(source: nn.MultiheadAttention) -> bool:
        """Whether this is written out here: learned extra keys are not."""
        return source.bias_k is None and source.bias_v is None and not source.add_zero_attn

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query is key and key is value and hasattr(self, "in_proj"):
            q, k, v = self.in_proj(query).chunk(3, dim=-1)
        else:
            q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        size = self.width // self.heads
        q, k, v = (x.reshape(x.shape[0], x.shape[1], self.heads, size).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q)
        y = (self.attention(q, k, v) if mask is None else self.attention(q, k, v, mask)).transpose(1, 2)
        y = self.out_proj(y.reshape(y.shape[0], y.shape[1], self.width))
        y = y if self.batch_first else y.transpose(0, 1)
        if not need_weights:
            return y, None
        weights = torch.matmul(q * self.attention.scale, k.transpose(-2, -1))
        weights = (weights if mask is None else weights + mask).softmax(-1)
        return y, weights.mean(1) if average_attn_weights else weights

    def _mask(self, mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added: (L, S) or (N, heads, L, S)."""
        added = None
        if mask is not None:
            added = _added(mask, q)
            if added.dim() == 3:
                added = added.reshape(q.shape[0], self.heads, added.shape[-2], added.shape[-1])
        if padding is not None:
            more = _added(padding, q).unsqueeze(1).unsqueeze(2)
            added = more if added is None else added + more
        return added


def _added(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of given parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.clone())
    return layer
