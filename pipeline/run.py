"""One `deploy build`: its folder, its journal, its lock, and the line that it prints when a stage is finished.

    runs/<date>-<profile>/
        run.json       status, request, versions, and each stage with its seconds, key, inputs and outputs
        profile.json   the resolved profile
        journal        what was measured, one JSON object a line
        log            everything that was said, with times
        lock           held by the one process that drives the run

A run that is killed at any moment is resumed: stages come from the cache, measurements from the journal.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline import stage as stages
from pipeline.cache import Cache, disk_full, locked, write_atomic
from pipeline.journal import Journal
from pipeline.stage import Json, Outcome, Stage, canonical, tool_versions
from profiles.errors import DeployError, MissedError, UsageError
from profiles.schema import Profile

TOOLS = (
    "edge-deploy", "torch", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "tensorrt",
    "tensorrt-rtx-cu13-libs", "numpy", "scipy", "safetensors",
)  # fmt: skip
OPEN = ("running", "interrupted", "failed")
"""States of a run that can be resumed; `done`, `missed` and `built` (and not measured) are the end."""


class Interrupted(DeployError):
    """Ctrl-C: the run is kept, and the hint is the command that resumes it."""

    exit_code = 130


@dataclass(frozen=True)
class BuildRequest:
    """What `deploy build` was asked.

    project: folder with deploy.toml. target: a profile's name or a TOML file. budget: `8ms`, `0.5x`, `0.5x@p90`, or
    None for the profile's. overrides: nested tables laid over the profile, e.g. {"prune": {"solver": "exact"}}.
    out: the run's folder; with `resume`, the run to go on with (None: the latest unfinished one).
    root: holds `.deploy/` and `runs/`.
    """

    project: Path
    target: str
    budget: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False
    root: Path = Path()
    console: Console = field(default_factory=lambda: Console(stderr=True), compare=False)

    def to_json(self) -> dict[str, Json]:
        """What a resumed run needs to ask the same again."""
        return {
            "project": str(self.project.resolve()),
            "target": str(Path(self.target).resolve()) if self.target.endswith(".toml") else self.target,
            "budget": self.budget,
            "overrides": json.loads(canonical(self.overrides)),
            "dry_run": self.dry_run,
            "root": str(self.root.resolve()),
        }

    @classmethod
    def again(cls, run: Path, console: Console) -> BuildRequest:
        """The request with which a run was started, made to go on with it. Raises UsageError where there is none."""
        asked = read_state(run).get("request")
        if not isinstance(asked, dict):
            raise UsageError(f"run '{run}' does not say what was asked.", "start a new run: deploy build")
        return cls(
            Path(asked["project"]), asked["target"], asked["budget"], asked["overrides"], run, True, asked["dry_run"],
            Path(asked["root"]), console,
        )  # fmt: skip


class Run:
    """A run in progress, used as `with Run.create(...) as run:`; other processes are kept out until the block ends."""

    def __init__(self, path: Path, root: Path, state: dict[str, Json], console: Console, hold: ExitStack) -> None:
        """Use `create` or `resume`."""
        self.path = path
        self.cache = Cache(root / ".deploy")
        self.console = console
        self.journal = Journal(path / "journal")
        self._state = state
        self._hold = hold
        self._fresh = not state["stages"] and not len(self.journal)
        self._begun = time.monotonic()
        self._earlier_s = float(state.get("seconds", 0.0))

    # --- making and finding ----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, root: Path, profile: Profile, *, out: Path | None = None, request: BuildRequest | None = None
    ) -> Run:
        """Start a run in a new folder, `runs/<date>-<profile>` unless `out` names one.

        Raises UsageError when `out` exists and is not empty, DeployError when `.deploy` cannot be used; no run is left.
        """
        path = _new_folder(root / "runs" / f"{datetime.now():%Y-%m-%dT%H-%M-%S}-{profile.name}", out)
        state: dict[str, Json] = {
            "version": 1,
            "id": uuid.uuid4().hex,
            "status": "running",
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "argv": sys.argv[1:],
            "profile": profile.name,
            "request": request.to_json() if request else None,
            "versions": tool_versions(*TOOLS),
            "stages": {},
        }
        hold = _take(path)
        write_atomic(path / "profile.json", canonical(profile) + b"\n")
        run = cls(path, root, state, _console(request), hold)
        try:
            run._save()
            run.cache.remember_run(path)
        except BaseException:
            hold.close()
            run._remove()
            raise
        return run

    @classmethod
    def resume(cls, root: Path, path: Path | None = None, *, console: Console | None = None) -> Run:
        """Go on with a run, or with the latest unfinished one that no process is driving.

        Raises UsageError when there is none, it is finished, or another process drives it.
        """
        found = path or latest_unfinished(root)
        if read_state(found)["status"] not in OPEN:
            raise UsageError(f"run '{found}' is finished ({read_state(found)['status']}).", f"deploy show {found}")
        hold = _take(found)
        return cls(found, root, read_state(found) | {"status": "running"}, console or Console(stderr=True), hold)

    def __enter__(self) -> Run:
        self._hold.enter_context(self.cache.in_use())
        self._hold.enter_context(_logging_to(self.path / "log"))
        self._save()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end("done" if self._state["status"] == "running" else self._state["status"])
            elif isinstance(error, KeyboardInterrupt):
                self._end("interrupted")
                message = f"interrupted; what was done is kept in '{self.path}'."
                raise Interrupted(message, self.resume_command) from error
            elif isinstance(error, DeployError | OSError) and self._fresh and not len(self.journal):
                self._remove()
            elif isinstance(error, MissedError):
                self._end("missed")
            else:
                logging.getLogger(__name__).error("the run failed", exc_info=error)
                self._end("failed")
            if isinstance(error, OSError) and (full := disk_full(error, Path(error.filename or self.path))):
                raise full from error
        finally:
            self._hold.close()

    # --- working ---------------------------------------------------------------------------------------------------

    def stage(
        self,
        stage: Stage,
        params: Any,
        inputs: Mapping[str, Any],
        work: Callable[[Path], Mapping[str, Any]],
        *,
        tools: Iterable[str] = (),
        fingerprint: str | None = None,
        detail: Callable[[Outcome], str] | None = None,
    ) -> Outcome:
        """A stage's outcome, from the cache or worked now, recorded in run.json and said in one line.

        An `always` stage comes from the journal when this run has already done it. detail: what the line says of a
        finished outcome. The rest is as in `pipeline.stage.run_or_reuse`.
        """
        begun = time.perf_counter()
        if stage.always:
            key = stages.stage_key(stage, params, inputs, tool_versions(*tools), fingerprint)
            found, record = self.journal.recorded(stage.name, key)
            reused = found and stages.whole(self.cache, record)
            if not reused:
                record = self.journal.append(stage.name, key, stages.perform(self.cache, work))
            result = stages.outcome(self.cache, key, record, reused=reused)
        else:
            result = stages.run_or_reuse(self.cache, stage, params, inputs, work, tools=tools, fingerprint=fingerprint)
        said = detail(result) if detail else ""
        self.finished(
            stage.name,
            time.perf_counter() - begun,
            said or ("reused" if result.reused else ""),
            key=result.key,
            outputs=result.files,
            reused=int(result.reused),
        )
        return result

    def journalled(self, name: str, key: Json, work: Callable[[], Any]) -> Json:
        """What this run has recorded for (name, key), else what `work` gives, recorded before it is returned."""
        return self.journal.once(name, key, work)

    def finished(self, name: str, seconds: float, detail: str = "", **facts: Json) -> None:
        """Record a finished stage in run.json and print its line. Seconds of a stage that comes again add up."""
        earlier = self._state["stages"].get(name, {})
        total = round(earlier.get("seconds", 0.0) + seconds, 3)
        self._state["stages"][name] = facts | {"seconds": total, "detail": detail}
        self._save()
        logging.getLogger(__name__).info("%s finished in %.3f s: %s", name, seconds, detail or "done")
        self.console.print(f"{name:<16} {detail:<38} {seconds:7.1f} s", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar on terminals for work longer than two seconds; calls of the yielded function move it by one."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(text, total=total)
            yield lambda: bar.advance(task)

    @contextmanager
    def share(self, text: str) -> Iterator[Callable[[float], None]]:
        """The same for work that knows which share of it is done, 0 to 1, and tells the yielded function."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(text, total=1.0)
            yield lambda done: bar.update(task, completed=done)

    def folder(self, name: str) -> Path:
        """A folder inside the run, made when it is not there, e.g. `round-1`."""
        path = self.path / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    # --- telling ---------------------------------------------------------------------------------------------------

    def finish(self, status: str, summary: Mapping[str, Json]) -> None:
        """Say how the run ended, before its block ends: `done` or `missed`, and its summary."""
        self._state |= {"status": status, "summary": json.loads(canonical(summary))}

    def chain(self) -> list[dict[str, Json]]:
        """The finished stages that have a key, in order: name, key and hashes of outputs; free of times."""
        keyed = [(name, record) for name, record in self._state["stages"].items() if record.get("key")]
        return [{"stage": name, "key": record["key"], "outputs": record.get("outputs", {})} for name, record in keyed]

    @property
    def id(self) -> str:
        """What no other run is called; of a run that has none, its folder."""
        return str(self._state.get("id") or self.path.resolve())

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the tools that this run began with."""
        return dict(self._state["versions"])

    @property
    def stages(self) -> dict[str, dict[str, Json]]:
        """Finished stages by name: seconds, detail and what else was recorded."""
        return {name: dict(record) for name, record in self._state["stages"].items()}

    @property
    def seconds(self) -> float:
        """Wall time so far, of earlier processes of this run too."""
        return self._earlier_s + time.monotonic() - self._begun

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        return f"deploy build --resume --out {shlex.quote(str(self.path))}"

    def _save(self) -> None:
        self._state["seconds"] = round(self.seconds, 3)
        write_atomic(self.path / "run.json", json.dumps(self._state, indent=1, allow_nan=False).encode() + b"\n")

    def _end(self, status: str) -> None:
        self._state |= {"status": status, "finished": datetime.now().astimezone().isoformat(timespec="seconds")}
        self._save()

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.path.parent.rmdir()  # only when it is empty


def read_state(path: Path) -> dict[str, Json]:
    """run.json of a run's folder. Raises UsageError when there is none or it is not one."""
    try:
        state = json.loads((path / "run.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no run in '{path}'.", "deploy show RUN, with a folder of runs/.") from None
    except ValueError:
        state = None
    if not isinstance(state, dict) or state.get("version") != 1 or not _told(state):
        raise UsageError(f"'{path / 'run.json'}' is not a record of a run.", "start a new run: deploy build")
    return state


def _told(state: Mapping[str, Json]) -> bool:
    return isinstance(state.get("status"), str) and isinstance(state.get("stages"), dict)


def unfinished(root: Path) -> list[Path]:
    """Folders of runs that can be resumed, latest first: those in `runs/` and those made elsewhere with `--out`."""
    here = [path.parent for path in root.glob("runs/*/run.json")]
    found = {path.resolve(): path for path in (*Cache(root / ".deploy").runs(), *here)}
    still = []
    for path in found.values():
        try:
            state = read_state(path)
        except UsageError as error:
            logging.getLogger(__name__).warning("%s It is left out.", error.message)
            continue
        if state["status"] in OPEN:
            still.append((str(state.get("started", "")), path))
    return [path for _, path in sorted(still, reverse=True)]


def latest_unfinished(root: Path) -> Path:
    """The latest run that can be resumed and that no process is driving. Raises UsageError when there is none."""
    for path in unfinished(root):
        with locked(path / "lock", wait=False) as free:
            if free:
                return path
    message = f"there is no unfinished run in '{root / 'runs'}'."
    raise UsageError(message, "deploy build --target local --project DIR")


def _console(request: BuildRequest | None) -> Console:
    return request.console if request else Console(stderr=True)


def _new_folder(path: Path, out: Path | None) -> Path:
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            hint = f"name a new folder, or go on with this one: deploy build --resume --out {shlex.quote(str(out))}"
            raise UsageError(f"'{out}' exists and is not empty.", hint)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make '{out}': {error.strerror}.", "--out names a new folder.") from None
        return out
    for count in range(1, 10_000):
        unique = path if count == 1 else path.with_name(f"{path.name}-{count}")
        with suppress(FileExistsError):
            unique.mkdir(parents=True)
            return unique
    raise DeployError(f"no free name beside '{path}'.", "deploy build --out RUN")


def _take(path: Path) -> ExitStack:
    """Hold the lock of a run, or raise UsageError with the process that holds it."""
    hold = ExitStack()
    lock = path / "lock"
    if not hold.enter_context(locked(lock, wait=False)):
        owner = lock.read_text(encoding="utf-8").strip() or "another process"
        hold.close()
        message = f"run '{path}' is being driven by {owner}."
        raise UsageError(message, "wait for it, or start another run: deploy build without --resume.")
    lock.write_text(f"process {os.getpid()}\n", encoding="utf-8")
    return hold


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("pipeline", "targets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(file)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(file)
            logger.setLevel(level)
        file.close()
