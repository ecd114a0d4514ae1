"""The host's side of building an engine: asks which library is here, looks for the engine by its key, else builds it.

The builder runs in a process of its own (`agent/board/tensorrt/job.py`), which is told to end with this one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from profiles.errors import DeployError, ScarceError
from targets.harness import pack
from targets.harness.agent.board import machine
from targets.harness.agent.board.tensorrt import dla
from targets.harness.engines import Engines, engine_key, model_digest, timing_name
from targets.harness.spool import working_folder

INSTALL = {
    "tensorrt": "JetPack brings it; elsewhere: pip install tensorrt, from where NVIDIA's index is reached.",
    "tensorrt-rtx": "pip install 'edge-deploy[tensorrt-rtx]'",
}
BUILD_HINT = 'export the network again, or run it elsewhere: runtime = "ort".'
BUILD_LIMIT_S = 3600.0
"""For the engine of one network, which takes minutes."""
PREFIX = "build-"
KILL_S = 5.0
HUNG_HINT = "the GPU's driver may hang: look at it (dmesg | tail, nvidia-smi), and start the machine anew."
KILLED_HINT = "lower tensorrt.workspace_mib, close what else holds memory, or add swap while building."
Progress = Callable[[float], None]
Table = dict[str, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """An engine. record: what was done to build it; reused: whether it was there already."""

    plan: Path
    key: str
    record: Mapping[str, Any]
    reused: bool


class Site(Protocol):
    """A device on which engines are built. All methods raise DeployError in one sentence for what is refused there."""

    def facts(self, name: str) -> Table:
        """The library of a runtime (`library`), the GPU (`gpu`) and for which others it builds (`capabilities`)."""

    def timing(self, name: str) -> str:
        """How a builder there is told of the timing cache of this name."""

    def build(self, models: Sequence[Path], order: Table, folder: Path, progress: Progress | None) -> list[Table]:
        """Build into engine-0.plan, engine-1.plan, … of a folder of this machine; a record of each."""


@dataclass(frozen=True)
class Here:
    """This machine.

    state: where timing caches lie; leased: holds it for so many seconds, for nobody if left out; look: called before
    something is built, what it raises ends it.
    """

    state: Path
    leased: Callable[[float], AbstractContextManager[object]] = field(default=nullcontext, compare=False)
    known: dict[str, Table] = field(default_factory=dict, compare=False)
    look: Callable[[], object] = field(default=lambda: None, compare=False)

    def facts(self, name: str) -> Table:
        """What is installed here, looked at once."""
        if name not in self.known:
            self.known[name] = facts(name)
        return self.known[name]

    def timing(self, name: str) -> str:
        """Where it lies."""
        return str((self.state / "timing" / name).resolve())

    def build(self, models: Sequence[Path], order: Table, folder: Path, progress: Progress | None) -> list[Table]:
        """In a process of its own."""
        plans = [folder.resolve() / f"engine-{number}.plan" for number in range(len(models))]
        work = [{"onnx": str(onnx.resolve()), "out": str(plan)} for onnx, plan in zip(models, plans, strict=True)]
        (folder / "job.json").write_text(json.dumps({**order, "models": work}), encoding="utf-8")
        limit_s = BUILD_LIMIT_S * len(models)
        with self.leased(limit_s):
            self.look()
            _work(["build", str(folder / "job.json"), str(folder / "out.json")], order["library"], progress, limit_s)
        records: list[Table] = json.loads((folder / "out.json").read_bytes())
        return records


def facts(name: str) -> Table:
    """The library of a runtime on this machine and the GPU. Raises DeployError where it is not installed."""
    return _work(["facts", name], name, None, machine.FACTS_S)


def build(
    onnx: Path,
    out: Path,
    name: str,
    options: Mapping[str, Any],
    state: Path,
    timing_cache: bool = True,
    progress: Progress | None = None,
) -> Built:
    """The engine of an ONNX file at `out`, as `build_each` builds it on this machine for its GPU.

    name: of the runtime; options: of the builder.
    """
    site = Here(state)
    asked = order(name, options, timing_cache, site, None)
    return build_each({onnx: out}, asked, state, site, None, progress)[0]


def order(name: str, options: Mapping[str, Any], timing_cache: bool, site: Site, device: str | None) -> Table:
    """What a builder is asked for, whatever the models. name: of the runtime; device: as of `build_each`."""
    cache = ""
    if timing_cache:
        here = site.facts(name)
        cache = site.timing(timing_name(here["library"], _where(here, options, device)))
    return {"library": name, "options": dict(options), "timing_cache": cache}


def build_each(
    models: Mapping[Path, Path],
    order: Table,
    state: Path,
    site: Site,
    device: str | None = None,
    progress: Progress | None = None,
) -> list[Built]:
    """The engine of each ONNX file at its place: from the state folder where its key is known, else built and kept.

    Those that have to be built are so in one go. site: where; device: the digest of a fingerprint, the site's GPU if
    left out. Raises DeployError in one sentence for what the library refuses.
    """
    here, options, engines = site.facts(order["library"]), order["options"], Engines(state)
    keys = {onnx: engine_key(onnx, options, here["library"], _where(here, options, device)) for onnx in models}
    missing = {key: onnx for onnx, key in keys.items() if engines.find(key) is None}
    if missing:
        with working_folder(state, PREFIX) as folder:
            records = site.build(list(missing.values()), order, folder, progress)
            for number, (key, record) in enumerate(zip(missing, records, strict=True)):
                own = {"model": model_digest(missing[key]), "options": options}
                engines.keep(key, folder / f"engine-{number}.plan", {**record, **here, **own})
    made = []
    for onnx, out in models.items():
        found = engines.find(keys[onnx])
        assert found is not None
        _copy(found[0], out)
        made.append(Built(found[0], keys[onnx], found[1], keys[onnx] not in missing))
    unused = [note for built in made for note in built.record.get("notes", ()) if note.startswith(dla.NOTHING)]
    if unused:
        log.warning("%s (%d of %d engines).", unused[0], len(unused), len(made))
    return made


def _where(here: Table, options: Mapping[str, Any], device: str | None) -> Mapping[str, Any] | str:
    """What an engine is built for."""
    capability = options.get("compute_capability")
    return {"capability": capability} if capability is not None else device or here["gpu"]


def _copy(plan: Path, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan, out)
    except OSError as error:
        hint = "free space or choose another folder."
        raise DeployError(f"cannot write '{out}': {error.strerror}.", hint) from None


def _work(arguments: list[str], name: str, progress: Progress | None, limit_s: float) -> Table:
    """Run a job and give its last event. Raises DeployError for what it reports."""
    command = [sys.executable, str(pack.FOLDER), "engine", *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            last = _follow(process, progress, limit_s)
        except subprocess.TimeoutExpired:
            what = f"{name} did not load" if arguments[0] == "facts" else "the building process did not end"
            raise DeployError(f"{what} within {limit_s:.0f} s.", HUNG_HINT) from None
        finally:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the driver, where no signal is heard
                process.wait(KILL_S)
            if process.stdout is not None:
                process.stdout.close()
        if last.get("event") == "error":
            raise refused(last, name)
        if last.get("event") != "done" or process.returncode:
            errors.seek(0)
            raise died(process.returncode, errors.read().decode("utf-8", "replace"))
    return last


def _follow(process: subprocess.Popen[bytes], progress: Progress | None, limit_s: float) -> Table:
    """Read a job's lines until it ends; the last event that is no progress. Raises TimeoutExpired after its time."""
    assert process.stdout is not None
    pipe, end, buffer = process.stdout.fileno(), time.monotonic() + limit_s, b""
    last: Table = {}
    while (left := end - time.monotonic()) > 0.0 and select.select([pipe], [], [], left)[0]:
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        *lines, buffer = (buffer + part).split(b"\n")  # what is cut off as it ends is no line
        for event in map(json.loads, lines):
            if event["event"] != "progress":
                last = event
            elif progress is not None:
                progress(float(event["done"]))
    process.wait(max(0.0, end - time.monotonic()))
    return last


def refused(event: Mapping[str, Any], name: str) -> DeployError:
    """The user's error for what a build reports. name: of the runtime."""
    message, hint = str(event["message"]).rstrip("."), str(event.get("hint", ""))
    if event["kind"] == "library":
        hint = hint or INSTALL[name]
    if event["kind"] == "model":
        hint = hint or BUILD_HINT
    if event["kind"] == "disk":
        hint = hint or "free space or choose another folder."
    return (ScarceError if event["kind"] == "memory" else DeployError)(f"{message}.", hint)


def died(code: int, said: str) -> DeployError:
    """The user's error for a build that ended without a word. code: as of subprocess; said: its stderr."""
    lines = said.strip().splitlines()
    if code == -signal.SIGKILL:
        return DeployError("the building process was killed, as a system does that runs out of memory.", KILLED_HINT)
    how = f"crashed by signal {-code} ({_signal(-code)})" if code < 0 else f"ended with code {code}"
    last = f": {lines[-1]}" if lines else ""
    return DeployError(f"the building process {how}{last}.", "free memory and try again, or use another version.")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
