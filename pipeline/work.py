"""What the steps of a build share: the run, what was asked, the device, the project and its captured network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from pipeline.latency.operations import Operations
from pipeline.nouns import Growth, PruningPlan, Ranking, Topology
from pipeline.project import Project
from pipeline.prune.capture import Network, capture
from pipeline.prune.evidence import Samples
from pipeline.prune.groups import find_groups
from pipeline.prune.growth import regrow
from pipeline.prune.own_rules import unmet
from pipeline.prune.surgery import prune, restore
from pipeline.report.data import ReportData
from pipeline.run import Run
from pipeline.stage import Stage, code_digest
from profiles.errors import UsageError
from profiles.schema import Budget, Profile, PruneSpec
from targets.base import Target

DENSE, AGAIN, PRUNED = "dense", "dense-again", "pruned"
"""Names of the networks in a measuring session; the dense one stands in it twice."""
PRUNED_AGAIN = "pruned-again"
"""Where rewrites of the pruned network are measured, it stands in the session twice."""
TOOLS = ("edge-deploy", "torch", "numpy", "scipy", "onnx", "onnx-graphsurgeon", "onnxruntime")
"""Libraries whose versions the results of most stages depend on."""
NOISE_SAMPLES = 256


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with those of `over` laid over them."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


@dataclass(frozen=True)
class Captured:
    """A project's network with its groups. notes: what a release engineer should know of it, a sentence each."""

    network: Network
    notes: tuple[str, ...]


def captured(project: Project, model: Any, spec: PruneSpec) -> Captured:
    """Capture a project's network and prove its groups, with the user's own rules. model: what `project.model` gave.

    Raises DeployError for a network that cannot be captured, or a rule that does not fit, UsageError for a layer to
    freeze that it has not.
    """
    _refuse_unknown(spec.freeze, model)
    rules = {kind: rule.apply for kind, rule in project.rules.items()}
    network = capture(model, project.example(), rules)
    network = find_groups(network, freeze=spec.freeze, heads=spec.attention == "heads")
    notes = [f"'{name}' is left whole, {reason}." for name, reason in network.leaves.items()]
    files = [(kind, rule.file) for kind, rule in project.rules.items()]
    return Captured(network, (*notes, *unmet(network, model, files)))


def _refuse_unknown(frozen: Sequence[str], model: Any) -> None:
    """Raise UsageError for a name of `prune.freeze` that would freeze nothing; a captured network has lost some."""
    layers = {name for names in (model.named_modules(), model.named_parameters()) for name, _ in names}
    for name in frozen:
        if name.partition("[")[0] not in layers and not isinstance(model, fx.GraphModule):
            close = get_close_matches(name, layers, n=1)
            near = f" Did you mean '{close[0]}'?" if close else ""
            message = f"prune.freeze names '{name}', and the network has no such layer.{near}"
            raise UsageError(message, "deploy groups shows the layers of every group.")


def rebuilt(project: Project, plan: PruningPlan, weights: Mapping[str, Tensor], spec: PruneSpec) -> fx.GraphModule:
    """The network of a bundle as a torch module in eval mode, from the project's factory, plan.json and the weights.

    It is grown as the plan says before it is cut. spec: of the build, from the run's profile.json. Raises DeployError
    where plan, weights and project are not of one build.
    """
    network = captured(project, project.model(), spec).network
    grown = regrow(network, plan.growth, lambda graph: captured(project, graph, spec).network)
    return restore(prune(grown, plan), weights, "the bundle").eval()


@dataclass(frozen=True)
class BuildResult:
    """How a build ended. summary: the one JSON object of `--json`. exit_code: as profiles/errors.py says."""

    summary: Mapping[str, Any]
    report: ReportData | None
    bundle: Path | None
    exit_code: int


@dataclass(frozen=True)
class Prepared:
    """What was made of the user's network before pruning. given: that network. key: hash of the weights it has now.

    growth: what it grew by before, in order. slower: its latency over that of the given network, measured; 1 where it
    did not grow.
    """

    given: Network
    key: str
    growth: tuple[Growth, ...] = ()
    slower: float = 1.0


@dataclass(frozen=True)
class Work:
    """What every step needs. network: what is pruned. prepared: how it came about where it is not the user's own.

    samples: calibration samples for rankings and repair, none at all where the project names none. notes: what was
    decided for the user, a sentence each. rankings: the order in which units go, filled by the step that ranks.
    repairs: loss and accuracy of each way of repairing, filled by the step that tries it. precision: a
    sentence on what a precision below float32 does to the dense network, filled by the step that measures it.
    """

    run: Run
    profile: Profile
    budget: Budget
    target: Target
    project: Project
    network: Network
    samples: Samples
    notes: tuple[str, ...] = ()
    rankings: dict[str, Ranking] = field(default_factory=dict)
    repairs: dict[str, Any] = field(default_factory=dict)
    precision: list[str] = field(default_factory=list)
    prepared: Prepared | None = None

    @property
    def given(self) -> Network:
        """The user's own network: latency and accuracy are counted from it, and recovery follows it."""
        return self.prepared.given if self.prepared else self.network

    @property
    def slower(self) -> float:
        """Latency of the network that is pruned over that of the user's own."""
        return self.prepared.slower if self.prepared else 1.0

    @property
    def topology(self) -> Topology:
        """The network's topology."""
        return self.network.topology

    @cached_property
    def loss_samples(self) -> Samples:
        """What losses are measured on: the calibration samples, seeded noise where there are none."""
        return self.samples if self.samples.count else Samples(self.project.noise(NOISE_SAMPLES).inputs)

    @property
    def loss_samples_are(self) -> str:
        """`calibration samples` or `noise`."""
        return "calibration samples" if self.samples.count else "noise"

    @cached_property
    def operations(self) -> Operations:
        """Counts of operations for any choice of widths."""
        return Operations(self.topology)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the dense network, per sample."""
        return self.operations.macs()

    @property
    def source(self) -> str:
        """What every stage's key begins with: the project's hash, what a unit of attention is, how it was prepared."""
        attention = self.profile.prune.attention
        prepared = f":{self.prepared.key}" if self.prepared else ""
        return self.project.digest() + ("" if attention == "channels" else f":{attention}") + prepared

    @cached_property
    def sampled(self) -> dict[str, str]:
        """What the key of a ranking, a loss or a repair begins with: `source`, the samples, the code that makes it."""
        return {
            "project": self.source, "samples": self.loss_samples.digest(), "code": code_digest("pipeline.prune"),
        }  # fmt: skip

    def by_data(self, name: str) -> Stage:
        """A stage whose result depends on the project's data beyond the calibration samples, with `data` in its key.

        Where the project does not name the files, nothing would tell that they changed: no other run gets the result.
        """
        return Stage(name, always=self.project.data is None)

    @cached_property
    def data(self) -> dict[str, str | None]:
        """What the key of such a stage begins with: `source`, and what is known of the data."""
        return {"project": self.source, "data": self.project.data}

    @cached_property
    def taught(self) -> dict[str, str | None]:
        """What the key of a trained network begins with: `data`, and the code that trains it."""
        return {**self.data, "training": code_digest("pipeline.recover")}

    def scratch(self, name: str) -> Path:
        """A file of this run that is not a result."""
        return self.run.folder("work") / name
