"""A stage is a named, versioned step whose result depends on nothing but its key; the same key is never worked twice.

    key = SHA-256(canonical JSON of {name, version, parameters read, input hashes, tool versions, device fingerprint})

Canonical JSON has sorted keys, no spaces and no NaN. A stage whose result depends on the moment (`always`: measuring,
releasing) is never reused from the cache; inside a run it is journalled by `pipeline.run`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.cache import Cache, file_hash
from profiles.errors import DeployError

Json = Any
"""What JSON can hold: None, bool, int, float, str, lists and string-keyed dicts of these."""


@dataclass(frozen=True)
class Stage:
    """A step of the flow. version: raised when what it computes changes. always: never reused across runs."""

    name: str
    version: int = 1
    always: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a stage gave. values: JSON results by name. files: hash of each file made. seconds: of the work itself."""

    key: str
    values: Mapping[str, Json]
    files: Mapping[str, str]
    seconds: float
    reused: bool
    cache: Cache = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Json:
        """A JSON result by name. Raises KeyError."""
        return self.values[name]

    def path(self, name: str) -> Path:
        """Where a file that the stage made lies in the cache; read it, never write it. Raises KeyError."""
        return self.cache.path(self.files[name])


def _plain(value: Any) -> Any:
    """What json cannot write by itself: dataclasses, pydantic models, paths, sets and numpy scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be part of a stage's key or result")


def canonical(value: Any) -> bytes:
    """The one JSON text of a value, the same for equal values. Raises TypeError or ValueError where JSON has none."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False, default=_plain)
    return text.encode()


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def tool_versions(*names: str) -> dict[str, str]:
    """Installed version of each distribution (`torch`, `onnx`, …), and Python's; what is not installed is left out.

    Nothing is imported: the numbers come from the installed metadata.
    """
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def code_digest(package: str) -> str:
    """SHA-256 of the names and contents of an imported package's Python files; read once."""
    folder = Path(str(sys.modules[package].__file__)).parent
    files = sorted(folder.rglob("*.py"))
    return digest({str(path.relative_to(folder)): file_hash(path) for path in files})


def stage_key(
    stage: Stage,
    params: Any,
    inputs: Mapping[str, Any],
    tools: Mapping[str, str] | None = None,
    fingerprint: str | None = None,
) -> str:
    """The key of a stage, 64 hex digits.

    params: what it reads of the profile. inputs: name -> hash or JSON value of what it is given; a Path stands for its
    contents. tools: versions it depends on. fingerprint: of the device, for stages that run on one.
    """
    given = {name: file_hash(value) if isinstance(value, Path) else value for name, value in inputs.items()}
    parts: dict[str, Any] = {"name": stage.name, "version": stage.version, "params": params, "inputs": given}
    parts["tools"] = dict(tools or {})
    return digest(parts | ({"fingerprint": fingerprint} if fingerprint else {}))


def whole(cache: Cache, record: Mapping[str, Json] | None) -> bool:
    """Whether a stage's record has its two tables and every object that it names is here and undamaged."""
    if record is None or not isinstance(record.get("files"), dict) or not isinstance(record.get("values"), dict):
        return False
    return all(cache.has(str(name)) for name in record["files"].values())


def perform(cache: Cache, work: Callable[[Path], Mapping[str, Any]]) -> dict[str, Json]:
    """Do a stage's work in a scratch folder and store what it gives: {"values", "files", "seconds"}.

    work: gets the folder and gives name -> Path (stored as an object) or JSON value.
    """
    begun = time.perf_counter()
    area = cache.root / "scratch"
    area.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=area))
    try:
        results = work(scratch)
        files = {name: cache.put_file(value) for name, value in results.items() if isinstance(value, Path)}
        values = json.loads(canonical({name: value for name, value in results.items() if name not in files}))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"values": values, "files": files, "seconds": round(time.perf_counter() - begun, 3)}


def outcome(cache: Cache, key: str, record: Mapping[str, Json], *, reused: bool) -> Outcome:
    """An `Outcome` from a stored record."""
    return Outcome(key, record["values"], record["files"], float(record.get("seconds", 0.0)), reused, cache)


def run_or_reuse(
    cache: Cache,
    stage: Stage,
    params: Any,
    inputs: Mapping[str, Any],
    work: Callable[[Path], Mapping[str, Any]],
    *,
    tools: Iterable[str] = (),
    fingerprint: str | None = None,
) -> Outcome:
    """The stage's outcome: from the cache when its key is known and all of its objects are whole, else worked now.

    A second build that wants the same key waits for the first and then reuses. Raises what `work` raises.
    """
    if stage.always:
        raise DeployError(f"stage '{stage.name}' depends on the moment and cannot be reused.", "journal it: Run.stage.")
    key = stage_key(stage, params, inputs, tool_versions(*tools), fingerprint)
    with cache.working(stage.name, key):
        record = cache.read_key(stage.name, key)
        if whole(cache, record):
            return outcome(cache, key, record or {}, reused=True)
        record = perform(cache, work)
        cache.write_key(stage.name, key, record)
    return outcome(cache, key, record, reused=False)
