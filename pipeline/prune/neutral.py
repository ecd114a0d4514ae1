"""fx nodes as neutral operator records: the one place that knows which torch call means which kind of operator."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from pipeline.nouns import Layer
from pipeline.prune import operators
from pipeline.prune.capture import Network
from pipeline.prune.folds import mark
from pipeline.prune.labels import Op
from pipeline.prune.lowering import permutation
from pipeline.prune.naming import is_custom, is_torch, kind_of, kind_of_node

Shapes = Mapping[str, tuple[int, ...]]
_UNARY_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU,
    nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.LogSigmoid, nn.Hardshrink, nn.Softshrink,
    nn.Tanhshrink, nn.Threshold, nn.RReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.AlphaDropout, nn.FeatureAlphaDropout, operators.InTraining,
)  # fmt: skip
_UNARY = {
    "relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "celu", "selu",
    "mish", "softplus", "softsign", "hardtanh", "logsigmoid", "abs", "exp", "sqrt", "rsqrt", "clamp", "clip",
    "clamp_min", "clamp_max", "neg", "square", "log", "sin", "cos", "erf", "reciprocal", "floor", "round", "contiguous",
    "clone", "detach", "float", "double", "half", "to", "type", "type_as", "dropout", "threshold", "hardshrink", "sign",
    "softshrink", "nan_to_num", "logical_not", "isnan", "bool", "absolute", "negative", "alpha_dropout",
}  # fmt: skip
_BINARY = {
    "add", "mul", "sub", "div", "truediv", "pow", "maximum", "minimum", "multiply", "subtract", "divide", "true_divide",
    "addcmul", "where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "and_", "or_",
    "rsub", "floordiv", "mod", "remainder", "lerp", "atan2", "__and__", "__or__", "floor_divide",
}  # fmt: skip
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "std", "var", "prod", "norm", "logsumexp", "any", "all"}
_BUILTIN: set[Any] = {round}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def describe(network: Network) -> list[Op]:
    """Every operator of the captured network in execution order: inputs, parameters used directly, the output too."""
    modules = dict(network.graph.named_modules())
    shapes = dict(network.shapes)
    for node in network.graph.graph.nodes:  # pieces of a split, parameters
        if node.op == "get_attr":
            shapes.setdefault(node.name, tuple(_attribute(network.graph, str(node.target)).shape))
    ops = [_op(network, node, modules, shapes) for node in network.graph.graph.nodes if _is_tensor(node, shapes)]
    mark(ops)
    return ops


def _attribute(graph: fx.GraphModule, path: str) -> torch.Tensor:
    return cast(torch.Tensor, operator.attrgetter(path)(graph))


def _is_tensor(node: fx.Node, shapes: Shapes) -> bool:
    """Leaves numbers out: sizes, and what is computed of them."""
    if node.op == "output" or node.name in shapes:
        return True
    return node.target != "size" and bool(_tensors(node, shapes)) and _gives_tensors(node, shapes)


def _gives_tensors(node: fx.Node, shapes: Shapes) -> bool:
    """Whether tensors come of a node that is none itself: pieces of a tuple, also of one inside it, or outputs."""
    pieces = [user for user in node.users if user.target in (operator.getitem, getattr)]
    direct = any(user.op == "output" or user.name in shapes for user in node.users)
    return direct or any(_gives_tensors(piece, shapes) for piece in pieces)


def _tensors(node: fx.Node, shapes: Shapes) -> list[fx.Node]:
    """Tensors that a node reads, in order, one that is read twice two times."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if n.name in shapes]


def _op(network: Network, node: fx.Node, modules: dict[str, nn.Module], shapes: Shapes) -> Op:
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


def _kind(network: Network, node: fx.Node, modules: dict[str, nn.Module], shapes: Shapes) -> Described:
    if node.op in ("placeholder", "output"):
        return _plain("input" if node.op == "placeholder" else "output")
    if node.op == "get_attr":
        return "parameter", {"value": str(node.target)}, {}, ()
    kind = kind_of_node(network.graph, node)
    if kind in network.rules:
        return _own(network, node, kind, shapes)
    if node.op == "call_module":
        return _module(network, node, modules[str(node.target)], shapes)
    return _method(node, shapes) if node.op == "call_method" else _function(node, shapes)


def _own(network: Network, node: fx.Node, kind: str, shapes: Shapes) -> Described:
    """An operator that a rule of the user's speaks for: all its parameters, and its own numbers.

    attrs: of a module the numbers and texts among its attributes, of a function `arguments` (None for a tensor) and
    keywords. pieces: what it gives where that is no single tensor, in order.
    """
    module = network.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    params: dict[str, str] = {}
    if module is None or isinstance(module, operators.Applied):
        attrs: dict[str, Any] = {name: value for name, value in node.kwargs.items() if _is_plain(value)}
        attrs["arguments"] = tuple(value if _is_plain(value) else None for value in node.args)
    else:
        tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        params = {name: f"{node.target}.{name}" for name, _ in tensors}
        own = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
        attrs = {name: value for name, value in own.items() if _is_plain(value)}
    pieces: tuple[str, ...] = ()
    if node.name not in shapes:
        taken = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
        count = max([len(node.meta.get("shape") or ()), *(i + 1 for i in taken if isinstance(i, int))])
        pieces = tuple(taken.get(i, f"{node.name}[{i}]") for i in range(count))
    return kind, params, attrs, pieces


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str)


def _named(path: str, module: nn.Module, *roles: str) -> dict[str, str]:
    return {role: f"{path}.{role}" for role in roles if getattr(module, role, None) is not None}


def _module(network: Network, node: fx.Node, module: nn.Module, shapes: Shapes) -> Described:
    path = str(node.target)
    own = _constant_module(node, path, module) or _layer(path, module)
    if own is not None:
        return own
    name = type(module).__name__
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        axis = -1 if module.dim is None else module.dim
        return _plain("softmax", axes=[axis], log=isinstance(module, nn.LogSoftmax))
    if isinstance(module, nn.Softmax2d):
        return _plain("softmax", axes=[1])
    if isinstance(module, _UNARY_MODULES):
        return _plain("unary")
    if isinstance(module, nn.GLU):
        return _plain("glu", axis=module.dim)
    if isinstance(module, nn.PixelShuffle):
        return _plain("pixel_shuffle", block=int(module.upscale_factor) ** 2)
    if isinstance(module, nn.Unfold):
        size = module.kernel_size
        return _plain("unfold", block=size**2 if isinstance(size, int) else math.prod(size))
    where = type(module).__module__.rpartition(".")[2]
    indexed = "Unpool" in name or getattr(module, "return_indices", False)
    if where in ("pooling", "padding") and name[-1] == "d" and not indexed:
        return _pool(node, shapes, int(name[-2]))
    if isinstance(module, nn.Upsample | nn.UpsamplingNearest2d | nn.UpsamplingBilinear2d):
        return _pool(node, shapes)
    called = kind_of(module) if isinstance(module, operators.Applied) else name
    reason = network.leaves.get(path, f"there is no rule for {called} '{path}'")
    return _plain("leaf", reason=reason)


def _layer(path: str, module: nn.Module) -> Described | None:
    """Layers with parameters."""
    both = _named(path, module, "weight", "bias")
    if isinstance(module, (*_CONVS, *_TRANSPOSED)):
        return "conv" if isinstance(module, _CONVS) else "conv_transpose", both, {"groups": module.groups}, ()
    if isinstance(module, nn.Linear):
        return "linear", both, {}, ()
    if isinstance(module, nn.Embedding):
        return "embedding", both, {}, ()
    if isinstance(module, (*_BATCH_NORMS, *_INSTANCE_NORMS)):
        kind = "batch_norm" if isinstance(module, _BATCH_NORMS) else "instance_norm"
        return kind, _named(path, module, "weight", "bias", "running_mean", "running_var"), {}, ()
    if isinstance(module, nn.GroupNorm):
        return "group_norm", both, {"groups": module.num_groups}, ()
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        kind = "layer_norm" if isinstance(module, nn.LayerNorm) else "rms_norm"
        return kind, both, {"normalized_axes": len(module.normalized_shape)}, ()
    if isinstance(module, nn.PReLU):
        return "prelu", both, {"parameters": module.num_parameters}, ()
    if isinstance(module, operators.ScaledAttention):
        return _plain("attention")
    if isinstance(module, operators.Normalize):
        return _plain("normalize", axis=module.axis)
    if isinstance(module, operators.Einsum):
        return _plain("einsum", equation=module.equation)
    return None


def _constant_module(node: fx.Node, path: str, module: nn.Module) -> Described | None:
    if isinstance(module, operators.ResidualAdd):
        return _plain("binary", module=path)
    if isinstance(module, operators.Reshape):
        return _plain("reshape", module=path, sizes=module.sizes)
    if isinstance(module, operators.ChannelPad):
        return _plain("channel_pad", module=path, before=module.before, after=module.after, axis=module.axis)
    if isinstance(module, operators.ChannelSlice):
        return _plain("slice", module=path, start=module.start, stop=module.stop, axis=module.axis)
    if isinstance(module, operators.ChannelGather):
        return _plain("gather", module=path, indices=module.indices.tolist(), axis=module.axis)
    if isinstance(module, operators.ChannelSplit):
        pieces = [f"{node.name}[{i}]" for i in range(len(module.sizes))]
        for user in node.users:
            pieces[int(cast(int, user.args[1])) % len(pieces)] = user.name
        return "split", {}, {"module": path, "sizes": module.sizes, "axis": module.axis}, tuple(pieces)
    return None


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.kwargs.get(name, node.args[position] if len(node.args) > position else default)


def _rank(node: fx.Node, shapes: Shapes) -> int:
    source = node.args[0]
    return len(shapes[source.name]) if isinstance(source, fx.Node) and source.name in shapes else 1


def _axes(value: Any, rank: int) -> list[int]:
    axes = [value] if isinstance(value, int) else list(value if value is not None else range(rank))
    return [int(a) % rank for a in axes]


def _reduce(node: fx.Node, shapes: Shapes) -> Described:
    how = str(getattr(node.target, "__name__", node.target))
    rank = _rank(node, shapes)
    keepdim = bool(_argument(node, 2, "keepdim", False))
    if how in ("max", "min"):
        if len(node.args) < 2 and "dim" not in node.kwargs:
            how, axes = f"a{how}", _axes(None, rank)
        else:
            return _plain("leaf", reason=f"there is no rule for {how} with indices ('{node.name}')")
    else:
        axes = _axes(_argument(node, 1, "dim"), rank)
    return _plain("reduce", axes=axes, keepdim=keepdim, how=how)


def _softmax(node: fx.Node, shapes: Shapes, *, log: bool = False) -> Described:
    axis = _argument(node, 1, "dim")
    return _plain("softmax", axes=[-1 if axis is None else axis], log=log)


def _pool(node: fx.Node, shapes: Shapes, count: int | None = None) -> Described:
    """count: how many of the last axes it runs over, all but two if left out."""
    rank = _rank(node, shapes)
    return _plain("spatial", axes=list(range(2 if count is None else rank - count, rank)))


def _method(node: fx.Node, shapes: Shapes) -> Described:
    name = str(node.target)
    return _call(node, name, shapes) or _plain("leaf", reason=f"there is no rule for Tensor.{name} ('{node.name}')")


def _function(node: fx.Node, shapes: Shapes) -> Described:
    target: Any = node.target
    name = str(getattr(target, "__name__", target))
    if target is operator.getitem:
        return _getitem(node, shapes)
    kind = kind_of(target)
    if is_custom(kind):
        return _plain("leaf", reason=f"there is no rule for {kind} ('{node.name}')")
    if target is getattr:
        name = str(node.args[1])
    found = _call(node, name, shapes) if is_torch(target) or target in _BUILTIN else None
    return found or _plain("leaf", reason=f"there is no rule for {name} ('{node.name}')")


def _call(node: fx.Node, name: str, shapes: Shapes) -> Described | None:
    """What a torch function or tensor method of this name does."""
    rank = _rank(node, shapes)
    if name in _UNARY:
        return _plain("unary")
    if name in _BINARY:
        return _plain("binary")
    if name in _REDUCTIONS:
        return _reduce(node, shapes)
    if name in ("softmax", "log_softmax"):
        return _softmax(node, shapes, log=name == "log_softmax")
    if name == "linear" and len(_tensors(node, shapes)) == len(node.all_input_nodes) > 1:
        return _plain("product")
    if name in ("matmul", "bmm", "__matmul__"):
        return _plain("matmul")
    if name in ("cat", "concat", "concatenate", "stack"):
        return _plain("stack" if name == "stack" else "cat", axis=_argument(node, 1, "dim", 0))
    if name in ("permute", "transpose", "swapaxes", "movedim", "t"):
        order = permutation(node, rank)
        return None if order is None else _plain("permute", order=order)
    if name in ("unsqueeze", "squeeze"):
        return _plain(name)
    if name in ("expand", "expand_as"):
        return _plain("expand")
    if name in ("repeat", "tile"):
        return _plain("repeat")
    if name == "glu":
        return _plain("glu", axis=_argument(node, 1, "dim", -1))
    if name in ("roll", "flip"):
        axes = _argument(node, 2 if name == "roll" else 1, "dims")
        return _plain("spatial", axes=_axes(axes, rank))
    if name == "pad":
        return _pad(node, shapes)
    if name == "pixel_shuffle":
        return _plain(name, block=int(_argument(node, 1, "upscale_factor")) ** 2)
    if name == "unfold" and rank == 4 and not isinstance(node.target, str):
        kernel = _argument(node, 1, "kernel_size")
        return _plain("unfold", block=kernel**2 if isinstance(kernel, int) else math.prod(kernel))
    for stem, count in (("1d", 1), ("2d", 2), ("3d", 3)):
        if "pool" in name and "unpool" not in name and name.endswith(stem):
            return _pool(node, shapes, count)
    if name in ("interpolate", "upsample", "grid_sample"):
        return _pool(node, shapes)
    return None


def _pad(node: fx.Node, shapes: Shapes) -> Described:
    sides = _argument(node, 1, "pad", ())
    rank = _rank(node, shapes)
    if not isinstance(sides, tuple | list):
        return _plain("leaf", reason=f"'{node.name}' pads by what is computed")
    padded = [rank - 1 - i // 2 for i, side in enumerate(sides) if side != 0]
    return _plain("spatial", axes=sorted(set(padded)))


def picked(node: fx.Node, shapes: Shapes) -> dict[int, tuple[int, list[int]]] | None:
    """Axes of which an index keeps some positions only: axis -> (place in the index, positions)."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in shapes:
        return None
    parts = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    shape, found, axis = shapes[source.name], {}, 0
    for place, part in enumerate(parts):
        if part is Ellipsis:
            axis += len(shape) - sum(p is not None and p is not Ellipsis for p in parts)
            continue
        if part is None:
            continue
        positions = _positions(part, shape[axis])
        if positions is not None and positions != list(range(shape[axis])):
            found[axis] = (place, positions)
        axis += 1
    return found


def _positions(part: Any, size: int) -> list[int] | None:
    """Positions that a slice or a list of numbers keeps, None where they are not known."""
    if isinstance(part, slice):
        bounds = (part.start, part.stop, part.step)
        return None if any(isinstance(b, fx.Node) for b in bounds) else list(range(size))[part]
    if isinstance(part, list | tuple) and all(type(i) is int for i in part):
        return [i % size for i in part]
    return None


def _getitem(node: fx.Node, shapes: Shapes) -> Described:
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in shapes:
        return _plain("piece")
    parts = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if len(parts) == 1 and isinstance(parts[0], fx.Node) and parts[0].name in shapes:
        return _plain("lookup")
    if any(isinstance(part, fx.Node | bool) for part in parts) or not all(
        part is None or part is Ellipsis or isinstance(part, int) or _positions(part, 1) is not None for part in parts
    ):
        return _plain("leaf", reason=f"there is no rule for the index of '{node.name}'")
    lists = [part for part in parts if isinstance(part, list | tuple)]
    if len(lists) > 1 or (lists and any(isinstance(part, int) for part in parts)):
        return _plain("leaf", reason=f"there is no rule for the index of '{node.name}'")
    rank, gone, new, axis, out = len(shapes[source.name]), [], [], 0, 0
    for part in parts:
        if part is None:
            new.append(out)
            out += 1
        elif part is Ellipsis:
            skipped = rank - sum(p is not None and p is not Ellipsis for p in parts)
            axis, out = axis + skipped, out + skipped
        elif isinstance(part, int):
            gone.append(axis)
            axis += 1
        else:
            axis, out = axis + 1, out + 1
    kept = {axis: positions for axis, (_, positions) in (picked(node, shapes) or {}).items()}
    return _plain("select", gone=gone, new=new, cut=kept)


def layers(network: Network) -> tuple[Layer, ...]:
    """Convolutions and fully connected layers in execution order, a shared weight once for each use."""
    found = []
    for op in describe(network):
        if op.kind in ("conv", "conv_transpose", "linear"):
            weight = _attribute(network.graph, op.params["weight"])
            applied, outputs = (_places(op.kind, shape, network) for shape in (op.in_shapes[0], op.out_shape))
            axis, written = 0, outputs
            if op.kind == "conv_transpose":  # weight (in, out / groups, k…)
                groups = int(op.attrs["groups"])
                depthwise = groups > 1 and groups == len(weight)
                axis, written = (0, outputs * weight.shape[1]) if depthwise else (1, outputs * groups)
            positions = applied if op.kind == "conv_transpose" else outputs
            found.append(Layer(op.params["weight"], tuple(weight.shape), positions, axis, written))
    return tuple(found)


def _places(kind: str, shape: Sequence[int], network: Network) -> int:
    """Places of a tensor beside its channels, per sample, where samples may have been folded into the batch."""
    places = math.prod(shape[1:-1] if kind == "linear" else shape[2:])
    return places * (max(1, shape[0] // len(network.example[0])) if network.example[0].dim() else 1)
