"""What all contestants of a network share: dense weights, data, recovery, the way to ONNX, the device, the judge."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.builds import TARGET, accepting
from benchmarks.frontier.bisection import Steps
from benchmarks.frontier.noise import mistakes
from benchmarks.frontier.sessions import PRUNED, Sitting, Timed, accept, sit
from benchmarks.lines import Row
from pipeline.graph.export import export
from pipeline.graph.optimize import optimize
from pipeline.project import load_project, predict_torch
from pipeline.prune.capture import capture
from pipeline.prune.evidence import Samples
from pipeline.prune.neutral import layers
from pipeline.recover.train import RecoverData, Recovered, recover
from pipeline.search import KEEPS
from profiles.schema import load_profile
from targets.base import load_target

Overrides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Pace:
    """How much is spent. overrides: keys of the profile, for every contestant and for `deploy build` alike.

    sparse_epochs: of Torch-Pruning's sparse training. most_epochs: of training from nothing.
    """

    overrides: Overrides
    steps: Steps
    sparse_epochs: int
    most_epochs: int

    @property
    def flags(self) -> tuple[str, ...]:
        """The overrides as flags of `deploy build`."""
        pairs = ((f"{table}.{key}", value) for table, keys in self.overrides.items() for key, value in keys.items())
        return tuple(word for name, value in pairs for word in ("--set", f"{name}={value}"))


FULL = Pace({"recover": {"max_minutes": 600}}, Steps(), sparse_epochs=4, most_epochs=10)
"""A recovery is never cut short by its clock, so that all take the same steps."""
QUICK_LIMIT = 1024
"""Images of each split in a try-out (EDGE_DATA_LIMIT)."""
QUICK = Pace(
    {
        "recover": {"max_minutes": 600},
        "prune": {"rounds": 1, "calibration": 64, "solver_seconds": 3},
        "measure": {
            "rank_processes": 1, "rank_rounds": 5, "accept_processes": 2, "accept_rounds": 10, "block_min_ms": 1,
            "warmup_s": 0.1, "warmup_max_s": 0.5,
        },
    },
    Steps(scan=(0.3, 0.6, 0.9), points=2, sessions=1),
    sparse_epochs=1,
    most_epochs=1,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A contestant's network before the recovery.

    start: gives it. before: validation accuracies by name of the repair. seconds: by what they went on. sittings:
    sessions that its search measured, accepting ones too; `contaminated` of them stayed disturbed. facts: what else is
    worth keeping. finished: the distilled network where the contestant recovers by itself (ours), with its test
    accuracy. epochs, learning_rate: of a training from nothing.
    """

    start: Callable[[], nn.Module]
    ratio: float
    before: dict[str, float]
    seconds: dict[str, float]
    sittings: int
    facts: dict[str, Any] = field(default_factory=dict)
    finished: tuple[Path, float] | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    contaminated: int = 0


class NeverMet(Exception):
    """A contestant has no network that keeps the budget. seconds, sittings: as in `Entry`."""

    def __init__(self, reason: str, seconds: Mapping[str, float], sittings: int) -> None:
        super().__init__(reason)
        self.seconds, self.sittings = dict(seconds), sittings


class Arena:
    """A network's part of the arena. folder: where everything of it lies."""

    def __init__(self, net: str, pace: Pace, folder: Path, *, trained: bool = True) -> None:
        """trained=False: without the weights file, which is to be made."""
        self.net, self.pace, self.folder = net, pace, folder
        self.place = accepting(net, folder / "project")
        if not trained:
            toml = self.place / "deploy.toml"
            toml.write_text(re.sub(r"(?m)^weights *=.*\n", "", toml.read_text()))
        self.project = load_project(self.place)
        tables = {*self.project.overrides, *pace.overrides}
        merged = {t: {**self.project.overrides.get(t, {}), **pace.overrides.get(t, {})} for t in tables}
        self.profile = load_profile(TARGET, merged)
        self.target = load_target(self.profile, folder / ".deploy")
        self.model = self.project.model()
        self.dense = capture(self.model, self.project.example())

    # --- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def samples(self) -> Samples:
        """Calibration samples, as many as a build takes."""
        batches = self.project.calibration(self.profile.prune.calibration)
        return Samples(batches.inputs, batches.targets)

    @cached_property
    def classes(self) -> int:
        """Width of the output."""
        with torch.no_grad():
            return int(self.model(*self.project.example()).shape[1])

    @cached_property
    def images(self) -> int:
        """How many images the test accuracy is taken on."""
        seen = []

        def count(inputs: Any) -> Any:
            seen.append(len(inputs))
            return np.zeros((len(inputs), self.classes), np.float32)

        self.project.evaluate(count)
        return sum(seen)

    @cached_property
    def held_out(self) -> int:
        """How many images the validation accuracy is taken on."""
        seen = []

        def count(inputs: Any) -> Any:
            seen.append(len(inputs))
            return np.zeros((len(inputs), self.classes), np.float32)

        self.project.validate(count)
        return sum(seen)

    # --- judging -------------------------------------------------------------------------------------------------

    def validated(self, model: nn.Module) -> float:
        """Accuracy of a torch network on the validation split."""
        return float(self.project.validate(predict_torch(model)) or 0.0)

    def judged(self, onnx: Path) -> tuple[float, float]:
        """Accuracies of a finished file on the device: validation and test."""

        def predict(inputs: Any) -> Any:
            return self.target.infer(onnx, [np.asarray(inputs)])[0]

        return float(self.project.validate(predict) or 0.0), float(self.project.evaluate(predict) or 0.0)

    def mistakes(self, onnx: Path) -> Row:
        """Which test images a finished file gets wrong, and how far its errors go together."""
        parts: list[Any] = []

        def predict(inputs: Any) -> Any:
            outputs = self.target.infer(onnx, [np.asarray(inputs)])[0]
            parts.append(outputs.argmax(1))
            return outputs

        self.project.evaluate(predict)
        test = np.concatenate(parts)
        parts.clear()
        self.project.validate(predict)
        return mistakes(self.net, test, np.concatenate(parts)) if parts else {}

    # --- the way to the device -----------------------------------------------------------------------------------

    @cached_property
    def onnx(self) -> Path:
        """The dense network, exported and optimised as all others."""
        return self.written(self.dense.graph, self.folder / "dense.onnx")

    def written(self, model: nn.Module, out: Path) -> Path:
        """Export and run the graph passes of a build."""
        out.parent.mkdir(parents=True, exist_ok=True)
        graph = self.profile.graph
        raw = export(model, self.project.inputs, out.with_suffix(".raw.onnx"), graph.opset)
        optimize(raw, graph.passes, out)
        raw.unlink()
        return out

    def captured(self, model: nn.Module) -> nn.Module:
        """A peer's network as the graph that a build would recover and export."""
        return capture(model, self.project.example()).graph

    def sit(self, files: Mapping[str, Path]) -> Sitting:
        """One session of ranking length beside the dense network."""
        return sit(self.target, self.onnx, files, self.profile.measure, "rank")

    def accept(self, file: Path, budget: float) -> tuple[Timed, bool, int]:
        """A network's latency in a session of accepting length, whether that was contaminated, sessions taken."""
        sitting, count = accept(self.target, self.onnx, file, self.profile.measure, budget)
        return sitting.times[PRUNED], sitting.contaminated, count

    def limit(self, budget: float) -> float:
        """The measured ratio up to which a network is taken to keep a budget, the one of our own search."""
        return budget * KEEPS

    def size(self, model: nn.Module) -> dict[str, int]:
        """Parameters and multiply-accumulates."""
        network = capture(model, self.project.example())
        macs = sum(int(np.prod(layer.shape)) * layer.positions for layer in layers(network))
        return {"parameters": sum(p.numel() for p in model.parameters()), "macs": macs}

    # --- training ------------------------------------------------------------------------------------------------

    def recovered(
        self, model: nn.Module, *, distilled: bool, epochs: int | None = None, learning_rate: float | None = None,
        hooks: Sequence[str] | None = None,
    ) -> Recovered:  # fmt: skip
        """The recovery of a build, from the dense network and the labels or from the labels alone.

        epochs, learning_rate: where it is a training from nothing; all epochs are taken then. hooks: others than the
        profile's.
        """
        spec = self.profile.recover
        changes: dict[str, Any] = {} if distilled else {"alpha": 0.0}
        if epochs is not None:
            changes |= {"epochs": epochs, "patience": epochs}
        if learning_rate is not None:
            changes["learning_rate"] = learning_rate
        if hooks is not None:
            changes["hooks"] = tuple(hooks)
        assert self.project.train is not None
        data = RecoverData(self.project.train, self.project.loss, self.validated)
        checkpoint = self.folder / "recover.checkpoint"
        checkpoint.unlink(missing_ok=True)
        done = recover(model, self.dense.graph, data, spec.model_copy(update=changes), checkpoint)
        checkpoint.unlink(missing_ok=True)
        return done
