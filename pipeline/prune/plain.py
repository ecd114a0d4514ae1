"""The plain spelling of what a traced graph calls, so that all that follows knows one form of each.

- in-place operations become plain ones: later readers of what was written over read the result
- conversions that change nothing go
- numpy's names of arguments become torch's (`axis`, `keepdims`), and what is worked on comes first
- `x.T` and `x.mT` become a permute; `torch.max(a, b)` becomes maximum, and `torch.max(x, 1)[0]`, whose indices nobody
  reads, amax: of equal maxima it gives each a share of the gradient, where max gives one of them all
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx

from pipeline.prune.naming import is_torch
from profiles.errors import DeployError

_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add, operator.imul: operator.mul, operator.isub: operator.sub,
    operator.itruediv: operator.truediv,
}  # fmt: skip
_VIEWS = {"getitem", "view", "view_as", "transpose", "permute", "unsqueeze", "squeeze", "narrow", "select", "expand"}
_NAMES = {"axis": "dim", "keepdims": "keepdim"}
_TRANSPOSED = {"T", "H", "mT", "mH"}
_EXTREMES: dict[Any, str] = {torch.max: "max", torch.min: "min", "max": "max", "min": "min"}


def plain(module: fx.GraphModule) -> None:
    """Rewrite a traced graph in place."""
    for node in list(module.graph.nodes):
        if node.op == "call_method" and node.target in ("float", "to", "type", "type_as"):
            _same_type(module.graph, node)
            continue
        _out_of_place(module, node)
        _named_as_torch_does(node)
        if node.target is getattr:
            _transposed(module.graph, node)
        elif node.op in ("call_function", "call_method") and node.target in _EXTREMES:
            _extreme(module.graph, node)
    for each in module.modules():
        if getattr(each, "inplace", False) and not isinstance(each, torch.jit.ScriptModule):
            each.inplace = False  # type: ignore[assignment]


def _replaced(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call of another function in a node's place, or of a method where the target is a name."""
    with graph.inserting_before(node):
        make = graph.call_method if isinstance(target, str) else graph.call_function
        new = make(target, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _same_type(graph: fx.Graph, node: fx.Node) -> None:
    """A conversion that changes nothing would fix the precision of the graph."""
    source = node.args[0]
    if isinstance(source, fx.Node) and source.meta.get("dtype") == node.meta["dtype"] is not None:
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _out_of_place(module: fx.GraphModule, node: fx.Node) -> None:
    """Readers of what was written over read the result."""
    name = str(node.target)
    called = module.get_submodule(name) if node.op == "call_module" else None
    written = bool(node.kwargs.get("inplace")) or bool(getattr(called, "inplace", False))
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    if node.op == "call_function" and len(node.args) > 2 and node.args[-1] is True and _has_inplace(node.target):
        node.args, written = (*node.args[:-1], False), True
    if node.op == "call_method" and name.endswith("_") and not name.startswith("_") and hasattr(Tensor, name[:-1]):
        node.target, written = name[:-1], True
    if node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
        node.target, written = _IN_PLACE_OPERATORS[node.target], True
    if written and node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        _refuse_views(node, source)
        later = set(_after(node)) if len(source.users) > 1 else set()
        source.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _refuse_views(node: fx.Node, source: fx.Node) -> None:
    """What is written into a view of a tensor that is read again shows there: that has no plain form."""
    name = getattr(source.target, "__name__", str(source.target))
    views = _VIEWS if source.op in ("call_function", "call_method") else ()
    base = source.args[0] if name in views and source.args else None
    if isinstance(base, fx.Node) and any(user is not source for user in _after(node) if base in user.all_input_nodes):
        raise DeployError(
            f"the network cannot be captured: it writes into a view of a tensor that it reads again ('{node.name}').",
            "write the result to a new tensor.",
        )


def _named_as_torch_does(node: fx.Node) -> None:
    """Arguments of torch's functions and methods; another's function may call its own what it likes."""
    if not (node.op == "call_method" or (node.op == "call_function" and is_torch(node.target))):
        return
    named = {_NAMES.get(name, name): value for name, value in node.kwargs.items()}
    first = next((name for name in ("input", "tensors") if name in named), None)
    if first is not None and not node.args and not {"condition", "sorted_sequence"} & named.keys():
        node.args = (named.pop(first),)
    node.kwargs = named


def _transposed(graph: fx.Graph, node: fx.Node) -> None:
    source, name, dtype = node.args[0], node.args[1], node.meta.get("dtype")
    rank = len(node.meta.get("shape") or ())
    if name in _TRANSPOSED and rank > 1 and isinstance(dtype, torch.dtype) and not dtype.is_complex:
        order = [*range(rank - 2), rank - 1, rank - 2] if name in ("mT", "mH") else list(reversed(range(rank)))
        _replaced(graph, node, "permute", (source, *order), {})


def _extreme(graph: fx.Graph, node: fx.Node) -> None:
    how = _EXTREMES[node.target]
    other = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    if isinstance(other, fx.Node):
        _replaced(graph, node, torch.maximum if how == "max" else torch.minimum, (node.args[0], other), {})
        return
    if not isinstance(node.meta.get("shape"), list):
        return
    for piece in [piece for piece in node.users if not piece.users]:
        graph.erase_node(piece)
    taken = list(node.users)
    if not taken or any(p.target not in (operator.getitem, getattr) or p.args[1] not in (0, "values") for p in taken):
        return
    reduced = torch.amax if how == "max" else torch.amin
    for piece in taken:
        _replaced(graph, piece, reduced, node.args, dict(node.kwargs))
    graph.erase_node(node)


def _has_inplace(target: Any) -> bool:
    try:
        return list(inspect.signature(target).parameters)[-1] == "inplace"
    except (TypeError, ValueError):
        return False


def _after(node: fx.Node) -> list[fx.Node]:
    nodes, at = [], node.next
    while at.op != "root":
        nodes.append(at)
        at = at.next
    return nodes
