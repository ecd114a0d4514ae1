"""A traced graph brought to the forms that rules and surgery know.

- what has several spellings gets one (plain.py), functional dropout becomes a module,
- weights of convolutions that are computed from parameters are stored (weights.py),
- layers called as functions on parameters (`F.linear(x, self.qkv.weight)`) become modules at the parameters' place,
- norms without parameters get ones and zeros that do not train, so that their width is a parameter's,
- what counts or indexes channels becomes a named module of operators.py; a shuffle becomes one gather, and a fold into
  (3, heads, channels) that is taken apart again becomes a split and three folds.
"""

from __future__ import annotations

import math
import operator
import string
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pipeline.prune import operators
from pipeline.prune.plain import plain
from pipeline.prune.weights import hold, store

Shape = tuple[int, ...]
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    F.dropout: nn.Dropout, torch.dropout: nn.Dropout, F.dropout2d: nn.Dropout2d, F.alpha_dropout: nn.AlphaDropout,
}  # fmt: skip
_ADDS = {operator.add, torch.add}
_ELEMENTWISE: set[Any] = {*_ADDS, operator.mul, torch.mul, operator.sub, torch.sub, operator.truediv, "mul", "add"}
_RESHAPES = {torch.flatten, torch.reshape, torch.unflatten, Tensor.view, Tensor.reshape, Tensor.flatten}
_RESHAPE_METHODS = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}
_MOVES = {torch.permute, torch.transpose, torch.swapaxes, torch.movedim}
_MOVE_METHODS = {"permute", "transpose", "contiguous", "swapaxes", "movedim"}


def lower(graph: fx.GraphModule) -> None:
    """Rewrite a traced graph in place; every node's meta holds its `shape`, and `wider` for one sample more."""
    _Lowering(graph).run()


def call_new(module: fx.GraphModule, before: fx.Node, name: str, made: nn.Module, args: tuple[Any, ...]) -> fx.Node:
    """A call of a new module at the root; node and module have one name, `name` where no node has had that."""
    while True:
        with module.graph.inserting_before(before):
            node = module.graph.create_node("call_module", name, args, {}, name=name)
        if not hasattr(module, node.name):
            break
        module.graph.erase_node(node)
    node.target = node.name
    module.add_module(node.name, made)
    made.train(module.training)
    return node


class _Lowering:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.module, self.graph = graph, graph.graph
        self.count: dict[str, int] = {}

    def run(self) -> None:
        plain(self.module)
        store(self.module)
        for node in list(self.graph.nodes):
            self._functional(node)
        self._affine()
        for node in list(self.graph.nodes):
            self._named(node)
        self.graph.eliminate_dead_code()
        _fuse_shuffles(self)
        _open_folds(self)
        self.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()

    # --- building blocks -------------------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        """A name at the root that nothing has."""
        while True:
            self.count[stem] = self.count.get(stem, -1) + 1
            name = f"{stem}_{self.count[stem]}"
            if not hasattr(self.module, name):
                return name

    def call(self, before: fx.Node, stem: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """A call of a new module at the root under the name of the node itself."""
        return call_new(self.module, before, self.fresh(stem), module, args)

    def insert(self, before: fx.Node, stem: str, module: nn.Module, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        """A call of a new module at the root; `like` gives its shape."""
        node = self.call(before, stem, module, args)
        node.meta = dict(like.meta)
        return node

    def replace(self, node: fx.Node, stem: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
        """A call of a new module in a node's place."""
        new = self.insert(node, stem, module, args, node)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def owner(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    # --- functions on parameters -----------------------------------------------------------------------------------

    def _functional(self, node: fx.Node) -> None:
        if node.op == "call_function" and node.target in _LAYERS:
            names, build = _LAYERS[node.target]
            bound = dict(zip(names, node.args, strict=False)) | node.kwargs
            tensors: dict[str, Any] = {
                role: bound.get(role) for role in ("weight", "bias", "running_mean", "running_var")
            }
            used = {role: value for role, value in tensors.items() if value is not None}
            if all(isinstance(value, fx.Node) and value.op == "get_attr" for value in used.values()):
                values = {role: self._value(cast(fx.Node, value)) for role, value in used.items()}
                made = build(bound, values)
                if made is not None:
                    self._settle(node, made, {r: str(cast(fx.Node, n).target) for r, n in used.items()}, values)

    def _value(self, node: fx.Node) -> Tensor:
        return cast(Tensor, operator.attrgetter(str(node.target))(self.module))

    def _settle(self, node: fx.Node, made: nn.Module, names: dict[str, str], values: dict[str, Tensor]) -> None:
        """Put a layer where its parameters are, and call it."""
        for role, value in values.items():
            hold(made, role, value)
        made.train(self.module.training)
        owners = {name.rpartition(".")[0] for name in names.values()}
        path = next(iter(owners)) if len(owners) == 1 else ""
        fits = bool(path) and all(name == f"{path}.{role}" for role, name in names.items())
        current = self.module.get_submodule(path) if fits else None
        if current is not None and _same_layer(current, made):
            pass
        elif current is not None and not self._called(path):
            for child, module in current.named_children():
                made.add_module(child, module)
            for name, value in [*current.named_parameters(recurse=False), *current.named_buffers(recurse=False)]:
                if not isinstance(getattr(made, name, None), Tensor):
                    hold(made, name, value)
            self.module.set_submodule(path, made)
        else:
            path = self.fresh(type(made).__name__.lower())
            self.module.add_module(path, made)
        with self.graph.inserting_before(node):
            new = self.graph.call_module(path, (node.args[0],))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        for name in names.values():
            if not fits:
                self._release(name)

    def _release(self, name: str) -> None:
        """A tensor that a new layer has taken over goes from where it was, if nothing else reads it there."""
        path, _, leaf = name.rpartition(".")
        calls = [str(n.target) for n in self.graph.nodes if n.op == "call_module"]
        reads = [n for n in self.graph.nodes if n.op == "get_attr" and n.target == name]
        if any(path == call or path.startswith(f"{call}.") for call in calls) or any(n.users for n in reads):
            return
        for node in reads:
            self.graph.erase_node(node)
        delattr(self.module.get_submodule(path), leaf)

    def _called(self, path: str) -> bool:
        return any(n.op == "call_module" and n.target == path for n in self.graph.nodes)

    @torch.no_grad()
    def _affine(self) -> None:
        """Ones and zeros for norms without parameters that are called here; RMS norms in a form that ONNX has."""
        for node in self.graph.nodes:
            module = self.owner(node)
            if type(module) is nn.RMSNorm:
                self.module.set_submodule(str(node.target), operators.RMSNorm(module))
            norm = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase)
            if module is not None and norm and getattr(module, "weight", 0) is None:
                if isinstance(module, nn.LayerNorm):
                    shape: Shape = tuple(module.normalized_shape)
                    module.elementwise_affine = True
                else:
                    shape = (int(getattr(module, "num_channels", getattr(module, "num_features", 0))),)
                    module.affine = True  # type: ignore[assignment]
                module.weight = nn.Parameter(torch.ones(shape), requires_grad=False)
                module.bias = nn.Parameter(torch.zeros(shape), requires_grad=False)

    # --- what counts or indexes channels ---------------------------------------------------------------------------

    def _named(self, node: fx.Node) -> None:
        target, module = node.target, self.owner(node)
        bound = _bound(node)
        method = str(target) if node.op == "call_method" else ""
        function = target if node.op == "call_function" else None
        if isinstance(module, nn.ChannelShuffle):
            self._shuffle(node, int(module.groups))
        elif isinstance(module, nn.Flatten | nn.Unflatten) or function in _RESHAPES or method in _RESHAPE_METHODS:
            self._reshape(node)
        elif (function in _ADDS or method == "add") and len(node.args) == 2 and not node.kwargs:
            if all(is_activation(a) for a in node.args):
                self.replace(node, "residual_add", operators.ResidualAdd(), tuple(node.args))
        elif function in _DROPOUTS:
            self.replace(node, "dropout", _DROPOUTS[function](float(bound.get("p", 0.5))), (node.args[0],))
        elif function is F.pad:
            self._pad(node)
        elif function in (torch.split, torch.chunk, torch.tensor_split) or method in ("split", "chunk", "tensor_split"):
            self._split(node)
        elif function in (torch.unbind,) or method == "unbind":
            self._unbind(node)
        elif function is operator.getitem:
            self._index(node)
        elif function is torch.repeat_interleave or method == "repeat_interleave":
            self._repeat(node)
        elif function in (torch.index_select, torch.narrow) or method in ("index_select", "narrow"):
            self._select(node)
        elif function is not None and getattr(function, "__name__", "") == "channel_shuffle":
            self._shuffle(node, int(bound["groups"]))
        elif method in ("expand", "expand_as") or function is Tensor.expand:
            self._expand(node)
        elif function is F.normalize:
            self._normalize(node)
        elif isinstance(module, nn.PixelUnshuffle) or function in (F.pixel_unshuffle, torch.pixel_unshuffle):
            factor = module.downscale_factor if isinstance(module, nn.PixelUnshuffle) else bound["downscale_factor"]
            self._unshuffle(node, int(factor))
        elif function is F.scaled_dot_product_attention:
            self._attention(node)
        elif function is torch.einsum and isinstance(node.args[0], str):
            operands = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            equation = _spelled(node.args[0].replace(" ", ""), [shape_of(each) for each in operands])
            if equation is not None:
                self.replace(node, "einsum", operators.Einsum(equation), tuple(operands))

    def _reshape(self, node: fx.Node) -> None:
        source, new, wider = node.args[0], node.meta.get("shape"), node.meta.get("wider")
        if not isinstance(source, fx.Node) or not isinstance(new, tuple) or not isinstance(wider, tuple):
            return
        if shape_of(source) == new and source.meta.get("wider") == wider:
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)
            return
        free = [axis for axis, (a, b) in enumerate(zip(new, wider, strict=True)) if a != b]
        if len(free) <= 1:
            sizes = [-1 if axis in free else n for axis, n in enumerate(new)]
            self.replace(node, "reshape", operators.Reshape(sizes), (source,))

    def _pad(self, node: fx.Node) -> None:
        source, shape = node.args[0], shape_of(node.args[0])
        sides = list(cast(Sequence[Any], node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())))
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
        if shape is None or mode != "constant" or value not in (None, 0, 0.0) or not all(type(s) is int for s in sides):
            return
        at = 2 * (len(shape) - 2)
        if len(sides) <= at or not (sides[at] or sides[at + 1]) or min(sides) < 0 or any(sides[at + 2 :]):
            return
        spatial = sides[:at]
        if any(spatial):
            with self.graph.inserting_before(node):
                padded = self.graph.call_function(F.pad, (source, spatial))
            padded.meta = {key: (*node.meta[key][:1], shape[1], *node.meta[key][2:]) for key in ("shape", "wider")}
            source = padded
        self.replace(node, "channel_pad", operators.ChannelPad(int(sides[at]), int(sides[at + 1]), 1), (source,))

    def _split(self, node: fx.Node) -> None:
        source, shape = node.args[0], shape_of(node.args[0])
        axis = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        pieces = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
        if shape is None or not isinstance(axis, int) or axis % len(shape) == 0 or not pieces:
            return
        sizes = [part[axis % len(shape)] for part in node.meta["shape"]]
        self.replace(node, "channel_split", operators.ChannelSplit(sizes, axis % len(shape)), (source,))

    def _unbind(self, node: fx.Node) -> None:
        """Pieces of unbind become selections by one index."""
        source, shape = node.args[0], shape_of(node.args[0])
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if shape is None or not isinstance(axis, int):
            return
        for user in list(node.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                index = user.args[1] % shape[axis % len(shape)]
                user.args = (source, (*[slice(None)] * (axis % len(shape)), index))

    def _select(self, node: fx.Node) -> None:
        source, shape, bound = node.args[0], shape_of(node.args[0]), _bound(node)
        axis, index = bound.get("dim"), bound.get("index")
        if shape is None or not isinstance(axis, int) or axis % len(shape) == 0:
            return
        axis %= len(shape)
        if isinstance(index, fx.Node):
            if index.op == "get_attr":
                self._gather(node, axis, torch.arange(shape[axis])[self._value(index).long()])
            return
        start, length = bound.get("start"), bound.get("length")
        if type(start) is int and type(length) is int:
            start %= shape[axis]
            self.replace(node, "channel_slice", operators.ChannelSlice(start, start + length, axis), (source,))

    def _index(self, node: fx.Node) -> None:
        """x[:, buffer]: an index or a mask that is known picks positions of one axis."""
        source, shape = node.args[0], shape_of(node.args[0])
        parts: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        at = [place for place, part in enumerate(parts) if isinstance(part, fx.Node)]
        if len(at) != 1 or shape is None or not is_activation(source):
            return
        (place,) = at
        if any(part is not Ellipsis and part != slice(None) for i, part in enumerate(parts) if i != place):
            return
        axis = len(shape) - len(parts) + place if Ellipsis in parts[:place] else place
        index = parts[place]
        if axis and index.op == "get_attr" and self._value(index).dim() == 1:
            self._gather(node, axis, torch.arange(shape[axis])[self._value(index)])

    def _repeat(self, node: fx.Node) -> None:
        """Every position of one axis so many times: one number for all, or a buffer with one for each."""
        shape, bound = shape_of(node.args[0]), _bound(node)
        axis, times = bound.get("dim"), bound.get("repeats")
        if shape is None or not isinstance(axis, int) or axis % len(shape) == 0 or not is_activation(node.args[0]):
            return
        if isinstance(times, fx.Node) and times.op == "get_attr":
            times = self._value(times)
        if isinstance(times, int | Tensor):
            self._gather(node, axis % len(shape), torch.arange(shape[axis]).repeat_interleave(times))

    def _gather(self, node: fx.Node, axis: int, positions: Tensor) -> None:
        self.replace(node, "channel_gather", operators.ChannelGather(positions.tolist(), axis), (node.args[0],))

    def _shuffle(self, node: fx.Node, groups: int) -> None:
        shape = shape_of(node.args[0])
        if shape is not None:
            order = torch.arange(shape[1]).reshape(groups, -1).t().flatten().tolist()
            self.replace(node, "channel_gather", operators.ChannelGather(order, 1), (node.args[0],))

    def _expand(self, node: fx.Node) -> None:
        """Sizes that an expand does not change are -1, so that they may change; one that only broadcasts goes."""
        shape, out = shape_of(node.args[0]), shape_of(node)
        if node.users and all(_broadcasts(user, node) for user in node.users):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            self.graph.erase_node(node)
            return
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
        if shape is None or out is None or len(cast(Any, sizes)) != len(out):
            return
        old = (*[0] * (len(out) - len(shape)), *shape)
        kept = [
            -1 if old[axis] == out[axis] and type(size) is int else size for axis, size in enumerate(cast(Any, sizes))
        ]
        node.args = (node.args[0], *kept)

    def _normalize(self, node: fx.Node) -> None:
        bound: dict[str, Any] = dict(zip(("input", "p", "dim", "eps"), node.args, strict=False)) | node.kwargs
        if bound.get("p", 2) in (2, 2.0) and isinstance(bound.get("dim", 1), int):
            made = operators.Normalize(bound.get("dim", 1), float(bound.get("eps", 1e-12)))
            self.replace(node, "normalize", made, (node.args[0],))

    def _unshuffle(self, node: fx.Node, r: int) -> None:
        """Taken apart into a fold, a permute and a fold."""
        shape, wider = shape_of(node.args[0]), shape_of(node)
        if shape is None or wider is None or len(shape) != 4:
            return
        (n, c, h, w), wide = shape, node.meta["wider"][0]
        inner, outer = (c, h // r, r, w // r, r), (c * r * r, h // r, w // r)
        fold = self.insert(node, "reshape", operators.Reshape((-1, *inner)), (node.args[0],), node)
        fold.meta = {"shape": (n, *inner), "wider": (wide, *inner)}
        with self.graph.inserting_before(node):
            moved = self.graph.call_method("permute", (fold, 0, 1, 3, 5, 2, 4))
        moved.meta = {key: (b, c, r, r, h // r, w // r) for key, b in (("shape", n), ("wider", wide))}
        self.replace(node, "reshape", operators.Reshape((-1, *outer)), (moved,))

    def _attention(self, node: fx.Node) -> None:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        bound: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        shape = shape_of(bound["query"])
        if shape is None or bound.get("enable_gqa"):
            return
        scale = bound.get("scale")
        scale = shape[-1] ** -0.5 if scale is None else float(scale)
        made = operators.ScaledAttention(scale, float(bound.get("dropout_p") or 0.0), bool(bound.get("is_causal")))
        mask = bound.get("attn_mask")
        args = (bound["query"], bound["key"], bound["value"])
        self.replace(node, "attention", made, args if mask is None else (*args, mask))


def _spelled(equation: str, shapes: Sequence[Shape | None]) -> str | None:
    """An equation of einsum with its result and with letters for its dots, None where the dots are broadcast."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    if "." not in equation:
        return f"{left}->{right}"
    free = [letter for letter in string.ascii_letters if letter not in equation]
    covered = set()
    for term, shape in zip(terms, shapes, strict=True):
        if shape is None:
            return None
        before, dots, after = term.partition("...")
        if dots:
            covered.add(shape[len(before) : len(shape) - len(after)])
    if len(covered) != 1:
        return None
    return f"{left}->{right}".replace("...", "".join(free[: len(covered.pop())]))


def _broadcasts(user: fx.Node, operand: fx.Node) -> bool:
    """An element-wise operation that has an operand of the full shape beside this one."""
    others = [shape_of(other) for other in user.all_input_nodes if other is not operand]
    return user.target in _ELEMENTWISE and shape_of(operand) is not None and shape_of(operand) in others


_ARGUMENTS = {
    "repeat_interleave": ("input", "repeats", "dim"),
    "narrow": ("input", "dim", "start", "length"), "index_select": ("input", "dim", "index"),
    "channel_shuffle": ("input", "groups"), "pixel_unshuffle": ("input", "downscale_factor"),
    "dropout": ("input", "p"), "dropout2d": ("input", "p"), "alpha_dropout": ("input", "p"),
}  # fmt: skip


def _bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of a function or method by their names, whichever way they were given."""
    names = _ARGUMENTS.get(str(getattr(node.target, "__name__", node.target)), ())
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def shape_of(value: Any) -> Shape | None:
    """Shape of what a node gives, where that is one tensor."""
    shape = value.meta.get("shape") if isinstance(value, fx.Node) else None
    return shape if isinstance(shape, tuple) else None


def is_activation(value: Any) -> bool:
    """A tensor that is computed."""
    return shape_of(value) is not None and value.op != "get_attr"


# --- layers from functions -----------------------------------------------------------------------------------------


def _conv(kind: type[nn.Module]) -> Callable[[dict[str, Any], dict[str, Tensor]], nn.Module | None]:
    def build(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module | None:
        weight, groups = values["weight"], int(bound.get("groups", 1))
        out, into = weight.shape[0], weight.shape[1] * groups
        rest = {key: bound[key] for key in ("stride", "padding", "output_padding", "dilation") if key in bound}
        transposed = kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed:
            out, into = weight.shape[1] * groups, weight.shape[0]
        rest = {key: tuple(v) if isinstance(v, list) else v for key, v in rest.items()}
        make: Any = kind
        return cast(
            nn.Module,
            make(into, out, tuple(weight.shape[2:]), groups=groups, bias="bias" in values, device="meta", **rest),
        )

    return build


def _linear(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module:
    out, into = values["weight"].shape
    return nn.Linear(into, out, bias="bias" in values, device="meta")


def _batch_norm(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module | None:
    if "running_mean" not in values or "running_var" not in values:
        return None
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[
        len(cast(Shape, shape_of(bound["input"])))
    ]
    made: nn.Module = kind(
        len(values["running_mean"]), eps=bound.get("eps", 1e-5), momentum=bound.get("momentum") or 0.1,
        affine="weight" in values,
    )  # fmt: skip
    if "weight" in values and "bias" not in values:
        return None
    return made


def _layer_norm(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module:
    affine = "weight" in values
    shape = [int(n) for n in bound["normalized_shape"]]
    return nn.LayerNorm(shape, bound.get("eps", 1e-5), affine, "bias" in values or not affine)


def _rms_norm(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module:
    return nn.RMSNorm([int(n) for n in bound["normalized_shape"]], bound.get("eps"), "weight" in values)


def _group_norm(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module | None:
    shape = shape_of(bound["input"])
    if shape is None or ("weight" in values) != ("bias" in values):
        return None
    return nn.GroupNorm(int(bound["num_groups"]), shape[1], bound.get("eps", 1e-5), "weight" in values)


def _instance_norm(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module | None:
    shape, tracked = shape_of(bound["input"]), "running_mean" in values
    kinds: dict[int, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    if shape is None or len(shape) not in kinds or tracked == bool(bound.get("use_input_stats", True)):
        return None
    if ("weight" in values) != ("bias" in values) or tracked != ("running_var" in values):
        return None
    made: nn.Module = kinds[len(shape)](
        shape[1], bound.get("eps", 1e-5), bound.get("momentum", 0.1), "weight" in values, tracked
    )
    return made


def _prelu(bound: dict[str, Any], values: dict[str, Tensor]) -> nn.Module:
    return nn.PReLU(values["weight"].numel())


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DECONV = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_IN = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
_BN = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_LAYERS: dict[Any, tuple[tuple[str, ...], Callable[[dict[str, Any], dict[str, Tensor]], nn.Module | None]]] = {
    F.conv1d: (_CONV, _conv(nn.Conv1d)),
    F.conv2d: (_CONV, _conv(nn.Conv2d)),
    F.conv3d: (_CONV, _conv(nn.Conv3d)),
    F.conv_transpose1d: (_DECONV, _conv(nn.ConvTranspose1d)),
    F.conv_transpose2d: (_DECONV, _conv(nn.ConvTranspose2d)),
    F.conv_transpose3d: (_DECONV, _conv(nn.ConvTranspose3d)),
    F.linear: (("input", "weight", "bias"), _linear),
    F.batch_norm: (_BN, _batch_norm),
    F.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    F.rms_norm: (("input", "normalized_shape", "weight", "eps"), _rms_norm),
    F.group_norm: (("input", "num_groups", "weight", "bias", "eps"), _group_norm),
    F.instance_norm: (_IN, _instance_norm),
    F.prelu: (("input", "weight"), _prelu),
}


def _same_layer(current: nn.Module, made: nn.Module) -> bool:
    """The module that stands there computes what was called: the layer itself, called as a function."""
    biased = [getattr(module, "bias", None) is not None for module in (current, made)]
    return type(current) is type(made) and biased[0] == biased[1] and current.extra_repr() == made.extra_repr()


# --- shuffles and folds --------------------------------------------------------------------------------------------


def _moves(low: _Lowering, node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(shape_of(node), tuple):
        return False
    if node.op == "call_module":
        return isinstance(low.owner(node), operators.Reshape)
    if node.op == "call_method":
        return node.target in _MOVE_METHODS
    return node.op == "call_function" and node.target in _MOVES


def _fuse_shuffles(low: _Lowering) -> None:
    """reshape, transpose, reshape that only reorders channels becomes one gather."""
    for node in list(low.graph.nodes):
        if not _moves(low, node) or any(_moves(low, user) for user in node.users):
            continue
        chain, source = [node], node.args[0]
        while _moves(low, source) and len(source.users) == 1:
            chain.append(source)
            source = source.args[0]
        shape = shape_of(source)
        if len(chain) < 3 or shape is None or shape_of(node) != shape or len(shape) < 2:
            continue
        order = _order(low, list(reversed(chain)), shape)
        if order is not None:
            low.replace(node, "channel_gather", operators.ChannelGather(order, 1), (source,))
    low.graph.eliminate_dead_code()


def _order(low: _Lowering, chain: list[fx.Node], shape: Shape) -> list[int] | None:
    """The order in which a chain of movements lays the channels, where it does nothing else."""
    position = torch.arange(math.prod(shape)).reshape(shape)
    moved = _replay(low, chain, position)
    first = moved[0].reshape(shape[1], -1)[:, 0] // math.prod(shape[2:])
    return first.tolist() if torch.equal(moved, position.index_select(1, first % shape[1])) else None


def _replay(low: _Lowering, chain: list[fx.Node], value: Tensor) -> Tensor:
    for node in chain:
        if node.op == "call_module":
            value = low.module.get_submodule(str(node.target))(value)
        elif node.op == "call_method":
            value = getattr(value, str(node.target))(*node.args[1:], **node.kwargs)
        else:
            value = cast(Any, node.target)(value, *node.args[1:], **node.kwargs)
    return value


def permutation(node: fx.Node, rank: int) -> list[int] | None:
    """The order of axes that a permute, transpose or movedim makes; None for any other node."""
    name = getattr(node.target, "__name__", str(node.target))
    args = [*node.args[1:], *node.kwargs.values()]
    if name not in ("permute", "transpose", "swapaxes", "movedim", "t") or any(isinstance(a, fx.Node) for a in args):
        return None
    meta = torch.empty([2 + axis for axis in range(rank)], device="meta")
    moved = getattr(meta, name)(*node.args[1:], **node.kwargs)
    return [int(size) - 2 for size in moved.shape]


def _open_folds(low: _Lowering) -> None:
    """reshape C -> (n, …), permute, pick each of the n: a split of C into n, and for each a reshape and a permute."""
    for node in list(low.graph.nodes):
        shape, source = shape_of(node), node.args[0] if node.args else None
        if not isinstance(low.owner(node), operators.Reshape) or shape is None:
            continue
        old = shape_of(source)
        end, order = node, list(range(len(shape)))
        while len(end.users) == 1:
            user = next(iter(end.users))
            step = permutation(user, len(shape))
            if step is not None:
                order = [order[axis] for axis in step]
            elif not (user.op == "call_method" and user.target == "contiguous"):
                break
            end = user
        picks = [_picked(user, len(shape)) for user in end.users]
        if old is None or not picks or any(p is None for p in picks):
            continue
        axes = {cast("tuple[int, int]", p)[0] for p in picks}
        if len(axes) != 1:
            continue
        axis = order[next(iter(axes))]
        channel = len(old) - 1
        if axis < channel or shape[:channel] != old[:channel] or axis != channel:
            continue
        if math.prod(shape[channel:]) != old[channel]:
            continue
        _open(low, node, end, order, axis)


def _picked(user: fx.Node, rank: int) -> tuple[int, int] | None:
    """(axis, index) where a node takes one position of one axis and all of the others."""
    if user.target is not operator.getitem:
        return None
    parts: Any = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
    at = [i for i, part in enumerate(parts) if type(part) is int]
    if len(at) != 1 or any(part != slice(None) for i, part in enumerate(parts) if i != at[0]):
        return None
    return (at[0], int(cast(int, parts[at[0]]))) if len(parts) <= rank else None


def _open(low: _Lowering, node: fx.Node, end: fx.Node, order: list[int], axis: int) -> None:
    source = cast(fx.Node, node.args[0])
    shape, wide = cast(Shape, shape_of(node)), cast(Shape, node.meta["wider"])
    count, size = shape[axis], math.prod(shape[axis + 1 :])
    reshape = cast(operators.Reshape, low.owner(node))
    sizes = [n for i, n in enumerate(reshape.sizes) if i != axis]
    split = low.insert(node, "channel_split", operators.ChannelSplit([size] * count, axis), (source,), node)
    split.meta = {"shape": [(*cast(Shape, shape_of(source))[:axis], size)] * count}
    split.meta["wider"] = [(*source.meta["wider"][:axis], size)] * count
    left = [a - (a > axis) for a in order if a != axis]
    for user in list(end.users):
        found = cast("tuple[int, int]", _picked(user, len(shape)))
        with low.graph.inserting_before(user):
            piece = low.graph.call_function(operator.getitem, (split, found[1] % count))
        piece.meta = {"shape": split.meta["shape"][0], "wider": split.meta["wider"][0]}
        fold = low.insert(user, "reshape", operators.Reshape(sizes), (piece,), user)
        fold.meta = {
            "shape": tuple(n for i, n in enumerate(shape) if i != axis),
            "wider": tuple(n for i, n in enumerate(wide) if i != axis),
        }
        with low.graph.inserting_before(user):
            moved = low.graph.call_method("permute", (fold, *left))
        moved.meta = dict(user.meta)
        user.replace_all_uses_with(moved)
        low.graph.erase_node(user)
    low.graph.eliminate_dead_code()
