"""fx nodes as neutral operator records: the one place that knows which torch call means which kind of operator."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from pipeline.nouns import Layer
from pipeline.prune import operators
from pipeline.prune.capture import Network
from pipeline.prune.labels import Op

_UNARY_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU,
    nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Identity,
    nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
)  # fmt: skip
_UNARY_FUNCTIONS = {
    F.relu, F.relu6, F.silu, F.gelu, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid, F.leaky_relu, F.elu, F.mish,
    F.softplus, F.hardtanh, torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.exp, torch.sqrt, torch.clamp,
    torch.neg, operator.neg, torch.square,
}  # fmt: skip
_UNARY_METHODS = {
    "relu", "sigmoid", "tanh", "abs", "exp", "sqrt", "clamp", "neg", "contiguous", "clone", "detach", "float",
    "square", "pow",
}  # fmt: skip
_BINARY = {
    operator.add, operator.mul, operator.sub, operator.truediv, operator.pow,
    torch.add, torch.mul, torch.sub, torch.div, torch.maximum, torch.minimum,
}  # fmt: skip
_BINARY_METHODS = {"add", "mul", "sub", "div"}
_SPATIAL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d,
)  # fmt: skip
_SPATIAL_FUNCTIONS = {
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.interpolate,
    F.max_pool1d, F.avg_pool1d, torch.max_pool2d, torch.adaptive_avg_pool1d, F.adaptive_avg_pool1d,
}  # fmt: skip
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def describe(network: Network) -> list[Op]:
    """Every operator of the captured network in execution order: inputs, parameters used directly, the output too."""
    modules = dict(network.graph.named_modules())
    shapes = dict(network.shapes)
    for node in network.graph.graph.nodes:  # pieces of a split, parameters
        if node.op == "get_attr":
            shapes.setdefault(node.name, tuple(_attribute(network.graph, str(node.target)).shape))
    return [_op(network, node, modules, shapes) for node in network.graph.graph.nodes if _is_tensor(node, shapes)]


def _attribute(graph: fx.GraphModule, path: str) -> torch.Tensor:
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def _is_tensor(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> bool:
    return node.op in ("output",) or node.name in shapes or any(user.name in shapes for user in node.users)


def _tensors(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n.name in shapes]


def _op(network: Network, node: fx.Node, modules: dict[str, nn.Module], shapes: dict[str, tuple[int, ...]]) -> Op:
    inputs = _tensors(node, shapes)
    kind, params, attrs, pieces = _kind(network, node, modules, shapes)
    return Op(
        name=node.name,
        kind=kind,
        inputs=tuple(n.name for n in inputs),
        output=node.name,
        in_shapes=tuple(shapes[n.name] for n in inputs),
        out_shape=shapes.get(node.name, ()),
        params=params,
        attrs=attrs,
        pieces=pieces,
    )


Described = tuple[str, dict[str, str], dict[str, Any], tuple[str, ...]]


def _plain(kind: str, **attrs: Any) -> Described:
    return kind, {}, attrs, ()


def _kind(
    network: Network, node: fx.Node, modules: dict[str, nn.Module], shapes: dict[str, tuple[int, ...]]
) -> Described:
    if node.op in ("placeholder", "output"):
        return _plain("input" if node.op == "placeholder" else "output")
    if node.op == "get_attr":
        return "parameter", {"value": str(node.target)}, {}, ()
    if node.op == "call_module":
        return _module(network, node, modules[str(node.target)], shapes)
    if node.op == "call_method":
        return _method(node, shapes)
    return _function(node, shapes)


def _named(path: str, module: nn.Module, *roles: str) -> dict[str, str]:
    return {role: f"{path}.{role}" for role in roles if getattr(module, role, None) is not None}


def _module(network: Network, node: fx.Node, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Described:
    path = str(node.target)
    own = _constant_module(node, path, module)
    if own is not None:
        return own
    if isinstance(module, (*_CONVS, *_TRANSPOSED)):
        kind = "conv" if isinstance(module, _CONVS) else "conv_transpose"
        return kind, _named(path, module, "weight", "bias"), {"groups": module.groups}, ()
    if isinstance(module, nn.Linear):
        return "linear", _named(path, module, "weight", "bias"), {}, ()
    if isinstance(module, _BATCH_NORMS):
        return "batch_norm", _named(path, module, "weight", "bias", "running_mean", "running_var"), {}, ()
    if isinstance(module, _INSTANCE_NORMS):
        return "instance_norm", _named(path, module, "weight", "bias", "running_mean", "running_var"), {}, ()
    if isinstance(module, nn.GroupNorm):
        return "group_norm", _named(path, module, "weight", "bias"), {"groups": module.num_groups}, ()
    if isinstance(module, nn.LayerNorm):
        return (
            "layer_norm",
            _named(path, module, "weight", "bias"),
            {"normalized_axes": len(module.normalized_shape)},
            (),
        )
    if isinstance(module, nn.PReLU):
        return "prelu", _named(path, module, "weight"), {"parameters": module.num_parameters}, ()
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        return _plain("softmax", axis=-1 if module.dim is None else module.dim)
    if isinstance(module, _UNARY_MODULES):
        return _plain("unary")
    if isinstance(module, _SPATIAL_MODULES):
        return _plain("spatial")
    reason = network.leaves.get(path, f"there is no rule for {type(module).__name__} '{path}'")
    return _plain("leaf", reason=reason)


def _constant_module(node: fx.Node, path: str, module: nn.Module) -> Described | None:
    if isinstance(module, operators.ResidualAdd):
        return _plain("binary", module=path)
    if isinstance(module, operators.Reshape):
        return _plain("reshape", module=path)
    if isinstance(module, operators.ChannelPad):
        return _plain("channel_pad", module=path, before=module.before, after=module.after, axis=module.axis)
    if isinstance(module, operators.ChannelSlice):
        return _plain("slice", module=path, start=module.start, stop=module.stop, axis=module.axis)
    if isinstance(module, operators.ChannelGather):
        return _plain("gather", module=path, indices=module.indices.tolist(), axis=module.axis)
    if isinstance(module, operators.ChannelSplit):
        users = {int(cast(int, user.args[1])) % len(module.sizes): user.name for user in node.users}
        pieces = tuple(users.get(i, f"{node.name}[{i}]") for i in range(len(module.sizes)))
        return "split", {}, {"module": path, "sizes": module.sizes, "axis": module.axis}, pieces
    return None


def _axes(value: Any, rank: int) -> list[int]:
    axes = [value] if isinstance(value, int) else list(value or range(rank))
    return [int(a) % rank for a in axes]


def _reduce(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> Described:
    source = node.args[0]
    rank = len(shapes[source.name]) if isinstance(source, fx.Node) else 1
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keepdim = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    return _plain("reduce", axes=_axes(axes, rank), keepdim=bool(keepdim))


def _order(node: fx.Node, shapes: dict[str, tuple[int, ...]], transpose: bool) -> Described:
    source = node.args[0]
    rank = len(shapes[source.name]) if isinstance(source, fx.Node) else 1
    args = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    numbers = [int(a) % rank for a in args]  # type: ignore[arg-type]
    order = list(range(rank))
    if transpose:
        order[numbers[0]], order[numbers[1]] = order[numbers[1]], order[numbers[0]]
    else:
        order = numbers
    return (
        _plain("permute", order=order)
        if order[0] == 0
        else _plain("leaf", reason=f"'{node.name}' moves the batch axis")
    )


def _method(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> Described:
    name = str(node.target)
    if name in _UNARY_METHODS:
        return _plain("unary")
    if name in _BINARY_METHODS:
        return _plain("binary")
    if name in ("mean", "sum", "amax", "amin"):
        return _reduce(node, shapes)
    if name in ("permute", "transpose"):
        return _order(node, shapes, name == "transpose")
    if name in ("unsqueeze", "squeeze"):
        return _plain(name)
    if name in ("expand", "expand_as"):
        return _plain("expand")
    if name == "softmax":
        return _plain("softmax", axis=node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1))
    return _plain("leaf", reason=f"there is no rule for Tensor.{name} ('{node.name}')")


def _function(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> Described:
    target: Any = node.target
    if target in _UNARY_FUNCTIONS:
        return _plain("unary")
    if target in _BINARY:
        return _plain("binary")
    if target in _SPATIAL_FUNCTIONS:
        return _plain("spatial")
    if target is F.pad:
        return _spatial_pad(node, shapes)
    if target in (torch.cat, torch.concat):
        return _plain("cat", axis=node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0))
    if target in (torch.mean, torch.sum, torch.amax, torch.amin):
        return _reduce(node, shapes)
    if target in (torch.permute, torch.transpose):
        return _order(node, shapes, target is torch.transpose)
    if target in (torch.unsqueeze, torch.squeeze):
        return _plain(target.__name__)
    if target in (F.softmax, torch.softmax, F.log_softmax):
        return _plain("softmax", axis=node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else -1))
    if target is operator.getitem:
        return _spatial_getitem(node, shapes)
    return _plain("leaf", reason=f"there is no rule for {getattr(target, '__name__', target)} ('{node.name}')")


def _spatial_pad(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> Described:
    sides = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())
    source = node.args[0]
    rank = len(shapes[source.name]) if isinstance(source, fx.Node) else 0
    if isinstance(sides, tuple | list) and not any(sides[2 * (rank - 2) :]) and rank > 2:
        return _plain("spatial")
    return _plain("leaf", reason=f"'{node.name}' pads channels in a way that has no rule")


def _spatial_getitem(node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> Described:
    source, index = node.args
    if isinstance(source, fx.Node) and source.name not in shapes:
        return _plain("piece")
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(part, slice) for part in parts) and all(part == slice(None) for part in parts[:2])
    return _plain("spatial") if plain else _plain("leaf", reason=f"there is no rule for the index of '{node.name}'")


def layers(network: Network) -> tuple[Layer, ...]:
    """Convolutions and fully connected layers in execution order, a shared weight once for each use."""
    found = []
    for op in describe(network):
        if op.kind in ("conv", "conv_transpose", "linear"):
            weight = _attribute(network.graph, op.params["weight"])
            shape = op.in_shapes[0] if op.kind == "conv_transpose" else op.out_shape
            positions = math.prod(shape[2:]) if op.kind != "linear" else math.prod(shape[1:-1])
            found.append(Layer(op.params["weight"], tuple(weight.shape), positions))
    return tuple(found)
