"""Candidates on a finished model: what they offer, what the device says of it, and the model with what it found faster.

Every offer is compared with the model as it is on seeded random inputs in ONNX Runtime, before any device hears of it.
Then each is measured alone beside the model; where several are faster they are measured together, and that is taken if
it beats the best one. Faster is what has the upper bound of its latency ratio below 1.

Weights may be hashed first, so that they repeat themselves: those of the rewritten nodes alone. The offer is then
compared with the model that has the hashed weights; what the hashing costs is for the accuracy to judge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.graph.candidates.base import PACKAGE, Candidate
from pipeline.graph.optimize import Draft, Proof, finish
from pipeline.graph.passes.base import PassResult, Refusal
from profiles import plugins
from profiles.errors import DeployError

Edit = tuple[str, str]
"""Names of a candidate and of a node."""


@dataclass(frozen=True)
class Timing:
    """A rewritten model measured beside the model without its rewrites: latencies in ms, their ratio and its bounds."""

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float


Hash = Callable[[NDArray[Any]], NDArray[Any]]
"""The weights of one layer -> weights of the same shape and type that repeat themselves more."""

Measure = Callable[[Sequence[onnx.ModelProto]], Sequence[Timing]]
"""Measures rewritten models on the device, interleaved with the model that they were made from."""


@dataclass(frozen=True)
class Tried:
    """Rewrites that were measured, alone or together. taken: the chosen model is this one."""

    edits: tuple[Edit, ...]
    timing: Timing
    taken: bool = False


@dataclass(frozen=True)
class Choice:
    """The model with the rewrites that were taken, everything that was measured, and candidate -> what it refused."""

    model: onnx.ModelProto
    tried: tuple[Tried, ...]
    refused: Mapping[str, tuple[Refusal, ...]]

    def to_table(self) -> dict[str, Any]:
        """What happened as plain data; a bound that does not exist is None."""
        tried = [
            {
                "edits": [list(edit) for edit in each.edits], "taken": each.taken,
                **{key: value if math.isfinite(value) else None for key, value in vars(each.timing).items()},
            }
            for each in self.tried
        ]  # fmt: skip
        return {"tried": tried, "refused": {name: [vars(r) for r in rows] for name, rows in self.refused.items()}}


def choose(model: onnx.ModelProto, names: Sequence[str], measure: Measure, hashing: Hash | None = None) -> Choice:
    """Ask the device about everything that these candidates offer. Raises UsageError for an unknown candidate.

    hashing: applied to the weights of a node before it is rewritten; left out, weights stay as they are.
    """
    offers: dict[Edit, onnx.ModelProto] = {}
    refused = {}
    for name in names:
        models, refused[name] = offered(model, name, hashing)
        offers |= {(name, node): rewrite for node, rewrite in models.items()}
    times = measure(list(offers.values())) if offers else ()
    tried = [Tried((edit,), timing) for edit, timing in zip(offers, times, strict=True)]
    best: dict[str, Tried] = {}
    for each in sorted(tried, key=lambda each: each.timing.ratio):
        if each.timing.high < 1:
            best.setdefault(each.edits[0][1], each)
    taken, result = next(iter(best.values()), None), model
    if taken is not None:
        result = offers[taken.edits[0]]
    if len(best) > 1:
        edits = tuple(each.edits[0] for each in best.values())
        together = rewritten(model, edits, hashing)
        tried.append(Tried(edits, measure([together])[0]))
        if tried[-1].timing.high < 1 and tried[-1].timing.ratio < next(iter(best.values())).timing.ratio:
            taken, result = tried[-1], together
    return Choice(result, tuple(Tried(each.edits, each.timing, each is taken) for each in tried), refused)


def offered(
    model: onnx.ModelProto, name: str, hashing: Hash | None = None
) -> tuple[dict[str, onnx.ModelProto], tuple[Refusal, ...]]:
    """Node -> the model with that node rewritten, for each one proved; and what was refused, with the reasons."""
    nodes = [node.name for node in model.graph.node if node.op_type == "Conv"]
    offers = _candidate(name).offers(Draft(_hashed(model, nodes, hashing)).graph)
    models, refused = {}, list(offers.refused)
    for node in offers.nodes:
        try:
            models[node] = rewritten(model, [(name, node)], hashing)
        except DeployError as error:
            refused.append(Refusal(node, f"the rewrite failed its proof: {error.message}"))
    return models, tuple(refused)


def rewritten(model: onnx.ModelProto, edits: Sequence[Edit], hashing: Hash | None = None) -> onnx.ModelProto:
    """The model with every edit carried out. Raises DeployError where that changes its outputs.

    hashing: applied to the weights of these nodes before; its own effect on the outputs is not judged here.
    """
    given = _hashed(model, [node for _, node in edits], hashing)
    draft = Draft(given)
    for name, node in edits:
        draft.apply(partial(_rewrite, name=name, node=node))
    Proof(given)(draft.model)
    return finish(given, draft.model)


def _hashed(model: onnx.ModelProto, nodes: Sequence[str], hashing: Hash | None) -> onnx.ModelProto:
    """A copy in which the weights of these nodes are hashed; a weight that several nodes read stays as it is."""
    if hashing is None:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    readers = Counter(name for node in model.graph.node for name in node.input)
    own = {node.input[1] for node in model.graph.node if node.name in nodes and readers[node.input[1]] == 1}
    for tensor in result.graph.initializer:
        if tensor.name not in own:
            continue
        before = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(hashing(before).astype(before.dtype), tensor.name))
    return result


def _rewrite(graph: gs.Graph, name: str, node: str) -> PassResult:
    _candidate(name).rewrite(graph, node)
    return PassResult(1)


def _candidate(name: str) -> Candidate:
    return cast(Candidate, plugins.load(PACKAGE, name))
