"""A network in half precision: weights and activations float16, or float32 where needed; inputs and outputs as before.

    x (float32) -> Cast -> y = W' x + b' -> … -> Cast -> softmax (float32) -> Cast -> … -> Cast -> output (float32)

W' and b' are rounded once and keep their names and axes, so that narrowing slices them as before. Every tensor has the
type of the node that makes it and at most one cast, shared by all readers that want the other type; what is computed
is in `ports`, what stays float32 in `keep`. This is no graph pass of `graph.passes`: those keep the numbers, know
nothing of samples and go on until nothing changes, while this rounds, once, at the end.

Written here because the ready-made converters do not fit. onnxconverter-common's and ONNX Runtime's float16 go by
operator alone, clip constants silently, and give invalid graphs for casts and resizes that the network itself has (its
issues 208, 272 and 320). NVIDIA's AutoCast, in ModelOpt, does look at samples, with a fixed limit of 512; ModelOpt 0.47
wants onnx 1.21, onnxruntime-gpu 1.24 and cupy, which is neither what runs here nor what a machine without a GPU has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from pipeline.graph.optimize import Draft
from pipeline.graph.passes.base import PassResult, Refusal, bypass, is_output
from pipeline.graph.precision.keep import Reasons, find_kept
from pipeline.graph.precision.ports import (
    HALF,
    SINGLE,
    Ports,
    find_ports,
    is_border,
    is_float32,
    is_half,
    nodes_within,
    touches_float32,
)
from pipeline.graph.precision.ranges import Range, find_ranges
from pipeline.graph.precision.rounding import allowed, spelt_out
from pipeline.graph.verify import Difference, Feed, check_model, difference, open_session
from profiles.errors import DeployError


@dataclass(frozen=True)
class Halved:
    """What became of a network. nodes: those that compute in half. kept: those that stay float32, and why.

    casts: nodes that change the type. samples: on which the ranges were found. max_rel: largest difference of an output
    from that of the network in float32 where every result is rounded, relative to the output's largest value; allowed:
    what rounding explains.
    """

    precision: str
    nodes: int
    kept: tuple[Refusal, ...]
    casts: int
    samples: int
    bytes_before: int
    bytes_after: int
    max_abs: float
    max_rel: float
    allowed: float


def halve(
    model: onnx.ModelProto, feeds: Sequence[Feed], told: str = "the samples", name: str = "the network"
) -> tuple[onnx.ModelProto, Halved]:
    """The model in half precision; the one that comes in is left as it is.

    feeds: inputs that show how large its tensors become; told: what they are, for the reasons. name: of the model.
    Raises DeployError where the outputs move by more than rounding explains, or are not finite.
    """
    ranges = find_ranges(model, feeds)
    draft, kept = Draft(model), list[Refusal]()

    def rewrite(graph: gs.Graph) -> PassResult:
        result = to_half(graph, ranges, told)
        kept.extend(result.refused)
        return result

    changed = draft.apply(rewrite).changed
    result = draft.model
    check_model(result)
    gap, bound = _compare(model, result, feeds)
    samples = sum(len(next(iter(feed.values()))) for feed in feeds)
    sizes = model.ByteSize(), result.ByteSize()
    done = Halved("fp16", changed, tuple(kept), _casts(result), samples, *sizes, gap.max_abs, gap.max_rel, bound)
    if gap.max_rel > bound:
        raise DeployError(
            f"half precision changes the outputs of {name} by {gap.max_rel:.2g} of their largest value on {told}, "
            f"where rounding explains {bound:.2g}.",
            'set precision = "fp32".',
        )
    return result, done


def to_half(graph: gs.Graph, ranges: Mapping[str, Range], told: str = "the samples") -> PassResult:
    """Edit a graph with known types in place; what stays float32 is refused with the reason."""
    kept = find_kept(graph, ranges, told)
    refused = tuple(Refusal(node.name, kept[id(node)]) for node in graph.nodes if id(node) in kept)
    ports = _ports(graph, kept)
    floats = {id(t): t for node in nodes_within(graph) for t in (*node.inputs, *node.outputs) if is_float32(t)}
    casts, halves = _Casts(graph), dict[int, gs.Variable]()
    for node in [node for node in graph.nodes if id(node) in ports]:
        for index in ports[id(node)].outputs:
            made = casts.leave(node, index) if is_output(graph, node.outputs[index]) else node.outputs[index]
            halves[id(made)] = made
        if node.op == "Cast" and ports[id(node)].outputs:
            node.attrs["to"] = TensorProto.FLOAT16
    _round_weights(graph, ports)
    for node in list(nodes_within(graph)):
        moving = ports[id(node)].inputs if id(node) in ports else ()
        for index, tensor in enumerate(node.inputs):
            wanted = index in moving
            if id(tensor) in floats and isinstance(tensor, gs.Variable) and (id(tensor) in halves) != wanted:
                node.inputs[index] = casts.other(tensor, to_half=wanted)
    for tensor in halves.values():
        tensor.dtype = np.float16
    casts.join()
    graph.cleanup(remove_unused_graph_inputs=False)
    return PassResult(len(ports), refused)


def _ports(graph: gs.Graph, kept: Reasons) -> dict[int, Ports]:
    """What becomes half of each node that does."""
    found = {}
    for node in graph.nodes:
        if touches_float32(node) and not is_border(node) and id(node) not in kept:
            ports = find_ports(node, graph.opset)
            assert isinstance(ports, Ports), ports
            found[id(node)] = ports
    return found


def _round_weights(graph: gs.Graph, ports: Mapping[int, Ports]) -> None:
    """Constants of nodes in half are rounded; one that float32 reads too gets a rounded copy beside it."""
    wanted: dict[int, list[tuple[gs.Node, int]]] = {}
    stored: dict[int, gs.Constant] = {}
    for node in graph.nodes:
        for index in ports[id(node)].inputs if id(node) in ports else ():
            if isinstance(node.inputs[index], gs.Constant):
                stored[id(node.inputs[index])] = node.inputs[index]
                wanted.setdefault(id(node.inputs[index]), []).append((node, index))
    for key, readers in wanted.items():
        tensor = stored[key]
        rounded = _half(np.asarray(tensor.values))
        if len(tensor.outputs) == len(readers) and not is_output(graph, tensor):
            tensor.values = rounded
            continue
        copy = gs.Constant(f"{tensor.name}/{HALF}", rounded)
        for node, index in readers:
            node.inputs[index] = copy


def _half(values: NDArray[np.floating]) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16)


class _Casts:
    """Casts of a graph while it is edited: at most one a tensor."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._made: dict[int, gs.Variable] = {}

    def other(self, tensor: gs.Variable, *, to_half: bool) -> gs.Variable:
        """The tensor in the type that it has not. Half that a cast made wider is taken from before that cast."""
        if id(tensor) not in self._made:
            maker = tensor.inputs[0] if tensor.inputs else None
            if to_half and maker is not None and is_border(maker):
                self._made[id(tensor)] = maker.inputs[0]
            else:
                kind = HALF if to_half else SINGLE
                result = gs.Variable(f"{tensor.name}/{kind}", np.dtype(kind).type, tensor.shape)
                self._made[id(tensor)] = self._add(tensor, result, kind)
        return self._made[id(tensor)]

    def leave(self, node: gs.Node, index: int) -> gs.Variable:
        """What a node makes in half of an output of the graph, which stays float32 under its name behind a cast."""
        result = node.outputs[index]
        half = gs.Variable(f"{result.name}/{HALF}", np.float16, result.shape)
        node.outputs[index] = half
        self._add(half, result, SINGLE)
        return half

    def join(self) -> None:
        """Let what reads half through two casts, there and back, read it as it is."""
        for node in [node for node in self._graph.nodes if is_border(node) and node.inputs[0].inputs]:
            maker = node.inputs[0].inputs[0]
            if is_border(maker) and is_half(maker.inputs[0]):
                bypass(self._graph, node, maker.inputs[0])

    def _add(self, source: gs.Variable, result: gs.Variable, kind: str) -> gs.Variable:
        to = TensorProto.FLOAT16 if kind == HALF else TensorProto.FLOAT
        name = f"/{source.name.strip('/')}/to_{kind}"
        self._graph.nodes.append(gs.Node("Cast", name=name, attrs={"to": to}, inputs=[source], outputs=[result]))
        return result


def _casts(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "Cast" for node in model.graph.node)


def _compare(before: onnx.ModelProto, after: onnx.ModelProto, feeds: Sequence[Feed]) -> tuple[Difference, float]:
    """The worst output over all samples, relative to its largest value on any of them; and what is allowed.

    As ONNX Runtime computes it here, and as it is where every result is rounded.
    """
    expected = _outputs(before, feeds)
    worst = Difference(0.0, 0.0, 1.0)
    for model in (after, spelt_out(after)):
        for a, b in zip(expected, _outputs(model, feeds), strict=True):
            worst = worst.worse(difference(a, b))
    return worst, allowed(after, sum(output.size for output in expected))


def _outputs(model: onnx.ModelProto, feeds: Sequence[Feed]) -> list[NDArray[Any]]:
    """Each output over all feeds."""
    session = open_session(model)
    rows = [session.run(None, dict(feed)) for feed in feeds]
    return [np.concatenate([np.ravel(part) for part in column]) for column in zip(*rows, strict=True)]
