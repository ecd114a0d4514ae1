"""Torch-Pruning 1.6.1 (Fang et al., DepGraph, CVPR 2023) on a network, judged as ours are judged.

It prunes 30 % of every group by magnitude, called as its own examples call it: the layers that make the outputs are
ignored, attention of timm is announced by its heads, modules that keep their widths as numbers are told the new ones
(attention of timm, vision transformers of torchvision), and widths beside `nn.MultiheadAttention` are multiples of its
heads.

Which entries are left is not taken from the library's word. Every parameter carries its own flat indices as its
gradient, and the library slices gradients along with parameters: what the pruned network holds says what was kept. The
reference is the dense network with every removed entry zero, as inputs, outputs and biases of its layers, and with
norms over channels taking their statistics over the channels that stay. A cut that is right computes the same; both
run in float64 with the random weights that ours are compared with.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.coupling.steps import CUT, EQUAL, GAIN, difference
from pipeline.nouns import Topology
from pipeline.outputs import tensors
from pipeline.prune.capture import Network
from pipeline.prune.execute import masked_norm
from pipeline.prune.proof import randomised

Masks = dict[str, Tensor]

OUTCOMES = {
    "equal": "cut, and equal to the masked dense network",
    "scale": "cut, and equal once attention keeps the scale of the dense network",
    "nothing": "it finds nothing to prune",
    "refused": "it raises an error instead of pruning",
    "broken": "the pruned network does not run",
    "wrong": "the pruned network runs and computes something else",
    "unjudged": "the dense network could not be run as the judgement needs it",
    "late": "it did not end in time, or ended its process",
    "absent": "Torch-Pruning is not installed",
}
"""What can come out of it."""


def judge(model: nn.Module, example: tuple[Tensor, ...], network: Network | None) -> dict[str, Any]:
    """One column of the table. network: as ours captured it; it says which layers make outputs, and counts MACs."""
    try:
        found: dict[str, Any] = {"version": metadata.version("torch-pruning")}
    except metadata.PackageNotFoundError:
        return {"outcome": "absent", "reason": "torch-pruning is not installed"}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found |= _judged(model, example, network)
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def _judged(model: nn.Module, example: tuple[Tensor, ...], network: Network | None) -> dict[str, Any]:
    dense = randomised(model, 1, GAIN)  # type: ignore[arg-type]  # it copies and fills parameters of any module
    inputs = tuple(x.double() if x.is_floating_point() else x for x in example)
    try:
        outputs = _run(dense, inputs)
    except Exception as error:  # noqa: BLE001  numbers of another kind are written into its code
        return {"outcome": "unjudged", "reason": _said(error)}
    pruned = copy.deepcopy(dense)
    tag(pruned)
    start = time.perf_counter()
    try:
        prune(pruned, inputs, ignored(pruned, outputs, network))
    except Exception as error:  # noqa: BLE001  whatever goes wrong is the result
        return {"outcome": "refused", "reason": _said(error)}
    found: dict[str, Any] = {"prune_s": round(time.perf_counter() - start, 2)}
    masks = kept(dense, pruned)
    if not masks:
        return found | {"outcome": "nothing"}
    found |= _shares(dense, pruned, network)
    try:
        got = _run(pruned, inputs)
    except Exception as error:  # noqa: BLE001  whatever goes wrong is the result
        return found | {"outcome": "broken", "reason": _said(error)}
    scales: list[float] = []
    with masked(dense, masks), scaled(lambda width: scales.append(width**-0.5)):
        expected = _run(dense, inputs)
    found["difference"] = difference(expected, got)
    if found["difference"] < EQUAL:
        return found | {"outcome": "equal"}
    if scales:
        again = iter(scales)
        with scaled(lambda width: next(again, None)):
            found["difference_at_scale"] = difference(expected, _run(pruned, inputs))
        if found["difference_at_scale"] < EQUAL:
            return found | {"outcome": "scale"}
    return found | {"outcome": "wrong"}


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused layers of transformers ask for no scale
    try:
        return tensors(model(*inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _said(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:200]


# --- pruning -------------------------------------------------------------------------------------------------------


def prune(model: nn.Module, inputs: tuple[Tensor, ...], ignored_layers: Sequence[nn.Module]) -> None:
    """Prune in place. Dictionaries are given, since those of the defaults are shared by all pruners of a process."""
    import torch_pruning as tp

    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "num_heads") and _is_module(m, "qkv")}
    multi = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    pruner = tp.pruner.BasePruner(
        model, inputs, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=CUT,
        ignored_layers=list(ignored_layers), round_to=max(multi, default=None), in_channel_groups={},
        out_channel_groups={}, num_heads=heads,
    )  # fmt: skip
    pruner.step()
    for module in model.modules():
        if _is_module(module, "qkv") and module.qkv in pruner.num_heads:
            _tell_heads(module, pruner.num_heads[module.qkv])
        if hasattr(module, "hidden_dim") and _is_module(module, "conv_proj"):  # vision transformers of torchvision
            module.hidden_dim = module.conv_proj.out_channels


def _tell_heads(module: Any, heads: int) -> None:
    """What attention of timm knows of its own widths."""
    width = getattr(module.qkv, "out_features", None) or module.qkv.out_channels
    module.num_heads, module.head_dim = heads, width // (3 * heads)
    if hasattr(module, "attn_dim"):
        module.attn_dim = heads * module.head_dim


def _is_module(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear | nn.Conv2d)


def ignored(model: nn.Module, outputs: Sequence[Tensor], network: Network | None) -> list[nn.Module]:
    """Layers that make the network's outputs: those that ours froze for it, or else those as wide as an output."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    if network is not None:
        names = _makers(network.topology)
        return [module for name, module in layers.items() if name in names]
    widths = {size for out in outputs for size in out.shape[1:]}
    return [m for m in layers.values() if getattr(m, "out_features", getattr(m, "out_channels", None)) in widths]


def _makers(topology: Topology) -> set[str]:
    frozen = [group for group in topology.groups if group.frozen == "it is an output of the network"]
    return {member.removesuffix(".weight[0]") for g in frozen for member in g.members if member.endswith(".weight[0]")}


# --- what was kept -------------------------------------------------------------------------------------------------


def tag(model: nn.Module) -> None:
    """Every parameter's gradient becomes its flat indices."""
    for value in model.parameters():
        value.grad = torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape)


def kept(dense: nn.Module, pruned: nn.Module) -> Masks:
    """Parameter -> ones where an entry is left and zeros where it is gone, for those that lost entries."""
    left, masks = dict(pruned.named_parameters()), {}
    for name, value in dense.named_parameters():
        tags = left[name].grad if name in left else None
        if tags is not None and tags.numel() < value.numel():
            masks[name] = torch.zeros_like(value)
            masks[name].view(-1)[tags.flatten().long()] = 1
    return masks


def _shares(dense: nn.Module, pruned: nn.Module, network: Network | None) -> dict[str, float]:
    """Shares that are gone, and the share of MACs of layers that lost anything; MACs of layers as ours counts them."""
    before, after = dict(dense.named_parameters()), dict(pruned.named_parameters())
    total = sum(p.numel() for p in before.values())
    found = {"parameters_removed_at_30": round(1 - sum(p.numel() for p in after.values()) / total, 4)}
    layers = network.topology.layers if network is not None else ()
    macs, left, touched = 0, 0, 0
    for layer in layers:
        size = before[layer.weight].numel() if layer.weight in before else 0
        now = after[layer.weight].numel() if layer.weight in after else size
        macs += size * layer.positions
        left += now * layer.positions
        touched += size * layer.positions * (now < size)
    if macs:
        found |= {"macs_removed_at_30": round(1 - left / macs, 4), "macs_touched": round(touched / macs, 4)}
    return found


# --- the reference -------------------------------------------------------------------------------------------------


@contextmanager
def masked(dense: nn.Module, masks: Masks) -> Iterator[None]:
    """The dense network with removed entries zero and norms over what stays; its parameters stay changed."""
    with torch.no_grad():
        for name, value in dense.named_parameters():
            if name in masks:
                value.mul_(masks[name])
    changed = []
    for name, module in dense.named_modules():
        mask = masks.get(f"{name}.weight")
        if mask is not None and isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            module.forward = _norm(module, mask)  # type: ignore[method-assign]
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _norm(module: nn.LayerNorm | nn.GroupNorm | nn.RMSNorm, mask: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward of a norm that sees only some channels; norms named `…2d` have them on axis 1 of a map."""

    def forward(x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return masked_norm(module, x, mask.reshape(1, -1, *[1] * (x.dim() - 2)))
        if "2d" in type(module).__name__:
            return masked_norm(module, x.permute(0, 2, 3, 1), mask).permute(0, 3, 1, 2)
        return masked_norm(module, x, mask)

    return forward


@contextmanager
def scaled(scale: Callable[[int], float | None]) -> Iterator[None]:
    """Attention without a scale of its own asks this for one: (width of a head) -> scale, or None for the default."""
    plain = functional.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **options: Any) -> Tensor:
        if options.get("scale") is None:
            options["scale"] = scale(query.shape[-1])
        return plain(query, *args, **options)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
