"""torch.fx tracing in which every proxy knows the value it stands for.

Shapes, types and lengths are then plain numbers, so control flow on them, unpacking and asserts run as written, and the
graph is the network's at the static shape of the example. What makes a tensor from sizes alone (`x.new_zeros(…)`) gives
the tensor itself, which the forward may fill in place. A module that gives its input back in eval mode (stochastic
depth) is kept as it is. The network is traced at two batch sizes: a number that differs depends on the batch and
becomes a multiple of `x.size(0)`.

The innermost module whose forward cannot be traced (control flow on data, writes into an activation, TorchScript)
becomes a leaf with the reason, and tracing begins anew. A leaf has to give tensors, or tuples, lists and dicts of them,
and numbers that follow from shapes alone (sizes of patches that go from block to block): whoever branches on another
number that it made would be traced along one branch only. Where it gives anything else the module that called it is the
leaf instead, and so on outwards; where that is the network itself, capture fails.

Why not torch.export: it resolves shapes as this does and refuses control flow on data and TorchScript as this does, but
for the whole network, without a leaf to go on with; and it gives one flat graph of ATen calls on lifted weights, in
which the layers that surgery, training and the names of the ONNX file need would have to be found again.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.prune import operators
from pipeline.prune.foreign import caught
from pipeline.prune.naming import is_custom, kind_of
from pipeline.prune.proxy import (
    Known,
    OnData,
    holds_tensor,
    known,
    numbers,
    shapes_of,
    unproxied,
    without_data,
)
from pipeline.prune.whole import Whole
from profiles.errors import DeployError

MAKERS = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like"}
DATA = {"item", "tolist", "__bool__", "equal", "allclose", "is_nonzero", "numpy", "__array__"}
"""What turns data into numbers."""
SHAPED_BY_DATA = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
"""What gives a tensor whose shape depends on data: a forward that reads its sizes branches on data."""
JOINS = {"cat", "concat", "concatenate", "stack"}
CONTAINERS = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip


class Stuck(Exception):
    """Tracing failed inside this module. on_data: because its forward asks what only data can answer."""

    def __init__(self, path: str, reason: str, on_data: bool) -> None:
        super().__init__(reason)
        self.path, self.reason, self.on_data = path, reason, on_data


class Uneven(Exception):
    """The two traces differ in more than numbers."""


class _Tracer(fx.Tracer):
    def __init__(
        self, leaves: Mapping[str, str], kinds: Collection[str], example: tuple[Tensor, ...], *, makers: bool
    ) -> None:
        super().__init__()
        self.leaves, self.kinds, self.example, self.makers = leaves, kinds, example, makers
        self.kept: list[str] = []
        self._running = False
        self._inside: list[str] = []
        self._functions = 0
        self.own: dict[str, tuple[Any, ...]] = {}
        """Inputs of modules that rules of the user's name, by path."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("torch.nn") and not isinstance(m, CONTAINERS)
        ours = isinstance(m, operators.ScaledAttention | operators.InTraining | operators.Einsum)
        return own or ours or module_qualified_name in self.leaves or kind_of(m) in self.kinds

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of a network's forward."""
        with caught(self.kinds, self._apply):
            return super().trace(root, concrete_args)

    def _apply(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A function that cannot be looked into becomes a call of a module at the root, which knows it."""
        while True:
            name = f"function_{self._functions}"
            self._functions += 1
            there = getattr(self.root, name, None)
            if there is None or (isinstance(there, operators.Applied) and there.function is function):
                break
        if there is None:
            self.root.add_module(name, operators.Applied(function))
        result = self.create_proxy("call_module", name, args, kwargs)
        self._refuse_numbers(kind_of(function), numbers(unproxied(result)))
        return result

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names = _input_names(root_fn, len(self.example))
        args: list[Any] = [self.root]
        for name, value in zip(names, self.example, strict=True):
            args.append(self._with_value(super().create_proxy("placeholder", name, (), {}), value))
        return root_fn, args

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Known(node, self)

    def create_arg(self, a: Any) -> Any:
        if known(a):
            return a.node
        if isinstance(a, torch.Size):
            return tuple(a)
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None, *rest: Any
    ) -> Any:
        plain = getattr(target, "__name__", str(target))
        if kind in ("call_method", "call_function"):
            _refuse_data(plain, target, args, kwargs)
        if plain in JOINS and args and known(args[0]) and not isinstance(args[0].value, Tensor):
            args = (list(args[0]), *args[1:])  # what is joined are its pieces, one by one
        if kind == "call_method" and plain.endswith("_") and known(args[0]) and args[0].base is not None:
            return self._written(plain, args[0])
        made: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr, *rest)
        value = self._value(kind, target, args, kwargs)
        constant = kind != "get_attr" and self.makers and plain in MAKERS
        if kind == "call_function" and not holds_tensor(value) and is_custom(kind_of(target)):
            raise OnData(f"a number taken from data ({kind_of(target)})")
        if kind == "output" or (holds_tensor(value) and not constant):
            made = self._with_value(made, value)
            if target is operator.getitem and isinstance(args[0].value, Tensor):
                object.__setattr__(made, "base", (args[0], args[1]))
            return made
        self.graph.erase_node(made.node)
        return value

    def _written(self, method: str, part: Any) -> Any:
        """x[a:b].zero_() is x times a mask; anything else that is written into a part of a tensor cannot be traced."""
        base, index = part.base
        if method != "zero_":
            raise TypeError(f"the forward writes into a part of a tensor ({method})")
        mask = torch.ones_like(base.value)
        mask[unproxied(index)] = 0
        product = self.create_proxy("call_function", operator.mul, (base, mask), {})
        object.__setattr__(base, "node", product.node)
        object.__setattr__(base, "value", product.value)
        return self.create_proxy("call_function", operator.getitem, (base, index), {})

    def _with_value(self, proxy: Any, value: Any) -> Any:
        object.__setattr__(proxy, "value", value)
        proxy.node.meta["shape"] = shapes_of(value)
        proxy.node.meta["dtype"] = value.dtype if isinstance(value, Tensor) else None
        return proxy

    @torch.no_grad()
    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = unproxied(args), unproxied(kwargs)
        self._running = True
        try:
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            if kind == "call_module":
                return self.root.get_submodule(target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)
        finally:
            self._running = False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self._inside.append(path)
        try:
            if isinstance(m, torch.jit.ScriptModule) and path not in self.leaves:
                raise Stuck(path, "it is TorchScript", False)
            result = super().call_module(m, forward, args, kwargs)
        except Stuck:
            raise
        except Exception as error:
            raise Stuck(path, where(error), isinstance(error, OnData)) from error
        finally:
            self._inside.pop()
        if self.is_leaf_module(m, path):
            if kind_of(m) in self.kinds:
                self.own[path] = unproxied((*args, *kwargs.values()))
            given = numbers(unproxied(result))
            if given and not self._follows_shapes(m, args, kwargs, given):
                self._refuse_numbers(path, given)
            return result
        idle = bool(args) and result is args[0] and known(result)
        if idle and not kwargs and not any(True for _ in (*m.parameters(), *m.buffers(), *m.children())):
            self.kept.append(path)
            return self.create_proxy("call_module", path, args, kwargs)
        return result

    def _follows_shapes(self, leaf: nn.Module, args: Any, kwargs: Any, given: dict[str, Any]) -> bool:
        """Whether a leaf gives the same numbers where its tensors hold no data, on torch's device `meta`."""
        bare = {name: tensor.to("meta") for name, tensor in (*leaf.named_parameters(), *leaf.named_buffers())}
        self._running = True
        try:
            with torch.no_grad(), torch.device("meta"):
                inputs = without_data(unproxied((args, kwargs)))
                again = torch.func.functional_call(leaf, bare, *inputs)
        except Exception:  # noqa: BLE001  it asked for data, or for what that device has not
            return False
        finally:
            self._running = False
        return numbers(again) == given

    def _refuse_numbers(self, path: str, given: dict[str, Any]) -> None:
        """What a leaf gives besides tensors may depend on data: then the module that called it is the leaf."""
        if given:
            found = type(next(iter(given.values()))).__name__
            reason = f"{_place(traceback.extract_stack())}'{path}' gives a {found}, which may depend on data"
            raise Stuck(self._inside[-1] if self._inside else "", reason, True)


def _refuse_data(name: str, target: Any, args: Any, kwargs: Any) -> None:
    """Raise OnData for what reads numbers or shapes out of data."""
    if name in DATA:
        raise OnData(f"a number taken from data ({name})")
    index = args[1] if target is operator.getitem else ()
    picks = [i.value for i in (index if type(index) is tuple else (index,)) if known(i)]
    masked = any(isinstance(value, Tensor) and value.dtype == torch.bool for value in picks)
    repeated = name == "repeat_interleave" and any(known(a) for a in (*args[1:], *kwargs.values()))
    alone = name == "where" and len(args) + len(kwargs) == 1
    if name in SHAPED_BY_DATA or alone or masked or repeated:
        raise OnData(f"a shape that depends on data ({'a mask as index' if masked else name})")


def _input_names(forward: Any, count: int) -> list[str]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "input")
    return [positional[i] if i < len(positional) else f"{rest}_{i}" for i in range(count)]


def where(error: BaseException) -> str:
    """The user's line in which tracing failed, and why."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{_place(traceback.extract_tb(error.__traceback__))}{reason}"


def _place(frames: traceback.StackSummary) -> str:
    """`nets.py:12: ` of the innermost frame that is neither torch's nor of this folder."""
    own = Path(__file__).parent
    outside = [f for f in frames if "/torch/" not in f.filename and Path(f.filename).parent != own]
    return f"{Path(outside[-1].filename).name}:{outside[-1].lineno}: " if outside else ""


def batched(example: tuple[Tensor, ...], extra: int) -> tuple[Tensor, ...]:
    """The example with its first sample repeated `extra` times more."""
    return tuple(torch.cat([x] + [x[:1]] * extra) if extra else x for x in example)


def trace(
    dense: nn.Module, example: tuple[Tensor, ...], leaves: dict[str, str], kinds: Collection[str] = ()
) -> fx.GraphModule:
    """The network's graph; every node's meta has its `shape` at the example's batch and, `wider`, at one sample more.

    leaves: filled with what cannot be traced and is `Whole` in the graph; the meta of its nodes has `leaf`.
    kinds: operators that are not traced into. Raises DeployError where the network itself cannot be traced.
    """
    if isinstance(dense, torch.jit.ScriptModule):
        message = "the network cannot be captured: it is TorchScript as a whole."
        raise DeployError(message, "let the factory give the torch.nn.Module that it was made from.")
    on_data: set[str] = set()
    try:
        tracer, graph = _attempt(dense, example, leaves, on_data, kinds)
    except Exception as error:
        raise _cannot(dense, error) from error
    module = fx.GraphModule(dense, graph, class_name=type(dense).__name__)
    for path in dict.fromkeys(tracer.kept):
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, operators.InTraining(module.get_submodule(path)))
    on_data |= {path for path, inputs in tracer.own.items() if _asks_data(module.get_submodule(path), inputs)}
    whole = {*leaves, *on_data}
    for path in whole:
        leaf = module.get_submodule(path)
        module.set_submodule(path, Whole(leaf, kind_of(leaf), on_data=path in on_data))
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target in whole:
            node.meta["leaf"] = True
    return module


def _asks_data(module: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether the forward of a module that was not traced into asks what only data can answer."""
    try:
        _Tracer({}, (), inputs, makers=True).trace(module)
    except Exception as error:  # noqa: BLE001  what cannot be traced for another reason is run as it is
        return isinstance(error, OnData) or (isinstance(error, Stuck) and error.on_data)
    return False


def _attempt(
    dense: nn.Module, example: tuple[Tensor, ...], leaves: dict[str, str], on_data: set[str], kinds: Collection[str]
) -> tuple[_Tracer, fx.Graph]:
    """Both traces, with leaves added until they succeed; without constants made from sizes where those vary."""
    makers = True
    while True:
        try:
            first = _Tracer(leaves, kinds, example, makers=makers)
            graph = first.trace(dense)
            wider = _Tracer(leaves, kinds, batched(example, 1), makers=makers).trace(dense)
            _blend(dense, graph, wider, len(example[0]))
            return first, graph
        except Stuck as stuck:
            if not stuck.path or stuck.path in leaves:
                raise
            for inside in [path for path in leaves if path.startswith(f"{stuck.path}.")]:
                del leaves[inside]
            leaves[stuck.path] = f"cannot be captured: {stuck.reason}"
            on_data -= {path for path in on_data if path.startswith(f"{stuck.path}.")}
            on_data |= {stuck.path} if stuck.on_data else set()
        except Uneven:
            if not makers:
                raise
            makers = False


def _cannot(dense: nn.Module, error: Exception) -> DeployError:
    if isinstance(error, Uneven):
        reason = str(error)
    else:
        reason = error.reason if isinstance(error, Stuck) else where(error)
    return DeployError(
        f"the network cannot be captured: {type(dense).__name__}.forward, {reason}.",
        "move the part that depends on data into a module of its own: it then stays as it is.",
    )


class _Blend:
    """Arguments of one trace with the numbers that depend on the batch written as multiples of its size."""

    def __init__(self, root: nn.Module, graph: fx.Graph, batch: int) -> None:
        self.root, self.graph, self.batch = root, graph, batch
        self.source = next(node for node in graph.nodes if node.op == "placeholder")

    def arguments(self, node: fx.Node, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node):
            return a
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            return type(a)(self.arguments(node, x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self.arguments(node, a[key], b[key]) for key in a}
        if isinstance(a, slice) and isinstance(b, slice):
            parts = [self.arguments(node, getattr(a, n), getattr(b, n)) for n in ("start", "stop", "step")]
            return slice(*parts)
        if type(a) is type(b) is int and a != b and a == self.batch * (b - a):
            with self.graph.inserting_before(node):
                size = self.graph.call_method("size", (self.source, 0))
                return size if b - a == 1 else self.graph.call_function(operator.mul, (size, b - a))
        if type(a) is not type(b) or (a != b and a == a):
            raise Uneven(f"'{node.name}' depends on the size of the batch in a way that has no form")
        return a

    def constant(self, node: fx.Node, a: str, b: str) -> bool:
        """Whether two tensors are the same; one that only repeats itself along the batch is expanded to it."""
        x, y = operator.attrgetter(a)(self.root), operator.attrgetter(b)(self.root)
        if a == b or x.shape == y.shape:
            if not torch.equal(x, y):
                raise Uneven("it makes a tensor that is another one each time")
            return True
        repeats = x.dim() == y.dim() and len(x) == self.batch and len(y) == self.batch + 1
        if not repeats or x.shape[1:] != y.shape[1:] or not torch.equal(x[:1].expand_as(y), y):
            return False
        setattr(self.root, a, x[:1].clone())
        with self.graph.inserting_after(node):
            size = self.graph.call_method("size", (self.source, 0))
        with self.graph.inserting_after(size):
            wide = self.graph.call_method("expand", (node, size, *[-1] * (x.dim() - 1)))
        wide.meta = {"shape": tuple(x.shape), "wider": tuple(y.shape)}
        node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
        node.meta["shape"] = node.meta["wider"] = (1, *x.shape[1:])
        return True


def _blend(root: nn.Module, graph: fx.Graph, wider: fx.Graph, batch: int) -> None:
    if [n.op for n in graph.nodes] != [n.op for n in wider.nodes]:
        raise Uneven("it computes something else for another size of the batch")
    blend = _Blend(root, graph, batch)
    for a, b in zip(list(graph.nodes), list(wider.nodes), strict=True):
        a.meta["wider"] = b.meta.get("shape")
        constant = a.op == "get_attr" and blend.constant(a, str(a.target), str(b.target))
        if a.target != b.target and not constant:
            raise Uneven("it computes something else for another size of the batch")
        if a.op != "placeholder":
            a.args, a.kwargs = blend.arguments(a, a.args, b.args), blend.arguments(a, a.kwargs, b.kwargs)
