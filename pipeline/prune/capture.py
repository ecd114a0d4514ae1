"""A network as an editable graph: torch.fx with modules kept, shapes known, every channel count a named constant.

`capture` deep-copies the network and traces it at the example's static shape (tracing.py): control flow on shapes is
resolved, numbers that depend on the batch stay computed. A user's module that cannot be traced becomes a leaf whose
channels stay, with the reason; where that is the network itself, the error names the module and the line. An operator
that a rule of the user's names stays whole too, and that rule says how channels pass. Then
(lowering.py) in-place operations become plain ones, layers called as functions become modules, and what counts or
indexes channels becomes a named module of operators.py; slices along channels are found by propagating labels once.
Every node is described by a neutral `labels.Op`, which is all that the rules see.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.nouns import Topology
from pipeline.outputs import tensors
from pipeline.prune import operators
from pipeline.prune.labels import Reader
from pipeline.prune.layout import channels_first, channels_last
from pipeline.prune.lowering import call_new, lower
from pipeline.prune.naming import kind_of_node
from pipeline.prune.proxy import numbers
from pipeline.prune.rules.base import Rule
from pipeline.prune.tracing import batched, trace
from pipeline.prune.weights import open_modules
from profiles.errors import DeployError

EMPTY = Topology((), (), {}, ())


@dataclass(frozen=True)
class Network:
    """A captured network. graph: editable, in eval mode, computes what the dense network computes.

    example: one input batch. shapes: node name -> output shape (of the example's batch). leaves: what could not be
    captured, with the reason. rules: the user's own, by the kind of operator that they speak for. topology and readers
    (units where channels are mixed): empty until `find_groups` fills them. samples: node name -> the axis along which
    the samples lie, where that is not the first (tokens first, as in nn.TransformerEncoderLayer). answers: the same for
    each tensor that it gives, None for one that is as long for any number of samples (fixed anchors); empty: all first.
    stacked: names of nodes in whose first axis all samples lie once, then all again (torch.cat([x, y], 0)).
    """

    graph: fx.GraphModule
    example: tuple[Tensor, ...]
    shapes: dict[str, tuple[int, ...]]
    leaves: dict[str, str] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    topology: Topology = EMPTY
    readers: tuple[Reader, ...] = ()
    samples: Mapping[str, int] = field(default_factory=dict)
    answers: tuple[int | None, ...] = ()
    stacked: frozenset[str] = frozenset()


def capture(model: nn.Module, example: Sequence[Tensor], rules: Mapping[str, Rule] | None = None) -> Network:
    """Deep-copy a network and capture it for inputs like `example` (batch axis first).

    rules: the user's own, by the kind of operator that each speaks for (naming.py); those operators stay whole.
    Raises DeployError where the network's own forward cannot be captured (naming module and line) or refuses the
    example's shape.
    """
    example, rules = tuple(example), dict(rules or {})
    _check_names(model)
    dense = copy.deepcopy(model).eval()
    wider = batched(example, 1)
    expected = [(wider, _outputs(dense, example, wider), 0.0), *_others(dense, wider)]
    open_modules(dense)
    leaves: dict[str, str] = {}
    graph = trace(dense, example, leaves, rules)
    lower(graph)
    for node in graph.graph.nodes:
        if kind_of_node(graph, node) in rules:
            node.meta["ruled"] = True
    _slice_channels(graph, example, leaves, rules)
    _skips_first(graph)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    channels_last(graph)
    try:
        _check(graph, expected)
    except Exception:  # noqa: BLE001  what stays whole may want tensors as torch makes them, as .view does
        channels_first(graph)
        _check(graph, expected)
    (shapes, given), (longer, more) = _shapes(graph, example), _shapes(graph, wider)
    along = tuple(_along(*sizes, len(example[0])) for sizes in zip(given, more, strict=True))
    axes, stacked = _samples(shapes, longer), _stacked(graph, example, shapes, longer)
    return Network(graph, example, shapes, leaves, rules, samples=axes, answers=along, stacked=stacked)


def _check_names(model: nn.Module) -> None:
    """Raise DeployError where the network calls a part of it what a torch.fx graph calls its own."""
    held = (*model.named_parameters(recurse=False), *model.named_buffers(recurse=False))
    own = {name for name, _ in (*model.named_children(), *held)}
    taken = own & ({*vars(fx.GraphModule), "meta"} - {*vars(nn.Module)})
    if taken:
        raise DeployError(
            f"the network cannot be captured: torch.fx keeps the name '{min(taken)}' for itself.",
            f"call {type(model).__name__}.{min(taken)} otherwise.",
        )


@torch.no_grad()
def _others(dense: nn.Module, inputs: tuple[Tensor, ...]) -> list[tuple[tuple[Tensor, ...], Any, float]]:
    """Inputs of other signs and scale, their outputs, and what these may differ by: a branch on data shows plainly."""
    others = tuple(x * -1.5 if x.is_floating_point() else x for x in inputs)
    try:
        return [(others, dense(*others), 1e-2)]
    except Exception:  # noqa: BLE001  a network may refuse such inputs, and says so in its own way
        return []


@torch.no_grad()
def _outputs(dense: nn.Module, example: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> Any:
    """What the network gives for these inputs. Raises DeployError where it refuses the example or gives a number."""
    try:
        found = dense(*inputs)
    except Exception as error:
        shapes = ", ".join(str(list(x.shape)) for x in example)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DeployError(
            f"the network refuses an input of shape {shapes}: {reason}.", "mend model.input.shape in deploy.toml."
        ) from error
    for place, value in numbers(found).items():
        where, kind = place.removeprefix("[").removesuffix("]").replace("][", ", "), type(value).__name__
        what = f"a number ({kind})" if isinstance(value, int | float) else f"of type {kind}"
        raise DeployError(
            f"the network cannot be captured: its output {where} is {what}, and no tensor.",
            "leave it out of what forward returns, or make it a tensor there.",
        )
    return found


class _Shapes(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


@torch.no_grad()
def _shapes(
    graph: fx.GraphModule, example: tuple[Tensor, ...]
) -> tuple[dict[str, tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of all nodes by name, and of all tensors that the graph gives."""
    run = _Shapes(graph)
    given = run.run(*example)
    return run.shapes, [tuple(each.shape) for each in tensors(given)]


def _samples(shapes: Mapping[str, tuple[int, ...]], wider: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Node name -> the first axis that a sample more makes longer, where that is not axis 0."""
    found = {name: _grown(shape, wider[name]) for name, shape in shapes.items()}
    return {name: axis for name, axis in found.items() if axis}


class _Rows(fx.Interpreter):
    """Runs a graph and keeps a random sum of each row of some nodes; rows that differ have other sums."""

    def __init__(self, graph: fx.GraphModule, wanted: frozenset[str]) -> None:
        super().__init__(graph)
        self.wanted, self.sums = wanted, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            rows = value.reshape(len(value), -1).double()
            weights = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self.sums[n.name] = rows @ weights
        return value


@torch.no_grad()
def _stacked(
    graph: fx.GraphModule, example: tuple[Tensor, ...], shapes: Mapping[str, tuple[int, ...]],
    wider: Mapping[str, tuple[int, ...]],
) -> frozenset[str]:  # fmt: skip
    """Nodes in whose first axis several runs of all samples lie one behind the other.

    Asked of the graph: of two samples the second is changed, and every second row changes with it instead of the
    second half. Most networks have no node with more rows than samples, and nothing is run for them.
    """
    count = len(example[0])
    folded = frozenset(name for name, shape in shapes.items() if _grown(shape, wider[name]) == 0 and shape[0] > count)
    if not folded:
        return folded
    first, second = _Rows(graph, folded), _Rows(graph, folded)
    two = tuple(x[:1].repeat(2, *[1] * (x.dim() - 1)) for x in example)
    first.run(*two)
    second.run(*(torch.cat([x[:1], x[1:] * -1.5]) if x.is_floating_point() else x for x in two))
    found = set()
    for name, sums in first.sums.items():
        changed = sums != second.sums[name]
        behind = torch.arange(len(changed)) % 2 == 1
        if len(changed) > 2 and bool((changed == behind).all()):
            found.add(name)
    return frozenset(found)


def _along(shape: tuple[int, ...], wider: tuple[int, ...], samples: int) -> int | None:
    """The axis that holds as many rows for each of the samples, None where none does. wider: with a sample more."""
    axis = _grown(shape, wider)
    return axis if axis is not None and shape[axis] * (samples + 1) == wider[axis] * samples else None


def _grown(shape: tuple[int, ...], wider: tuple[int, ...]) -> int | None:
    """The first axis that a sample more makes longer, None where none does."""
    return next((axis for axis, sizes in enumerate(zip(shape, wider, strict=True)) if sizes[0] != sizes[1]), None)


def _slice_channels(
    graph: fx.GraphModule, example: tuple[Tensor, ...], leaves: dict[str, str], rules: Mapping[str, Rule]
) -> None:
    """Slices along an axis that turns out to hold channels become named modules."""
    from pipeline.prune.groups import propagate
    from pipeline.prune.neutral import picked

    shapes = {n.name: n.meta["shape"] for n in graph.graph.nodes if isinstance(n.meta.get("shape"), tuple)}
    shapes = {name: shape for name, shape in shapes.items() if all(isinstance(n, int) for n in shape)}
    sliced = [n for n in graph.graph.nodes if n.target is operator.getitem and picked(n, shapes)]
    if not sliced:
        return
    space = propagate(Network(graph, example, shapes, leaves, rules))
    for node in sliced:
        source, index = node.args[0], list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
        found = picked(node, shapes)
        labels = space.tensors.get(source.name)
        if found is None or labels is None:
            continue
        for axis, (place, positions) in found.items():
            if labels.at(axis) is None or not positions:
                continue
            module: nn.Module
            if positions == list(range(positions[0], positions[-1] + 1)):
                module, stem = operators.ChannelSlice(positions[0], positions[-1] + 1, axis), "channel_slice"
            else:
                module, stem = operators.ChannelGather(positions, axis), "channel_gather"
            source = call_new(graph, node, f"{stem}_0", module, (source,))
            index[place] = slice(None)
        if all(part == slice(None) or part is Ellipsis for part in index):
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
        else:
            node.args = (source, tuple(index))


def ancestors(graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """Every node -> itself and all nodes that it depends on."""
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        found[node] = frozenset({node}).union(*(found[n] for n in node.all_input_nodes))
    return found


def apart(a: fx.Node, b: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """What a depends on and b does not, and the other way round; each depends on itself.

    Walks back from both, the latest node first, and ends where all that is left to visit is reached from both.
    """
    marks = {a: 1}
    marks[b] = marks.get(b, 0) | 2
    only: tuple[set[fx.Node], set[fx.Node]] = (set(), set())
    while any(mark < 3 for mark in marks.values()):
        node = max(marks)
        mark = marks.pop(node)
        if mark < 3:
            only[mark - 1].add(node)
        for source in node.all_input_nodes:
            marks[source] = marks.get(source, 0) | mark
    return only


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
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), operators.ResidualAdd):
            continue
        first, _ = sorted(apart(*node.args), key=lambda nodes: weight_count(graph, nodes))
        for early in sorted(first):
            inputs = [n for n in early.all_input_nodes if n.op != "placeholder"]
            if inputs and early.op not in ("placeholder", "get_attr"):
                max(inputs).append(early)


@torch.no_grad()
def _check(graph: fx.GraphModule, expected: Iterable[tuple[tuple[Tensor, ...], Any, float]]) -> None:
    """Raise DeployError where the graph does not give these outputs for these inputs."""
    for inputs, outputs, share in expected:
        _check_equal(outputs, graph(*inputs), share)


def _check_equal(expected: Any, got: Any, share: float) -> None:
    """Raise DeployError where outputs differ by more than rounding, and by more than this share of the largest."""
    before, after = tensors(expected), tensors(got)
    if not before or len(before) != len(after):
        raise DeployError(
            "the network's output holds no tensors that could be found.",
            "return a tensor, or tuples, lists and dicts of tensors, from forward.",
        )
    for a, b in zip(before, after, strict=True):
        size = float(a.float().nan_to_num().abs().max()) if a.numel() else 0.0
        near = max(1e-4, share * size)
        if not torch.allclose(a.float(), b.float(), rtol=1e-3, atol=near, equal_nan=True):
            raise DeployError(
                f"the captured network differs from the given one by {float((a - b).abs().max()):.3g}.",
                "the forward depends on state or on random numbers; make it a function of its inputs.",
            )
