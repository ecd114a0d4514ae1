"""torch.fx tracing in which every proxy knows the value it stands for.

Shapes, types and lengths are then plain numbers, so control flow on them, unpacking and asserts run as written, and the
graph is the network's at the static shape of the example. What makes a tensor from sizes alone (`x.new_zeros(…)`) gives
the tensor itself, which the forward may fill in place. A module that cannot be traced (control flow on data, writes
into an activation) becomes a leaf with the reason; a module that gives its input back in eval mode (stochastic depth)
is kept as it is. The network is traced at two batch sizes: a number that differs depends on the batch and becomes a
multiple of `x.size(0)`.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_trace
from torch.fx.node import map_aggregate

from pipeline.prune import operators
from profiles.errors import DeployError

MAKERS = {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like"}
DATA = {"item", "tolist", "__bool__", "equal", "allclose", "is_nonzero", "numpy"}
CONTAINERS = (
    nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder,
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip


class Stuck(Exception):
    """Tracing failed inside this module."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


class Uneven(Exception):
    """The two traces differ in more than numbers."""


class _Known(fx.Proxy):
    """A proxy with its value."""

    value: Any = None
    base: Any = None  # the tensor that this is a part of, and the index

    @property
    def __class__(self) -> Any:  # isinstance(x, Tensor) holds where the value is one
        return Tensor if isinstance(self.value, Tensor) else _Known

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        raise TypeError("the class of a proxy is fixed")

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.value, name)
        if isinstance(found, Tensor):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return fx.proxy.Attribute(self, name) if callable(found) else found

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(cast(Any, self), i) for i in range(len(self.value))])

    def __len__(self) -> int:
        return len(self.value)

    def __bool__(self) -> bool:
        if isinstance(self.value, Tensor):
            return bool(self.tracer.to_bool(self))
        return bool(self.value)

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("the forward writes into an activation")


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Mapping[str, str], example: tuple[Tensor, ...], *, makers: bool) -> None:
        super().__init__()
        self.leaves, self.example, self.makers = leaves, example, makers
        self.kept: list[str] = []
        self._running = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("torch.nn") and not isinstance(m, CONTAINERS)
        ours = isinstance(m, operators.ScaledAttention | operators.InTraining | operators.Einsum)
        return own or ours or module_qualified_name in self.leaves

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        names = _input_names(root_fn, len(self.example))
        args: list[Any] = [self.root]
        for name, value in zip(names, self.example, strict=True):
            args.append(self._with_value(super().create_proxy("placeholder", name, (), {}), value))
        return root_fn, args

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Known:
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
        if kind in ("call_method", "call_function") and plain in DATA:
            raise TypeError(f"control flow on data ({plain}) cannot be traced")
        if kind == "call_method" and plain.endswith("_") and type(args[0]) is _Known and args[0].base is not None:
            return self._written(plain, args[0])
        made: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr, *rest)
        value = self._value(kind, target, args, kwargs)
        constant = kind != "get_attr" and self.makers and plain in MAKERS
        if kind == "output" or (_holds_tensor(value) and not constant):
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
        mask[_unproxied(index)] = 0
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
        args, kwargs = _unproxied(args), _unproxied(kwargs)
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
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Stuck:
            raise
        except Exception as error:
            raise Stuck(path, where(error)) from error
        idle = bool(args) and result is args[0] and type(result) is _Known and path not in self.leaves
        if idle and not kwargs and not any(True for _ in (*m.parameters(), *m.buffers(), *m.children())):
            self.kept.append(path)
            return self.create_proxy("call_module", path, args, kwargs)
        return result


def _input_names(forward: Any, count: int) -> list[str]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "input")
    return [positional[i] if i < len(positional) else f"{rest}_{i}" for i in range(count)]


def _unproxied(value: Any) -> Any:
    return map_aggregate(value, lambda a: cast(Any, a).value if cast(Any, type(a)) is _Known else a)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(v) for v in value.values())
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(_holds_tensor(v) for v in value))


def shapes_of(value: Any) -> Any:
    """Shape of a tensor, a list of those of a sequence, None of anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [shapes_of(v) for v in value]
    return None


def where(error: BaseException) -> str:
    """The user's line in which tracing failed, and why."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if "pipeline/prune/tracing" not in f.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return f"{place}{str(error).splitlines()[0] if str(error) else type(error).__name__}"


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Functions that a user wrapped to keep torch.fx out are traced: their control flow is on shapes."""
    known = fx_trace._wrapped_fns_to_patch
    kept = dict(known)
    known.clear()
    try:
        yield
    finally:
        known.update(kept)


def batched(example: tuple[Tensor, ...], extra: int) -> tuple[Tensor, ...]:
    """The example with its first sample repeated `extra` times more."""
    return tuple(torch.cat([x] + [x[:1]] * extra) if extra else x for x in example)


def trace(dense: nn.Module, example: tuple[Tensor, ...], leaves: dict[str, str]) -> fx.GraphModule:
    """The network's graph; every node's meta has its `shape` at the example's batch and, `wider`, at one sample more.

    leaves: filled with what cannot be traced. Raises DeployError where that is the network itself.
    """
    try:
        tracer, graph = _attempt(dense, example, leaves)
    except Exception as error:
        raise _cannot(dense, error) from error
    module = fx.GraphModule(dense, graph, class_name=type(dense).__name__)
    for path in dict.fromkeys(tracer.kept):
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, operators.InTraining(module.get_submodule(path)))
    return module


def _attempt(dense: nn.Module, example: tuple[Tensor, ...], leaves: dict[str, str]) -> tuple[_Tracer, fx.Graph]:
    """Both traces, with leaves added until they succeed; without constants made from sizes where those vary."""
    makers = True
    while True:
        try:
            with _unwrapped():
                first = _Tracer(leaves, example, makers=makers)
                graph = first.trace(dense)
                wider = _Tracer(leaves, batched(example, 1), makers=makers).trace(dense)
            _blend(dense, graph, wider, len(example[0]))
            return first, graph
        except Stuck as stuck:
            if not stuck.path or stuck.path in leaves:
                raise
            leaves[stuck.path] = f"cannot be captured: {stuck.reason}"
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
