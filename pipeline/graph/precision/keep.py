"""Which nodes of a network stay float32 when it goes to half precision, and why.

Half has 11 significant bits, its largest number is 65504, its smallest normal one 2^-14 and its step below that 2^-24.

    by operator     norms, softmaxes and what else divides by a sum; sums of many terms; recurrences; positions
    by structure    pieces of a norm that is written out; what is quantised; what has no half form in ONNX
    by weights      a number beyond 65504, or an array that half precision moves by more than ROUNDED of its size
    by samples      a tensor that comes within MARGIN of 65504, or lies below the normal numbers as a whole
    for company     what lies between nodes that stay, so that no cast is made for it; what shares a weight with one

A sum of n terms in half is off by about sqrt(n) 2^-11 of its size (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019),
and runtimes differ in what they add up in: above MOST_TERMS terms it stays float32.
Rounding moves an array of rms r by at most 2^-11 + 2^-25 / r of its size, so more than ROUNDED = 2^-10 means that its
numbers lie below the normal ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from pipeline.graph.passes.base import constant, is_parameter, static_shape
from pipeline.graph.precision.ports import Ports, find_ports, is_border, is_float32, touches_float32
from pipeline.graph.precision.ranges import Range
from pipeline.graph.sites import HEAVY

LARGEST = 65504.0
MARGIN = 4.0
"""What comes later may be so many times larger than anything seen on the samples."""
ROUNDED = 2.0**-10
SMALLEST = 2.0**-14
MOST_TERMS = 64

NORMS = frozenset(
    {
        "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization",
        "LpNormalization", "MeanVarianceNormalization", "LRN", "SkipLayerNormalization",
    }
)  # fmt: skip
SOFTMAXES = frozenset({"Softmax", "LogSoftmax", "Attention"})
SUMS = frozenset({"ReduceSum", "ReduceMean", "ReduceL1", "GlobalAveragePool", "AveragePool"})
POWERS = frozenset({"ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd", "LpPool",
                    "GlobalLpPool", "CumSum"})  # fmt: skip
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
POSITIONS = frozenset({"GridSample", "RoiAlign", "AffineGrid", "NonMaxSuppression"})
QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
MADE = frozenset({"Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform",
                  "RandomUniformLike", "Multinomial", "Bernoulli"})  # fmt: skip
BY_OPERATOR = (
    (NORMS, "it is a norm"),
    (SOFTMAXES, "it is a softmax"),
    (POWERS, "it adds up powers or products"),
    (RECURRENT, "it is recurrent, and its state adds up"),
    (POSITIONS, "it computes positions"),
    (QUANTISING, "it is quantised"),
    (MADE, "its type is an attribute"),
)
ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal"})
"""What a norm is made of where it is written out, besides its sums."""
ROOTS = frozenset({"Div", "Pow", "Sqrt", "Reciprocal"})
COMPUTING = HEAVY | {"Einsum"}
"""What is never kept in float32 for company."""

Reasons = dict[int, str]
"""id of a node -> why it stays float32."""


def find_kept(graph: gs.Graph, ranges: Mapping[str, Range], told: str = "the samples") -> Reasons:
    """Why each node stays float32 that touches float32 and does; ids are those of the graph's nodes.

    told: what the ranges were found on, for the reasons.
    """
    nodes = [node for node in graph.nodes if touches_float32(node) and not is_border(node)]
    pieces = _pieces(nodes)
    kept: Reasons = {}
    for node in nodes:
        reason = _reason(node, find_ports(node, graph.opset), pieces, ranges, told)
        if reason:
            kept[id(node)] = reason
    while _share(nodes, kept) or _enclose(nodes, kept):
        pass
    return kept


def _reason(
    node: gs.Node, ports: Ports | str, pieces: Mapping[int, str], ranges: Mapping[str, Range], told: str
) -> str | None:
    """What speaks against half precision in a node by itself."""
    by_operator = next((why for ops, why in BY_OPERATOR if node.op in ops), None)
    if by_operator:
        return by_operator
    if any(maker.op == "DequantizeLinear" for tensor in node.inputs for maker in tensor.inputs):
        return "it is quantised"
    if isinstance(ports, str):
        return ports
    terms = _terms(node) if node.op in SUMS else 0
    if terms is None or terms > MOST_TERMS:
        return f"it adds up {'an unknown number of' if terms is None else terms} terms"
    if id(node) in pieces:
        return pieces[id(node)]
    read, made = [node.inputs[i] for i in ports.inputs], [node.outputs[i] for i in ports.outputs]
    weights = (_weight_reason(tensor) for tensor in read if isinstance(tensor, gs.Constant))
    results = (_range_reason("its result", tensor, ranges, told) for tensor in made)
    sources = (_range_reason(f"it reads '{tensor.name}', which", tensor, ranges, told) for tensor in read)
    return next((why for why in (*weights, *results, *sources) if why), None)


def _terms(node: gs.Node) -> int | None:
    """How many numbers make one of the result, None where shapes are not known."""
    if node.op == "AveragePool":
        return int(math.prod(node.attrs["kernel_shape"]))
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    return None if before is None or after is None else math.prod(before) // max(1, math.prod(after))


def _weight_reason(tensor: gs.Constant) -> str | None:
    values = np.asarray(tensor.values)
    finite = values[np.isfinite(values)]
    largest = float(np.max(np.abs(finite), initial=0.0))
    if not np.isfinite(_rounded(np.float32(largest))):
        return f"'{tensor.name}' holds {largest:.3g}, and half precision ends at {LARGEST:.0f}"
    moved = rounding(finite)
    if moved > ROUNDED:
        return f"half precision moves '{tensor.name}' by {100 * moved:.3g} %: its numbers lie below {SMALLEST:.1e}"
    return None


def rounding(values: NDArray[np.floating]) -> float:
    """|half(x) - x| / |x| of an array in the Euclidean norm; 0 for an array of zeros."""
    wide = values.astype(np.float64)
    size = float(np.linalg.norm(wide))
    return float(np.linalg.norm(_rounded(values).astype(np.float64) - wide)) / size if size else 0.0


def _rounded(values: NDArray[np.floating] | np.floating) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(values).astype(np.float16)


def _range_reason(what: str, tensor: gs.Tensor, ranges: Mapping[str, Range], told: str) -> str | None:
    found = ranges.get(tensor.name)
    if found is None:
        return None
    if not math.isfinite(found.peak):
        return f"{what} is not finite on {told}"
    if found.peak * MARGIN > LARGEST:
        return f"{what} reaches {found.peak:.3g} on {told}, within {MARGIN:g}x of {LARGEST:.0f}"
    if 0 < found.rms < SMALLEST:
        return f"{what} has the rms {found.rms:.2g} on {told}, below {SMALLEST:.1e}"
    return None


# --- norms that are written out --------------------------------------------------------------------------------------


def _pieces(nodes: Iterable[gs.Node]) -> Reasons:
    """The sums of written-out norms, what is computed of their results, and what applies these to the whole tensor.

    A norm subtracts a statistic from a larger tensor, divides by one, or multiplies by one that a root or a division
    made.
    """
    found: Reasons = {}
    for start in nodes:
        if start.op in SUMS | POWERS and start.op != "AveragePool":
            path, ends = _statistics(start)
            rooted = any(node.op in ROOTS for node in path)
            applied = [node for node in ends if node.op in ("Sub", "Div") or (rooted and node.op == "Mul")]
            found |= {id(node): "it is a piece of a norm" for node in (*path, *applied) if applied}
    return found


def _statistics(start: gs.Node) -> tuple[list[gs.Node], list[gs.Node]]:
    """A sum with the arithmetic that works on its result alone, and what applies that to larger tensors."""
    path: list[gs.Node] = [start]
    ends: list[gs.Node] = []
    statistics = {id(start.outputs[0])}
    pending = list(start.outputs[0].outputs)
    while pending:
        node = pending.pop(0)
        if node.op not in ARITHMETIC or any(node is each for each in (*path, *ends)):
            continue
        if _is_larger(node, statistics):
            ends.append(node)
        else:
            path.append(node)
            statistics |= {id(tensor) for tensor in node.outputs}
            pending += [reader for tensor in node.outputs for reader in tensor.outputs]
    return path, ends


def _is_larger(node: gs.Node, statistics: set[int]) -> bool:
    """Whether a node's result has more elements than the statistics that it reads; so has one of unknown shape."""
    sizes = [static_shape(tensor) for tensor in node.inputs if id(tensor) in statistics]
    result = static_shape(node.outputs[0])
    if result is None or any(size is None for size in sizes):
        return True
    return math.prod(result) > max(math.prod(size or ()) for size in sizes)


# --- for company -----------------------------------------------------------------------------------------------------


def _share(nodes: Iterable[gs.Node], kept: Reasons) -> bool:
    """Keep what reads a parameter that a kept node reads: narrowing knows each by one name. Whether any was added."""
    before = len(kept)
    for node in nodes:
        if id(node) in kept:
            continue
        for tensor in node.inputs:
            if constant(tensor) is None or not is_parameter(tensor.name):
                continue
            other = next((reader for reader in tensor.outputs if id(reader) in kept), None)
            if other is not None:
                kept[id(node)] = f"it shares '{tensor.name}' with '{other.name}', which stays float32"
                break
    return len(kept) > before


def _enclose(nodes: Iterable[gs.Node], kept: Reasons) -> bool:
    """Keep light nodes in regions that float32 surrounds, some kept node among it. Whether any was added.

    The largest such set: all light nodes, less those with a neighbour in half, until none is left that has one.
    """
    free = {id(node): node for node in nodes if id(node) not in kept}
    light = {key: node for key, node in free.items() if node.op not in COMPUTING}
    around = {key: _neighbours(node) for key, node in light.items()}
    while out := [key for key in light if any(id(n) in free and id(n) not in light for n in around[key])]:
        for key in out:
            del light[key]
    for region in _regions(light, around):
        if any(id(n) not in free for node in region for n in around[id(node)]):
            kept |= {id(node): "it lies between nodes that stay float32" for node in region}
    return any(key in kept for key in free)


def _neighbours(node: gs.Node) -> list[gs.Node]:
    """Nodes that make its float32 inputs or read its float32 outputs, each once."""
    makers = [maker for tensor in node.inputs if is_float32(tensor) for maker in tensor.inputs]
    readers = [reader for tensor in node.outputs if is_float32(tensor) for reader in tensor.outputs]
    return list({id(each): each for each in (*makers, *readers)}.values())


def _regions(nodes: Mapping[int, gs.Node], around: Mapping[int, list[gs.Node]]) -> list[list[gs.Node]]:
    """Connected parts, in the order of their first nodes."""
    left, regions = dict(nodes), []
    while left:
        region, pending = [], [left.pop(next(iter(left)))]
        while pending:
            node = pending.pop()
            region.append(node)
            pending += [left.pop(id(n)) for n in around[id(node)] if id(n) in left]
        regions.append(region)
    return regions
