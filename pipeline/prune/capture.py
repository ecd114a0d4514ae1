"""A network as an editable graph: torch.fx with modules kept, shapes known, every channel count a named constant.

`capture` deep-copies the network and traces it. A user's module that cannot be traced becomes a leaf whose channels
stay, with the reason; where that is the network itself, the error names the module and the line. Then

- every size that does not depend on the batch is folded to a number (found by running two batch sizes),
- functional dropout becomes a module, in-place operations become plain ones,
- what counts or indexes channels becomes a named module of operators.py; a channel shuffle becomes one gather,
- every node is described by a neutral `labels.Op`, which is all that the rules see.
"""

from __future__ import annotations

import copy
import operator
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from pipeline.nouns import Topology
from pipeline.prune import operators
from pipeline.prune.labels import Reader
from profiles.errors import DeployError

EMPTY = Topology((), (), {}, ())


@dataclass(frozen=True)
class Network:
    """A captured network. graph: editable, in eval mode, computes what the dense network computes.

    example: one input batch. shapes: node name -> output shape (of the example's batch). leaves: what could not be
    captured, with the reason. topology and readers (units where channels are mixed): empty until `find_groups`
    fills them.
    """

    graph: fx.GraphModule
    example: tuple[Tensor, ...]
    shapes: dict[str, tuple[int, ...]]
    leaves: dict[str, str] = field(default_factory=dict)
    topology: Topology = EMPTY
    readers: tuple[Reader, ...] = ()


class _Stuck(Exception):
    """Tracing failed inside this module."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


class _Tracer(fx.Tracer):
    def __init__(self, leaves: dict[str, str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.stack: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = m.__class__.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return own or module_qualified_name in self.leaves

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Stuck:
            raise
        except Exception as error:
            raise _Stuck(path, _where(error)) from error


def _where(error: BaseException) -> str:
    """The user's line in which tracing failed, and why."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f"{'torch'}/fx" not in f.filename]
    frames = [f for f in frames if "/torch/" not in f.filename and "pipeline/prune/capture" not in f.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return f"{place}{str(error).splitlines()[0] if str(error) else type(error).__name__}"


def capture(model: nn.Module, example: Sequence[Tensor]) -> Network:
    """Deep-copy a network and capture it for inputs like `example` (batch axis first).

    Raises DeployError where the network's own forward cannot be captured (naming module and line) or refuses the
    example's shape.
    """
    example = tuple(example)
    dense = copy.deepcopy(model).eval()
    leaves: dict[str, str] = {}
    graph = _trace(dense, leaves)
    _plain(graph)
    _fold_sizes(graph, example)
    shapes = _run_shapes(graph, example)
    _name_constants(graph, shapes)
    graph.graph.eliminate_dead_code()
    _skips_first(graph)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    shapes = _run_shapes(graph, example)
    _check_equal(dense, graph, example)
    return Network(graph, example, shapes, leaves)


def _trace(dense: nn.Module, leaves: dict[str, str]) -> fx.GraphModule:
    while True:
        tracer = _Tracer(leaves)
        try:
            return fx.GraphModule(dense, tracer.trace(dense), class_name=type(dense).__name__)
        except _Stuck as stuck:
            if not stuck.path or stuck.path in leaves:
                raise _cannot(dense, stuck.reason) from stuck
            leaves[stuck.path] = f"cannot be captured: {stuck.reason}"
        except Exception as error:
            raise _cannot(dense, _where(error)) from error


def _cannot(dense: nn.Module, reason: str) -> DeployError:
    return DeployError(
        f"the network cannot be captured: {type(dense).__name__}.forward, {reason}.",
        "move the part that depends on data into a module of its own: it then stays as it is.",
    )


_IN_PLACE = {
    "add_": "add",
    "mul_": "mul",
    "sub_": "sub",
    "div_": "div",
    "relu_": "relu",
    "clamp_": "clamp",
    "sigmoid_": "sigmoid",
}


def _plain(graph: fx.GraphModule) -> None:
    """In-place operations become plain ones, functional dropout becomes a module."""
    for module in graph.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    drops = 0
    for node in graph.graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_method" and node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        if node.op == "call_function" and node.target in (operator.iadd, operator.imul):
            node.target = operator.add if node.target is operator.iadd else operator.mul
        if node.op == "call_function" and node.target in (nn.functional.dropout, nn.functional.dropout2d):
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            kind = nn.Dropout2d if node.target is nn.functional.dropout2d else nn.Dropout
            _to_module(graph, node, f"dropout_{drops}", kind(float(p)), (node.args[0],))
            drops += 1


class _Values(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = value = super().run_node(n)
        return value


def _batched(example: tuple[Tensor, ...], extra: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat([x] + [x[:1]] * extra) if extra else x for x in example)


@torch.no_grad()
def _all_values(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[str, Any]:
    run = _Values(graph)
    try:
        run.run(*example)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in example)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeployError(
            f"the network refuses an input of shape {shapes}: {reason}.", "mend model.input.shape in deploy.toml."
        ) from error
    return run.values


def _fold_sizes(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Replace every number that is the same for two batch sizes by its value."""
    one, two = (_all_values(graph, _batched(example, extra)) for extra in (0, 1))
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        value, other = one.get(node.name), two.get(node.name)
        if isinstance(value, bool | int | float | torch.Size | tuple) and not _holds_tensor(value):
            if node.op not in ("placeholder", "output") and value == other:
                known[node] = tuple(value) if isinstance(value, torch.Size) else value
            elif isinstance(value, torch.Size):
                with graph.graph.inserting_after(node):
                    batch = graph.graph.call_function(operator.getitem, (node, 0))
                known[node] = (batch, *value[1:])
    for node in graph.graph.nodes:
        own = {k: v for k, v in known.items() if not (isinstance(v, tuple) and node in v)}
        if node in (v[0] for v in known.values() if isinstance(v, tuple) and v and isinstance(v[0], fx.Node)):
            continue
        swap = partial(_swapped, own)
        node.args = fx.map_arg(node.args, swap)
        node.kwargs = fx.map_arg(node.kwargs, swap)
    for node in graph.graph.nodes:  # (batch, C, H, W)[1] and the like
        if node.target is operator.getitem and isinstance(node.args[0], tuple):
            node.replace_all_uses_with(node.args[0][node.args[1]])
    graph.graph.eliminate_dead_code()


def _swapped(known: Mapping[fx.Node, Any], node: fx.Node) -> Any:
    return known.get(node, node)


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(_holds_tensor(v) for v in value))


def _run_shapes(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[str, tuple[int, ...]]:
    values = _all_values(graph, example)
    return {name: tuple(value.shape) for name, value in values.items() if isinstance(value, Tensor)}


def _to_module(graph: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, args: tuple[Any, ...]) -> fx.Node:
    """Replace a node by a call of a new module at the root."""
    while hasattr(graph, name):
        name = f"{name}_"
    graph.add_module(name, module)
    module.train(graph.training)
    with graph.graph.inserting_before(node):
        new = graph.graph.create_node("call_module", name, args, {}, name=name)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    return new


_ADDS = {operator.add, torch.add}
_RESHAPES = {torch.flatten, torch.reshape, torch.unflatten}
_RESHAPE_METHODS = {"view", "reshape", "flatten", "unflatten"}


@torch.no_grad()
def _name_constants(graph: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> None:
    """Turn what adds activations, reshapes, pads, splits, slices or gathers channels into named modules."""
    count: dict[str, int] = {}

    def fresh(stem: str) -> str:
        count[stem] = count.get(stem, -1) + 1
        return f"{stem}_{count[stem]}"

    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, nn.Flatten | nn.Unflatten):
                _reshape(graph, node, shapes, fresh)
            elif isinstance(module, nn.ChannelShuffle):
                _shuffle_module(graph, node, shapes, module.groups, fresh)
        elif node.op == "call_function":
            if node.target in _ADDS and all(_is_activation(a, shapes) for a in node.args) and not node.kwargs:
                _to_module(graph, node, fresh("residual_add"), operators.ResidualAdd(), tuple(node.args))
            elif node.target in _RESHAPES:
                _reshape(graph, node, shapes, fresh)
            elif node.target is nn.functional.pad:
                _pad(graph, node, shapes, fresh)
            elif node.target in (torch.split, torch.chunk, torch.tensor_split):
                _split(graph, node, shapes, fresh)
            elif node.target is operator.getitem:
                _getitem(graph, node, shapes, fresh)
            elif node.target in (torch.index_select, torch.narrow):
                _select(graph, node, shapes, fresh)
            elif node.target in (torch.channel_shuffle, getattr(nn.functional, "channel_shuffle", None)):
                _shuffle_module(graph, node, shapes, int(node.args[1]), fresh)
        elif node.op == "call_method":
            if node.target == "add" and len(node.args) == 2 and all(_is_activation(a, shapes) for a in node.args):
                _to_module(graph, node, fresh("residual_add"), operators.ResidualAdd(), tuple(node.args))
            elif node.target in _RESHAPE_METHODS:
                _reshape(graph, node, shapes, fresh)
            elif node.target in ("split", "chunk", "tensor_split"):
                _split(graph, node, shapes, fresh)
            elif node.target in ("index_select", "narrow"):
                _select(graph, node, shapes, fresh)
    graph.graph.eliminate_dead_code()
    _fuse_shuffles(graph, shapes, fresh)


def _is_activation(value: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
    return isinstance(value, fx.Node) and value.name in shapes and value.op != "get_attr"


def _reshape(graph: fx.GraphModule, node: fx.Node, shapes: dict[str, tuple[int, ...]], fresh: Any) -> None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.name not in shapes or node.name not in shapes:
        return
    old, new = shapes[source.name], shapes[node.name]
    if old and new and old[0] == new[0] and source.op != "get_attr":
        name = _to_module(graph, node, fresh("reshape"), operators.Reshape(new[1:]), (source,)).name
        shapes[name] = new


def _pad(graph: fx.GraphModule, node: fx.Node, shapes: dict[str, tuple[int, ...]], fresh: Any) -> None:
    source = node.args[0]
    sides = list(cast(Sequence[Any], node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else ())))
    mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
    if not isinstance(source, fx.Node) or mode != "constant" or value not in (None, 0, 0.0):
        return
    rank = len(shapes[source.name])
    at = 2 * (rank - 2)
    if len(sides) <= at or not (sides[at] or sides[at + 1]) or min(sides) < 0 or any(sides[at + 2 :]):
        return
    before, after = int(sides[at]), int(sides[at + 1])
    spatial = sides[:at]
    if any(spatial):
        with graph.graph.inserting_before(node):
            source = graph.graph.call_function(nn.functional.pad, (source, spatial))
        low = [0, 0, *(spatial[2 * i] + spatial[2 * i + 1] for i in reversed(range(len(spatial) // 2)))]
        shapes[source.name] = tuple(s + e for s, e in zip(shapes[str(node.args[0])], low, strict=True))
    new = _to_module(graph, node, fresh("channel_pad"), operators.ChannelPad(before, after, 1), (source,))
    shapes[new.name] = tuple(s + (before + after) * (i == 1) for i, s in enumerate(shapes[source.name]))


def _split(graph: fx.GraphModule, node: fx.Node, shapes: dict[str, tuple[int, ...]], fresh: Any) -> None:
    source = node.args[0]
    axis = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    if not isinstance(source, fx.Node) or not isinstance(axis, int):
        return
    rank = len(shapes[source.name])
    pieces = [user for user in node.users if user.target is operator.getitem and isinstance(user.args[1], int)]
    if axis % rank == 0 or len(pieces) != len(node.users):
        return
    how = node.kwargs.get(
        "split_size_or_sections", node.kwargs.get("chunks", node.args[1] if len(node.args) > 1 else None)
    )
    meta = torch.empty(shapes[source.name], device="meta")
    name = node.target if isinstance(node.target, str) else node.target.__name__
    sizes = [part.shape[axis] for part in getattr(torch.Tensor, str(name))(meta, how, axis)]
    _to_module(graph, node, fresh("channel_split"), operators.ChannelSplit(sizes, axis % rank), (source,))


def _getitem(graph: fx.GraphModule, node: fx.Node, shapes: dict[str, tuple[int, ...]], fresh: Any) -> None:
    """x[:, a:b, ::2, ::2]: the channel part becomes a module of its own, the spatial part stays."""
    source, index = node.args
    if not isinstance(source, fx.Node) or source.name not in shapes or source.op == "get_attr":
        return
    parts = list(index) if isinstance(index, tuple) else [index]
    shape = shapes[source.name]
    if (
        any(not isinstance(part, slice | int | list | tuple) for part in parts)
        or len(parts) < 2
        or parts[0] != slice(None)
    ):
        return
    channel = parts[1]
    if isinstance(channel, slice):
        if any(isinstance(bound, fx.Node) for bound in (channel.start, channel.stop, channel.step)):
            return
        positions = list(range(shape[1]))[channel]
    elif isinstance(channel, list | tuple):
        positions = [int(i) % shape[1] for i in channel]
    else:
        return
    if positions == list(range(shape[1])):
        return
    module: nn.Module
    if positions and positions == list(range(positions[0], positions[-1] + 1)):
        module, stem = operators.ChannelSlice(positions[0], positions[-1] + 1, 1), "channel_slice"
    else:
        module, stem = operators.ChannelGather(positions, 1), "channel_gather"
    rest = (slice(None), slice(None), *parts[2:])
    if all(part == slice(None) for part in rest):
        new = _to_module(graph, node, fresh(stem), module, (source,))
    else:
        name = fresh(stem)
        graph.add_module(name, module)
        with graph.graph.inserting_before(node):
            new = graph.graph.create_node("call_module", name, (source,), {}, name=name)
        node.args = (new, rest)
    shapes[new.name] = (shape[0], len(positions), *shape[2:])


def _select(graph: fx.GraphModule, node: fx.Node, shapes: dict[str, tuple[int, ...]], fresh: Any) -> None:
    source, args = node.args[0], [*node.args[1:], *node.kwargs.values()]
    if not isinstance(source, fx.Node) or not args or not isinstance(args[0], int):
        return
    axis, shape = args[0] % len(shapes[source.name]), shapes[source.name]
    if axis == 0 or node.name not in shapes:
        return
    probe = torch.arange(shape[axis])
    if str(getattr(node.target, "__name__", node.target)) == "narrow":
        if not all(isinstance(a, int) for a in args[1:3]):
            return
        start, length = (int(cast(int, a)) for a in args[1:3])
        new = _to_module(
            graph, node, fresh("channel_slice"), operators.ChannelSlice(start, start + length, axis), (source,)
        )
    else:
        if not isinstance(args[1], fx.Node) or args[1].op != "get_attr":
            return
        picked = probe[graph.get_buffer(str(args[1].target)).long()]
        new = _to_module(
            graph, node, fresh("channel_gather"), operators.ChannelGather(picked.tolist(), axis), (source,)
        )
    shapes[new.name] = tuple(shapes[node.name])


def _shuffle_module(
    graph: fx.GraphModule, node: fx.Node, shapes: dict[str, tuple[int, ...]], groups: int, fresh: Any
) -> None:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return
    order = torch.arange(shapes[source.name][1]).reshape(groups, -1).t().flatten().tolist()
    new = _to_module(graph, node, fresh("channel_gather"), operators.ChannelGather(order, 1), (source,))
    shapes[new.name] = shapes[source.name]


def ancestors(graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """Every node -> itself and all nodes that it depends on."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = frozenset({node}).union(*(found[n] for n in node.all_input_nodes))
    return found


def weight_count(graph: fx.GraphModule, nodes: Iterable[fx.Node]) -> int:
    """Entries of the weights of more than one axis among these nodes: how much a branch computes."""
    total = 0
    for node in nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        weight = getattr(module, "weight", None)
        total += weight.numel() if isinstance(weight, Tensor) and weight.dim() > 1 else 0
    return total


def _skips_first(graph: fx.GraphModule) -> None:
    """Compute the lighter operand of every addition first: a repair then knows it when it fits the other branch."""
    reach = ancestors(graph.graph)
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), operators.ResidualAdd):
            continue
        a, b = node.args
        only = sorted((reach[a] - reach[b], reach[b] - reach[a]), key=lambda nodes: weight_count(graph, nodes))
        position = {n: i for i, n in enumerate(graph.graph.nodes)}
        for early in sorted(only[0], key=position.__getitem__):
            inputs = [n for n in early.all_input_nodes if n.op not in ("placeholder", "get_attr")]
            if inputs and early.op not in ("placeholder", "get_attr"):
                order = {n: i for i, n in enumerate(graph.graph.nodes)}
                max(inputs, key=order.__getitem__).append(early)


def _moves(graph: fx.GraphModule, node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return isinstance(graph.get_submodule(str(node.target)), operators.Reshape)
    if node.op == "call_method":
        return node.target in ("permute", "transpose", "contiguous")
    return node.op == "call_function" and node.target in (torch.permute, torch.transpose)


def _fuse_shuffles(graph: fx.GraphModule, shapes: dict[str, tuple[int, ...]], fresh: Any) -> None:
    """reshape, transpose, reshape that only reorders channels becomes one gather."""
    for node in list(graph.graph.nodes):
        if not _moves(graph, node) or any(_moves(graph, user) for user in node.users):
            continue
        chain, source = [node], node.args[0]
        while _moves(graph, source) and len(source.users) == 1:
            chain.append(source)
            source = source.args[0]
        shape = shapes.get(source.name) if isinstance(source, fx.Node) else None
        if len(chain) < 3 or shape is None or shapes.get(node.name) != shape or len(shape) < 2:
            continue
        flat = torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)).expand(1, *shape[1:]).clone()
        order = _replay(graph, list(reversed(chain)), flat)
        first = order[0].reshape(shape[1], -1)[:, 0]
        same = (order[0].reshape(shape[1], -1) == first[:, None]).all()
        position = torch.arange(flat[0].numel()).reshape(1, *shape[1:])
        moved = _replay(graph, list(reversed(chain)), position)
        if not same or not torch.equal(moved, position.index_select(1, first)):
            continue
        _to_module(graph, node, fresh("channel_gather"), operators.ChannelGather(first.tolist(), 1), (source,))
    graph.graph.eliminate_dead_code()


def _replay(graph: fx.GraphModule, chain: list[fx.Node], value: Tensor) -> Tensor:
    for node in chain:
        if node.op == "call_module":
            value = graph.get_submodule(str(node.target))(value)
        elif node.op == "call_method":
            value = getattr(value, str(node.target))(*node.args[1:], **node.kwargs)
        else:
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return value


@torch.no_grad()
def _check_equal(dense: nn.Module, graph: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    expected, got = dense(*example), graph(*example)
    if isinstance(expected, Tensor) != isinstance(got, Tensor) or isinstance(expected, dict):
        raise DeployError("the network's output is not a tensor or a tuple of tensors.", "return tensors from forward.")
    pairs = zip([expected], [got], strict=True) if isinstance(expected, Tensor) else zip(expected, got, strict=True)
    for a, b in pairs:
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise DeployError(
                f"the captured network differs from the given one by {float((a - b).abs().max()):.3g}.",
                "the forward depends on state or on random numbers; make it a function of its inputs.",
            )
