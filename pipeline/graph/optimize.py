"""Rewrite an ONNX model by named passes, in order, again and again until nothing changes.

After every pass that changed something the model is compared with the one that came in, on seeded random inputs: a pass
that changes what the network computes is an error that names it and the passes before it.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from pipeline.graph.absorbed import absorb, absorbed
from pipeline.graph.inner import lift_parameters
from pipeline.graph.passes.base import PassResult, Refusal, is_parameter
from pipeline.graph.probe import with_shapes
from pipeline.graph.verify import Difference, check_model, compare_outputs, open_session, seeded_inputs
from profiles import plugins
from profiles.errors import DeployError

PACKAGE = "pipeline.graph.passes"
MOST_TURNS = 10


@dataclass(frozen=True)
class PassStep:
    """One pass of one turn: what it changed, what it refused and why, and how far outputs are from the first model's.

    max_abs, max_rel: None where nothing changed, so that nothing was compared.
    """

    turn: int
    name: str
    changed: int
    refused: tuple[Refusal, ...]
    max_abs: float | None
    max_rel: float | None
    seconds: float


@dataclass(frozen=True)
class PassLog:
    """Every pass that ran, in order, and the number of nodes before and after."""

    passes: tuple[str, ...]
    steps: tuple[PassStep, ...]
    nodes_before: int
    nodes_after: int

    @property
    def max_rel(self) -> float:
        """The largest relative difference after any pass."""
        return max((step.max_rel for step in self.steps if step.max_rel is not None), default=0.0)

    def to_json(self) -> str:
        """The log as JSON text."""
        return json.dumps(asdict(self), indent=1)


def optimize(onnx_path: Path, passes: Sequence[str], out: Path, *, seed: int = 0, tolerance: float = 1e-4) -> PassLog:
    """Apply the passes to a fixed point and write the result.

    tolerance: largest relative difference of an output (see verify.py) that rounding may make.
    Raises UsageError for an unknown pass, DeployError for one that breaks the model, the numbers, or never settles.
    """
    model = onnx.load_model(str(onnx_path))
    result, log = optimize_model(model, passes, seed=seed, tolerance=tolerance)
    onnx.save_model(result, str(out))
    return log


def optimize_model(
    model: onnx.ModelProto, passes: Sequence[str], *, seed: int = 0, tolerance: float = 1e-4
) -> tuple[onnx.ModelProto, PassLog]:
    """`optimize` in memory; the model that comes in is left as it is."""
    rewrites = {name: plugins.load(PACKAGE, name).rewrite for name in passes}
    check = Proof(model, seed, tolerance)
    work = Draft(model)
    steps: list[PassStep] = []
    for turn in range(1, MOST_TURNS + 1):
        for name in passes:
            before = [step.name for step in steps if step.changed]
            began = time.monotonic()
            try:
                result = work.apply(rewrites[name])
                gap = check(work.model) if result.changed else None
            except DeployError as error:
                text = f"the graph pass '{name}' failed: {error.message}"
                raise DeployError(text, _story(before, error.hint)) from error
            seconds = time.monotonic() - began
            size, share = (gap.max_abs, gap.max_rel) if gap else (None, None)
            steps.append(PassStep(turn, name, result.changed, result.refused, size, share, seconds))
        if not any(step.changed for step in steps if step.turn == turn):
            break
    else:
        last = ", ".join(step.name for step in steps if step.changed and step.turn == MOST_TURNS)
        raise DeployError(
            f"the graph passes have not settled after {MOST_TURNS} turns; still changing: {last}.",
            "take one out of graph.passes.",
        )
    final = finish(model, work.model)
    return final, PassLog(tuple(passes), tuple(steps), len(model.graph.node), len(final.graph.node))


def _story(before: Sequence[str], hint: str) -> str:
    """The hint of a failed pass: which passes had changed the model before it."""
    done = f"changed before it: {', '.join(before) or 'nothing'}."
    return " ".join(part for part in (done, hint, "Take it out of graph.passes to go on without it.") if part)


class Draft:
    """The model between passes: as a protocol buffer, and as the graph that passes edit, read again after a change."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._graph: gs.Graph | None = None

    @property
    def graph(self) -> gs.Graph:
        """The model as a graph with shapes; what is changed in it is kept by `apply` alone."""
        return self._graph or gs.import_onnx(with_shapes(self.model))

    def apply(self, rewrite: Callable[[gs.Graph], PassResult]) -> PassResult:
        """Run one pass; versions and metadata stay."""
        graph = self.graph
        result = rewrite(graph)
        self._graph = None if result.changed else graph
        if result.changed:
            self.model = self._write(graph)
        return result

    def _write(self, graph: gs.Graph) -> onnx.ModelProto:
        graph.toposort()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proto = gs.export_onnx(graph)
        proto.ir_version = self.model.ir_version
        proto.metadata_props.extend(self.model.metadata_props)
        del proto.graph.value_info[:]
        lift_parameters(proto.graph)
        return proto


class Proof:
    """Compares models with the first one, whose outputs are kept: `proof(model)` raises DeployError where they differ.

    tolerance: largest relative difference of an output that rounding may make.
    """

    def __init__(self, first: onnx.ModelProto, seed: int = 0, tolerance: float = 1e-4) -> None:
        self._feeds = seeded_inputs(first, seed)
        self._tolerance = tolerance
        session = open_session(first)
        self._expected = [list(session.run(None, feed)) for feed in self._feeds]

    def __call__(self, model: onnx.ModelProto) -> Difference:
        check_model(model)
        answers = iter(self._expected)
        gap = compare_outputs(lambda *_: next(answers), model, self._feeds)
        if gap.max_rel > self._tolerance:
            text = f"outputs differ by {gap.max_rel:.2g} of their largest value, allowed are {self._tolerance:.2g}."
            raise DeployError(text)
        return gap


def finish(before: onnx.ModelProto, after: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that notes in its metadata which parameters went into others."""
    result = onnx.ModelProto()
    result.CopyFrom(after)
    left = {tensor.name for tensor in after.graph.initializer}
    gone = {tensor.name for tensor in before.graph.initializer if is_parameter(tensor.name)} - left
    absorb(result, gone | absorbed(before))
    return result
