"""The machine at hand, measured by the agent in processes of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from profiles.errors import DeployError
from profiles.schema import Profile
from targets._agents import AgentTarget, Answer, Table, Verb
from targets.base import Array, Progress, Target
from targets.harness import bench, building, device
from targets.harness import lease as leases
from targets.harness.agent.board import machine
from targets.harness.agent.board.base import AgentError
from targets.harness.device import Condition, Look
from targets.harness.lease import Lease, lease
from targets.runtimes.base import Opened, infer
from targets.runtimes.tensorrt import TensorRT

OPEN_SESSIONS = 4
INFER_S = 60.0
"""For opening and running a network, as others are told."""
NO_GPU = "measure where an NVIDIA GPU and its driver are; --target rtx builds engines for a card that is elsewhere."


class Local(AgentTarget):
    """This machine."""

    device = "local"

    def __init__(self, profile: Profile, state: Path) -> None:
        super().__init__(profile, state)
        self._opened: dict[tuple[str, int, int], Opened] = {}
        self._site = building.Here(state, self._leased, look=lambda: self._same(self._facts(), {}))
        self._held: Lease | None = None
        self._turn = threading.RLock()

    @contextmanager
    def _lease(self, holds_s: float) -> Iterator[Lease]:
        """Hold the device's lease; who holds it already goes on with it."""
        with self._turn:
            if self._held is not None:
                yield self._held
                return
            with lease(self.device, holds_s) as self._held:
                try:
                    yield self._held
                finally:
                    self._held = None

    def _leased(self, holds_s: float) -> AbstractContextManager[object]:
        """Hold the device for what disturbs whoever measures: building an engine, opening and running a network."""
        return self._lease(holds_s)

    def _facts(self) -> Table:
        try:
            return machine.asked_facts(self.runtime.name, self.profile.providers)
        except AgentError as error:
            raise building.refused(error.to_table(), self.runtime.name) from None

    def _state(self) -> Table:
        return machine.state(str(self.state))

    def _run(
        self, verb: Verb, job: Table, limit_s: float, progress: Progress | None = None, look: Look | None = None
    ) -> Answer:
        with self._lease(limit_s) as held:
            started, seen = bench.utc_now(), self._state() if verb == "drive" else Table()
            facts = self._facts()
            if look is not None:
                look(facts, seen)
            result = bench.run_agent(verb, job, self.state / "spool", limit_s, progress, held.note_agent)
        return Answer(result, facts, seen, held.owner, started)

    def _checked(self, onnx: Path, out: Path) -> None:
        with self._leased(INFER_S):
            self.runtime.build(onnx, out, self.profile.providers, self.profile.measure.threads)

    def infer(self, artifact: Path, batch: Sequence[Array]) -> list[Array]:
        """Outputs for a numpy batch of any size; the last few artifacts stay open."""
        with self._leased(INFER_S):
            return infer(self._open(artifact), batch, artifact.name)

    def _open(self, artifact: Path) -> Opened:
        if not artifact.is_file():
            raise DeployError(f"there is no file '{artifact}'.")
        stat = artifact.stat()
        key = (str(artifact.resolve()), stat.st_mtime_ns, stat.st_size)
        if key not in self._opened:
            if len(self._opened) >= OPEN_SESSIONS:
                del self._opened[next(iter(self._opened))]
            self._opened[key] = self.runtime.open(artifact, self.profile.providers, machine.usable_cores())
        return self._opened[key]

    def doctor(self) -> list[Condition]:
        """The lease, the preflight, the runtime with its providers, and the places that are written to."""
        found = [*self._leasing(), *self.preflight().conditions, self._runtime()]
        if not found[-1].ok:
            return found
        if self.profile.runtime == "ort":
            return [*found, self.placed()]
        return [*found, device.gpu_condition(self._facts(), NO_GPU), self.outputs()]

    def _leasing(self) -> list[Condition]:
        """Whether the device can be leased, and who holds it."""
        return [_lease_place(), device.lease_condition(leases.holder(self.device))]

    def _runtime(self) -> Condition:
        try:
            if not isinstance(self.runtime, TensorRT):
                return Condition("runtime", f"{self.runtime.name} {self.runtime.version()}", True)
            facts = self._facts()
            return Condition("runtime", f"{facts['runtime']} {facts['runtime_version']}", True)
        except DeployError as error:
            return Condition("runtime", "missing", False, "nothing can be measured without it", error.hint, fatal=True)

    def _providers(self) -> list[str]:
        try:
            return list(machine.apart(self.runtime.name, "providers", *self.profile.providers)["there"])
        except AgentError as error:
            raise building.refused(error.to_table(), self.runtime.name) from None


def _lease_place() -> Condition:
    folder = leases.lease_folder()
    writable = os.access(folder, os.W_OK)
    return Condition(
        "lease folder", str(folder), writable, "the device cannot be leased", f"make {folder} writable.", fatal=True
    )


def target(profile: Profile, state: Path) -> Target:
    """The plug-in."""
    return Local(profile, state)
