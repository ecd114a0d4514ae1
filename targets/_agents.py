"""A device with a measuring agent: what every target that has one asks of it, wherever the agent runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from profiles.errors import DeployError
from profiles.schema import MeasureSpec, Profile
from targets.base import LayerTime, Progress, RowTimes, Target
from targets.harness import bench, building, device
from targets.harness.device import Condition, Fingerprint, Look, Preflight
from targets.harness.measurement import Session
from targets.runtimes.base import load_runtime
from targets.runtimes.tensorrt import TensorRT

ROWS_LIMIT_S, ROW_BUILD_S = 600.0, 120.0
"""For timing rows; beyond that for the engine of each."""
LAYERS_LIMIT_S = 600.0
Table = dict[str, Any]
Verb = Literal["drive", "rows", "layers"]


@dataclass(frozen=True)
class Answer:
    """A finished job. result: the agent's; facts: of the device when the job began; state: too, in a `drive` only.

    owner: who held the lease; started: UTC, ISO 8601.
    """

    result: Table
    facts: Table
    state: Table
    owner: str
    started: str


class AgentTarget(Target):
    """A device that an agent measures. A subclass says how it is reached, and in `_site` where engines are built."""

    _site: building.Site

    def __init__(self, profile: Profile, state: Path) -> None:
        super().__init__(profile, state)
        self.runtime = load_runtime(profile.runtime).fitted(profile, state)
        self._first: Fingerprint | None = None

    @abstractmethod
    def _facts(self) -> Table:
        """What `agent.facts` reads on the device."""

    def _plain_facts(self) -> Table:
        """The same of the device as it is now, nothing changed on it."""
        return self._facts()

    @abstractmethod
    def _state(self) -> Table:
        """What `agent.state` reads on the device."""

    @abstractmethod
    def _run(
        self, verb: Verb, job: Table, limit_s: float, progress: Progress | None = None, look: Look | None = None
    ) -> Answer:
        """Have the agent do a job while the device is leased. The paths in it are files of this machine."""

    def _device(self) -> str:
        """What engines are built for: module, power mode, clocks, versions and GPU, read once."""
        return (self._first or self.fingerprint()).digest()

    def _same(self, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Raise UndecidedError where the device is no longer what it was when it was first looked at.

        A restart or an operator may change it at any time, and what is kept by a fingerprint is not to be another
        one's. facts: of the device while it is leased, {} of a job that an older agent began; state: unused.
        """
        if not facts:
            return
        seen = self._fingerprint_of(facts, self.profile.measure)
        self._first = self._first or seen
        device.require_same(self._first, seen)

    def _in_runtime(self, job: Table) -> Table:
        """The job with what its runtime has to know."""
        return {**job, "options": {**job["options"], **self.runtime.options()}}

    def build(self, onnx: Path, out: Path, progress: Progress | None = None) -> Path:
        """What the runtime makes of it: an engine, or the ONNX file itself, opened and run once."""
        return self.build_each({onnx: out}, progress)[0]

    def build_each(self, models: Mapping[Path, Path], progress: Progress | None = None) -> list[Path]:
        """`build` of several; the engines that are not kept from before are built in one job."""
        if isinstance(self.runtime, TensorRT):
            self.runtime.built_each(models, progress, self._site, self._device)
        else:
            for onnx, out in models.items():
                self._checked(onnx, out)
        return list(models.values())

    @abstractmethod
    def _checked(self, onnx: Path, out: Path) -> None:
        """Put a copy of an ONNX file at `out`, after it was opened and run once on the device."""

    def fingerprint(self) -> Fingerprint:
        """The device, its runtime and the profile's threading."""
        found = self._fingerprint_of(self._facts(), self.profile.measure)
        self._first = self._first or found
        return found

    def _fingerprint_of(self, facts: Mapping[str, Any], spec: MeasureSpec) -> Fingerprint:
        return device.fingerprint(facts, self.runtime.manner(self.profile.providers, spec, facts), spec)

    def outputs(self) -> Condition:
        """Whether outputs can be read on the device."""
        lacking = self._plain_facts().get("no_outputs") if isinstance(self.runtime, TensorRT) else None
        if not lacking:
            return super().outputs()
        why = "deploy build judges networks by them; deploy measure does without"
        return Condition("outputs", f"cannot be read: {lacking['why']}", False, why, lacking["mend"])

    @abstractmethod
    def _providers(self) -> list[str]:
        """Every provider that ONNX Runtime has on the device, after a small network ran there on the profile's."""

    def placed(self) -> Condition:
        """Whether ONNX Runtime runs where the profile asks for."""
        try:
            return device.providers_condition(self.profile.providers, self._providers())
        except DeployError as error:
            why = "the runtime would run elsewhere than asked"
            return Condition("providers", error.message.rstrip("."), False, why, error.hint, fatal=True)

    def preflight(self) -> Preflight:
        """How busy, hot and full the device is."""
        return device.preflight(self.profile.measure, self._state())

    def measure(
        self,
        artifacts: Mapping[str, Path],
        spec: MeasureSpec,
        mode: Literal["rank", "accept"],
        progress: Progress | None = None,
    ) -> Session:
        """Time all artifacts interleaved, in fresh processes."""
        hashes = bench.hash_artifacts(artifacts)
        job = self._in_runtime(bench.drive_job(artifacts, hashes, spec, mode, self.profile.providers))
        done = self._run(
            "drive", job, bench.session_limit_s(spec), progress, lambda _, seen: device.preflight(spec, seen).require()
        )
        fingerprint = self._fingerprint_of(done.facts, spec)
        preflight = device.preflight(spec, done.state)
        setting = bench.Setting(fingerprint, preflight, spec, mode, done.owner, done.started)
        return bench.session_of(done.result, hashes, setting)

    def rows(self, models: Sequence[Path], reference: Path, rounds: int, progress: Progress | None = None) -> RowTimes:
        """Time small models in turn with five sessions of the reference; engines are built of them in the same job."""
        bench.hash_artifacts({path.name: path for path in (*models, reference)})
        job = bench.rows_job(models, reference, rounds, self.profile.measure, self.profile.providers)
        order = self.runtime.order(self._site, self._device)
        limit_s = ROWS_LIMIT_S
        if order is not None:
            job["build"] = order
            limit_s += ROW_BUILD_S * len({*models, reference})
        result = self._run("rows", self._in_runtime(job), limit_s, progress, self._same).result
        ms = np.array(result["rows"], dtype=np.float64).reshape(len(models), rounds) * 1e-6
        reference_ms = np.median(np.array(result["reference"], dtype=np.float64), axis=1) * 1e-6
        return RowTimes(ms, reference_ms, np.array(result["group"], dtype=np.int64), tuple(result["again"]))

    def layers(self, artifacts: Mapping[str, Path], spec: MeasureSpec) -> Mapping[str, tuple[LayerTime, ...]]:
        """What the runtime's profiler counts, several short sessions of every artifact in turn."""
        hashes = bench.hash_artifacts(artifacts)
        job = self._in_runtime(bench.layers_job(artifacts, hashes, spec, self.profile.providers))
        result = self._run("layers", job, LAYERS_LIMIT_S, look=self._same).result
        return {name: tuple(LayerTime(**row) for row in result["layers"][name]) for name in artifacts}
