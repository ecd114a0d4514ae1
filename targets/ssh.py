"""A Linux board behind OpenSSH, measured by an agent that runs on the board."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from profiles.errors import DeployError, UsageError
from profiles.schema import Profile, profile_names
from targets._agents import AgentTarget, Answer, Table, Verb
from targets.base import Array, Progress, Target
from targets.harness import building, device, lease
from targets.harness.agent.board.files import sha256
from targets.harness.agent.board.inferring import pack_arrays, unpack_arrays
from targets.harness.device import Condition, Look
from targets.harness.engines import model_digest
from targets.harness.transport import DEVICE, HASH_S, WAIT_S, Board, Place, Refusal, refused
from targets.runtimes.base import Opened, Port, infer
from targets.runtimes.ort import copy_whole, unreadable

FACTS_S = 120.0
"""For a board to load a library of engines."""


class Ssh(AgentTarget):
    """A board, reached as the profile's `host` and `[ssh]` say."""

    def __init__(self, profile: Profile, state: Path) -> None:
        super().__init__(profile, state)
        if profile.host is None:
            file = f'write a file robot-7.toml with extends = "{profile.name}" and host = "robot-7"'
            hint = f"{file}, then --target robot-7.toml" if profile.name in profile_names() else 'add host = "robot-7".'
            raise UsageError(f"the profile '{profile.name}' names no board.", hint)
        self.board = Board(Place(profile.host, profile.ssh))
        self.board.runtime, self.board.providers = self.runtime.name, list(profile.providers)
        self._site = BoardSite(self.board, self._same)
        self._opened: dict[tuple[str, int, int], RemoteSession] = {}

    @contextmanager
    def resumable(self, name: str) -> Iterator[None]:
        """A board goes on with a job, and keeps what came of it."""
        with self.board.resumable(name):
            yield

    def _facts(self) -> Table:
        return self._plain_facts()

    def _plain_facts(self) -> Table:
        """As the board is now, nothing changed on it."""
        asked = {"do": "facts", "runtime": self.runtime.name, "providers": self.board.providers}
        return self.board.ask(asked, patience_s=FACTS_S)[0]

    def _providers(self) -> list[str]:
        asked = {"do": "providers", "asked": self.board.providers}
        return list(self.board.ask(asked, patience_s=FACTS_S)[0]["there"])

    def _state(self) -> Table:
        return self.board.ask({"do": "state", "device": DEVICE})[0]

    def _run(
        self, verb: Verb, job: Table, limit_s: float, progress: Progress | None = None, look: Look | None = None
    ) -> Answer:
        named = {str(path): sha256(str(path)) for path in dict.fromkeys(_paths(job))}
        files = {digest: Path(path) for path, digest in named.items()}
        names = {m["name"]: m["path"] for m in job["models"] if isinstance(m, dict)}
        device = self._device() if self.board.resumes else ""
        done = self.board.run(verb, _placed(job, named), files, names, limit_s, progress, look, device)
        facts, state = done.seen.get("facts", {}), done.seen.get("state", {})
        return Answer(done.result, facts, state, lease.owner(), done.started)

    def _checked(self, onnx: Path, out: Path) -> None:
        copy_whole(onnx, out)
        try:
            opened = self._open(out, str(onnx))
            shapes = [[1 if size is None else size for size in port.shape] for port in opened.inputs]
            opened.run([np.zeros(shape, port.dtype) for shape, port in zip(shapes, opened.inputs, strict=True)])
        except DeployError:
            if out.resolve() != onnx.resolve():
                out.unlink(missing_ok=True)
            raise

    def infer(self, artifact: Path, batch: Sequence[Array]) -> list[Array]:
        """Outputs for a numpy batch of any size, computed on the board."""
        return infer(self._open(artifact), batch, artifact.name)

    def _open(self, artifact: Path, name: str = "") -> RemoteSession:
        if not artifact.is_file():
            raise DeployError(f"there is no file '{artifact}'.")
        stat = artifact.stat()
        key = (str(artifact.resolve()), stat.st_mtime_ns, stat.st_size)
        if key not in self._opened:
            options = {"threads": 0, "spin": False, "providers": list(self.profile.providers), "seed": 0}
            self._opened[key] = RemoteSession(self.board, artifact, {**options, **self.runtime.options()}, name)
        return self._opened[key]

    def doctor(self) -> list[Condition]:
        """The connection, the lease, the preflight, and the runtime on the board with its providers."""
        try:
            hello, seen = self.board.hello, self._state()
        except DeployError as error:
            why = "nothing can be done without it"
            return [Condition("connection", error.message.rstrip("."), False, why, error.hint, fatal=True)]
        here = f"python {hello['python']} in {hello['folder']}"
        found = [Condition("connection", str(self.profile.host), True), Condition("agent", here, True)]
        found += [device.lease_condition(seen["holder"])]
        found += device.preflight(self.profile.measure, seen).conditions
        try:
            facts = self._plain_facts()
        except DeployError as error:
            why = "nothing can be measured without it"
            return [*found, Condition("runtime", error.message.rstrip("."), False, why, error.hint, fatal=True)]
        found += [Condition("runtime", f"{facts['runtime']} {facts['runtime_version']}", True)]
        if "gpu" in facts:
            found.append(device.gpu_condition(facts, "look at its driver on the board."))
        return [*found, self.placed() if self.profile.runtime == "ort" else self.outputs()]


class BoardSite:
    """A board on which engines are built: its own library, its own GPU, its own timing caches. look: as of `run`."""

    def __init__(self, board: Board, look: Look | None = None) -> None:
        self._board, self._look = board, look
        self._known: dict[str, Table] = {}

    def facts(self, name: str) -> Table:
        """The library and the GPU there, asked once."""
        if name not in self._known:
            self._known[name] = self._board.ask({"do": "facts", "runtime": name}, patience_s=FACTS_S)[0]["engines"]
        return self._known[name]

    def timing(self, name: str) -> str:
        """The board knows where its timing caches lie."""
        return name

    def build(self, models: Sequence[Path], order: Table, folder: Path, progress: Progress | None) -> list[Table]:
        """In one job that outlives the link. Weights that lie beside an ONNX file go too; the engines are fetched."""
        files: dict[str, Path] = {}
        asked: list[str | Table] = []
        for path in models:
            digests = model_digest(path)
            files |= {digest: path.parent / name if name else path for name, digest in digests.items()}
            own = digests.pop("")
            asked.append({"path": own, "name": path.name, "beside": digests} if digests else own)
        names = {path.name: str(path) for path in models}
        limit_s = building.BUILD_LIMIT_S * len(models)
        job = {**order, "models": asked, "tied": True}
        done = self._board.run("build", job, files, names, limit_s, progress, self._look)
        for number, made in enumerate(done.result["built"]):
            self._board.get(made["sha256"], made["size"], folder / f"engine-{number}.plan")
        return [made["record"] for made in done.result["built"]]


class RemoteSession(Opened):
    """An ONNX file that a board runs. The batch is free here: the board runs a fixed one over what it is given.

    name: what errors call it; left out, its path.
    """

    def __init__(self, board: Board, artifact: Path, options: Table, name: str = "") -> None:
        self._board, self._artifact, self._digest = board, artifact, sha256(str(artifact))
        self._name = name or str(artifact)
        self._options = options
        found = self._ask(None, b"")[0]
        self.inputs = tuple(_port(table) for table in found["inputs"])
        self.outputs = tuple(_port(table) for table in found["outputs"])

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """Outputs for arrays of the declared shapes."""
        table, data = pack_arrays([np.ascontiguousarray(array) for array in arrays])
        answer, found = self._ask(table["arrays"], data)
        return list(unpack_arrays(answer["arrays"], found))

    def _ask(self, arrays: list[Table] | None, data: bytes) -> tuple[Table, bytes]:
        request = {
            "do": "infer", "sha256": self._digest, "options": self._options, "arrays": arrays, "bytes": len(data),
            "device": DEVICE, "owner": lease.owner(), "wait_s": WAIT_S,
        }  # fmt: skip
        try:
            try:
                return self._board.try_to(request, data)
            except Refusal as error:
                if error.event["kind"] != "missing":
                    raise
            self._board.send({self._digest: self._artifact})
            return self._board.try_to(request, data, HASH_S)
        except Refusal as error:
            raise self._explain(error.event) from None

    def _explain(self, event: Table) -> DeployError:
        """The user's error for what the board says of this file."""
        place, message = self._board.place, str(event["message"]).rstrip(".")
        if "hint" in event:
            return building.refused(event, self._board.runtime)
        if event["kind"] == "model":
            version = str(self._board.ask({"do": "facts", "runtime": self._board.runtime})[0]["runtime_version"])
            if event["step"] == "open":
                return unreadable(self._name, version, message)
            return DeployError(f"'{self._name}' opens in ONNX Runtime {version} but does not run: {message}.")
        if event["kind"] in ("killed", "lost", "memory"):
            hint = "free memory on the board, or export the network again."
            return DeployError(f"the inferring process of '{self._name}' on '{place.host}' {message}.", hint)
        return refused(place, event, {self._digest: self._name})


def _port(table: Mapping[str, object]) -> Port:
    shape = table["shape"]
    assert isinstance(shape, list)
    return Port(str(table["name"]), (None, *shape[1:]) if shape else (), str(table["dtype"]))


def _paths(job: Table) -> list[Path]:
    models = [Path(m["path"] if isinstance(m, dict) else m) for m in job["models"]]
    return [*models, Path(job["reference"])] if "reference" in job else models


def _placed(job: Table, digest: Mapping[str, str]) -> Table:
    """The job with SHA-256 in the place of paths."""
    models = [{**m, "path": digest[m["path"]]} if isinstance(m, dict) else digest[m] for m in job["models"]]
    placed = {**job, "models": models}
    return {**placed, "reference": digest[job["reference"]]} if "reference" in job else placed


def target(profile: Profile, state: Path) -> Target:
    """The plug-in."""
    return Ssh(profile, state)
