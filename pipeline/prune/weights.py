"""Weights that are scaled or standardised on the way become what they come to, where the layer stands.

Weight norm and the like, as a hook or a parametrization; written out before a convolution, weight norm, weight
standardisation (S. Qiao et al., arXiv:1903.10520), scaled weights, and kernels that are made of buffers. Surgery and
the criteria then see the weight that multiplies, and a cut leaves the weights that stay as they are, where a
standardisation over what is left would change them. The network computes the same in eval mode; from then on the
weight is trained as it is. So what training must not lose is left alone: masks (a parameter times a buffer), rounding,
signs and clipping, and a parameter that something else reads too.

Attention is written out here as well (operators.py): it hides its projections.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pipeline.prune import operators
from pipeline.prune.naming import is_torch

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_SCALES = {
    "add", "sub", "mul", "truediv", "div", "pow", "neg", "sqrt", "rsqrt", "square", "reciprocal", "mean", "std", "var",
    "var_mean", "sum", "norm", "vector_norm", "normalize", "batch_norm", "instance_norm", "group_norm", "layer_norm",
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose",
    "expand", "expand_as", "contiguous", "clone", "getitem",
}  # fmt: skip
"""What scales, standardises or reshapes a weight: training goes on without it."""
_RANDOM = {F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout}


def open_modules(dense: nn.Module) -> None:
    """Fold weight norms into weights and write attention out, in place."""
    for module in list(dense.modules()):
        if nn.utils.parametrize.is_parametrized(module):
            _unparametrized(module)
        for hook in list(module._forward_pre_hooks.values()):
            if type(hook).__name__ == "WeightNorm":
                nn.utils.remove_weight_norm(module, cast(Any, hook).name)
    for name, module in list(dense.named_modules()):
        if type(module) is nn.MultiheadAttention and name and operators.Attention.covers(module):
            opened = operators.Attention(module)
            opened.train(module.training)
            dense.set_submodule(name, opened)


@torch.no_grad()
def _unparametrized(module: nn.Module) -> None:
    """Store what the parametrizations give. (torch's own removal changes the class, which the given network shares.)"""
    values = {name: getattr(module, name).clone() for name in cast(nn.ModuleDict, module.parametrizations)}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def store(module: fx.GraphModule) -> None:
    """Store what computed weights and biases of convolutions come to, in place, in a graph of plain calls."""
    layers = [n for n in module.graph.nodes if n.op == "call_function" and n.target in CONVOLUTIONS]
    if not any(made.op != "get_attr" for layer in layers for made in _weights(layer)):
        return
    _merge(module.graph)
    for layer in layers:
        for made in _weights(layer):
            if made.op != "get_attr":
                _store(module, made)


def _weights(layer: fx.Node) -> list[fx.Node]:
    bound = dict(zip(("input", "weight", "bias"), layer.args, strict=False)) | layer.kwargs
    return [value for role in ("weight", "bias") if isinstance(value := bound.get(role), fx.Node)]


def _merge(graph: fx.Graph) -> None:
    """What is computed again from the same parameters, as by a layer that is called twice, is computed once."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    known: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "get_attr" and not (_is_pure(node) and node.all_input_nodes):
            continue
        if any(source not in known for source in node.all_input_nodes):
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs))
        if first.setdefault(key, node) is not node:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            known.add(node)


def _is_pure(node: fx.Node) -> bool:
    called = node.op == "call_method" or (node.op == "call_function" and is_torch(node.target))
    return called and node.target not in _RANDOM


def hold(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a tensor as what it is, a parameter or a buffer, in the place of what has that name."""
    if hasattr(module, name):
        delattr(module, name)
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _store(module: fx.GraphModule, made: fx.Node) -> None:
    inside = _cone(made)
    if inside is None:
        return
    sources = {n: _tensor(module, n) for n in inside if n.op == "get_attr"}
    learned = {n: value for n, value in sources.items() if isinstance(value, nn.Parameter)}
    if learned and not (len(learned) == len(sources) and _scales(inside)):
        return
    if learned and (_read_outside(inside, made) or _held_elsewhere(module, inside, learned.values())):
        return
    with torch.no_grad():
        value = _value(module, made, {}).clone()
    if learned:
        value = nn.Parameter(value, requires_grad=any(p.requires_grad for p in learned.values()))
    place = next((str(n.target) for n, p in learned.items() if p.shape == value.shape), None)
    if place is None:
        place = next(name for i in itertools.count() if not hasattr(module, name := f"stored_weight_{i}"))
    names = {str(n.target) for n in learned}
    with module.graph.inserting_before(made):
        stored = module.graph.get_attr(place)
    stored.meta = dict(made.meta)
    made.replace_all_uses_with(stored)
    for node in sorted(inside, reverse=True):
        if not node.users:
            module.graph.erase_node(node)
    for name in names - {place}:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    path, _, leaf = place.rpartition(".")
    hold(module.get_submodule(path), leaf, value)


def _cone(made: fx.Node) -> set[fx.Node] | None:
    """What a tensor is computed from, with itself; None where that is more than tensors of the network's own."""
    inside: set[fx.Node] = set()
    left = [made]
    while left:
        node = left.pop()
        if node in inside:
            continue
        if node.op != "get_attr" and not _is_pure(node):
            return None
        inside.add(node)
        left += node.all_input_nodes
    return inside


def _scales(inside: set[fx.Node]) -> bool:
    names = {str(getattr(node.target, "__name__", node.target)) for node in inside if node.op != "get_attr"}
    return names <= _SCALES


def _read_outside(inside: set[fx.Node], made: fx.Node) -> bool:
    return any(user not in inside for node in inside if node is not made for user in node.users)


def _held_elsewhere(module: fx.GraphModule, inside: set[fx.Node], learned: Iterable[Tensor]) -> bool:
    """Whether something else in the graph reads these parameters by whatever name, or calls a module that holds one."""
    ids = {id(value) for value in learned}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node not in inside and id(_tensor(module, node)) in ids:
            return True
        if node.op == "call_module":
            held = module.get_submodule(str(node.target)).parameters()
            if any(id(value) in ids for value in held):
                return True
    return False


def _tensor(module: fx.GraphModule, node: fx.Node) -> Tensor:
    return cast(Tensor, operator.attrgetter(str(node.target))(module))


def _value(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node not in known:
        if node.op == "get_attr":
            known[node] = _tensor(module, node)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _value(module, n, known))
            target: Any = node.target
            if node.op == "call_method":
                known[node] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                known[node] = target(*args, **kwargs)
    return known[node]
