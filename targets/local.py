"""The machine at hand: ONNX Runtime on its processor, measured by the agent in processes of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from profiles.errors import DeployError, UsageError
from profiles.schema import MeasureSpec, Profile
from targets.base import Array, LayerTime, Progress, RowTimes, Target
from targets.harness import agent, bench, device
from targets.harness import lease as leases
from targets.harness.device import Condition, Fingerprint, Preflight
from targets.harness.lease import lease
from targets.harness.measurement import Session
from targets.runtimes.base import Opened, infer, load_runtime

ROWS_LIMIT_S = 600.0
LAYERS_LIMIT_S = 600.0
OPEN_SESSIONS = 4


class Local(Target):
    """This machine."""

    device = "local"

    def __init__(self, profile: Profile, state: Path) -> None:
        super().__init__(profile, state)
        self.runtime = load_runtime(profile.runtime)
        if profile.runtime != "ort":
            raise UsageError(
                f"target 'local' runs the runtime 'ort', the profile '{profile.name}' asks for '{profile.runtime}'."
            )
        self._opened: dict[tuple[str, int, int], Opened] = {}

    def fingerprint(self) -> Fingerprint:
        """This machine, its ONNX Runtime and the profile's threading."""
        return self._fingerprint(self.profile.measure)

    def _fingerprint(self, spec: MeasureSpec) -> Fingerprint:
        return device.fingerprint(agent.facts(self.runtime.name), self.profile.providers, spec)

    def preflight(self) -> Preflight:
        """How busy, hot and full this machine is."""
        return device.preflight(self.profile.measure, folder=self.state)

    def build(self, onnx: Path, out: Path) -> Path:
        """The ONNX file itself, opened and run once."""
        return self.runtime.build(onnx, out, self.profile.providers, self.profile.measure.threads)

    def measure(
        self,
        artifacts: Mapping[str, Path],
        spec: MeasureSpec,
        mode: Literal["rank", "accept"],
        progress: Progress | None = None,
    ) -> Session:
        """Time all artifacts interleaved, in fresh processes."""
        hashes = bench.hash_artifacts(artifacts)
        limit_s = bench.session_limit_s(spec)
        with lease(self.device, limit_s) as held:
            state = device.preflight(spec, folder=self.state).require()
            setting = bench.Setting(self._fingerprint(spec), state, spec, mode, held.owner, bench.utc_now())
            job = bench.drive_job(artifacts, hashes, spec, mode, self.profile.providers)
            result = bench.run_agent("drive", job, self.state / "spool", limit_s, progress, held.note_agent)
        return bench.session_of(result, hashes, setting)

    def rows(self, models: Sequence[Path], reference: Path, rounds: int) -> RowTimes:
        """Time small models in turn with five sessions of the reference."""
        bench.hash_artifacts({path.name: path for path in (*models, reference)})
        job = bench.rows_job(models, reference, rounds, self.profile.measure, self.profile.providers)
        with lease(self.device, ROWS_LIMIT_S) as held:
            result = bench.run_agent("rows", job, self.state / "spool", ROWS_LIMIT_S, None, held.note_agent)
        ms = np.array(result["rows"], dtype=np.float64).reshape(len(models), rounds) * 1e-6
        return RowTimes(ms, np.median(np.array(result["reference"], dtype=np.float64), axis=0) * 1e-6)

    def layers(self, artifacts: Mapping[str, Path], spec: MeasureSpec) -> Mapping[str, tuple[LayerTime, ...]]:
        """What ONNX Runtime's profiler counts, several short sessions of every artifact in turn."""
        hashes = bench.hash_artifacts(artifacts)
        job = bench.layers_job(artifacts, hashes, spec, self.profile.providers)
        with lease(self.device, LAYERS_LIMIT_S) as held:
            result = bench.run_agent("layers", job, self.state / "spool", LAYERS_LIMIT_S, None, held.note_agent)
        return {name: tuple(LayerTime(**row) for row in result["layers"][name]) for name in artifacts}

    def infer(self, artifact: Path, batch: Sequence[Array]) -> list[Array]:
        """Outputs for a numpy batch of any size; the last few artifacts stay open."""
        return infer(self._open(artifact), batch, artifact.name)

    def _open(self, artifact: Path) -> Opened:
        if not artifact.is_file():
            raise DeployError(f"there is no file '{artifact}'.")
        stat = artifact.stat()
        key = (str(artifact.resolve()), stat.st_mtime_ns, stat.st_size)
        if key not in self._opened:
            if len(self._opened) >= OPEN_SESSIONS:
                del self._opened[next(iter(self._opened))]
            self._opened[key] = self.runtime.open(artifact, self.profile.providers, agent.usable_cores())
        return self._opened[key]

    def doctor(self) -> list[Condition]:
        """The lease, the preflight, the runtime with its providers, and the places that are written to."""
        found = [_lease_place(), device.lease_condition(leases.holder(self.device))]
        return [*found, *self.preflight().conditions, self._runtime(), self._providers()]

    def _runtime(self) -> Condition:
        try:
            return Condition("runtime", f"onnxruntime {self.runtime.version()}", True)
        except DeployError as error:
            return Condition("runtime", "missing", False, "nothing can be measured without it", error.hint, fatal=True)

    def _providers(self) -> Condition:
        import onnxruntime

        there = list(onnxruntime.get_available_providers())
        lacking = [name for name in self.profile.providers if name not in there]
        why, mend = "the runtime would run elsewhere than asked", f"set providers to some of {', '.join(there)}."
        return Condition("providers", ", ".join(self.profile.providers), not lacking, why, mend, fatal=True)


def _lease_place() -> Condition:
    folder = leases.lease_folder()
    writable = os.access(folder, os.W_OK)
    return Condition(
        "lease folder", str(folder), writable, "the device cannot be leased", f"make {folder} writable.", fatal=True
    )


def target(profile: Profile, state: Path) -> Target:
    """The plug-in."""
    return Local(profile, state)
