"""Which engine is which: the key of a built engine, and where engines are kept.

    .deploy/engines/<key>/engine.plan, record.json     a built engine and what was done to build it
    .deploy/timing/<device and library>.cache          what the library has timed on this device

`deploy gc` removes what was not used for a while, save the engines of what is a baseline (`model` in a record names the
network): what is built again is another engine.

A key is the hash of the ONNX file's bytes and of every weight file beside it (so of weights, shapes and precision), of
the options the builder was given, of the library's version and file, and of the device. Names of files, of graphs and
times play no part: two networks of one structure with other weights never share an engine, whatever they are called.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiles.errors import DeployError
from targets.harness.agent.board.files import sha256
from targets.harness.agent.board.tensorrt import onnxfile
from targets.harness.agent.board.tensorrt.errors import BoardError

SCHEMA = 1
"""Changes whenever the same inputs would give another engine than before: a new builder, a new option."""


def model_digest(onnx: Path) -> dict[str, str]:
    """SHA-256 of an ONNX file and of every file that holds weights of it, by what the file calls them.

    Raises DeployError where the file is no ONNX file, or one of its weight files is missing or lies outside its folder.
    """
    try:
        return onnxfile.digests(str(onnx))
    except BoardError as error:
        raise DeployError(f"{error.message}.", error.hint) from None
    except OSError as error:
        raise DeployError(f"'{error.filename}', with weights of '{onnx}', cannot be read: {error.strerror}.") from None


def engine_key(
    onnx: Path, options: Mapping[str, Any], library: Mapping[str, Any], device: Mapping[str, Any] | str
) -> str:
    """The key of the engine that a library would build of an ONNX file for a device, 64 hex digits.

    options: of the builder; library: its name, version and file's SHA-256; device: the GPU, or a fingerprint's digest.
    """
    model = model_digest(onnx)
    facts = onnxfile.read(str(onnx))
    what = {
        "schema": SCHEMA,
        "model": model,
        "shapes": [[port.name, port.element, list(port.shape)] for port in facts.inputs],
        "precision": sorted(facts.elements),
        "options": dict(options),
        "library": dict(library),
        "device": device if isinstance(device, str) else dict(device),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def timing_name(library: Mapping[str, Any], device: Mapping[str, Any] | str) -> str:
    """Name of the timing cache of a library on a device."""
    what = {"library": dict(library), "device": device if isinstance(device, str) else dict(device)}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest() + ".cache"


@dataclass(frozen=True)
class Engines:
    """Built engines by their keys, in the state folder."""

    state: Path

    def _folder(self, key: str) -> Path:
        return self.state / "engines" / key

    def find(self, key: str) -> tuple[Path, dict[str, Any]] | None:
        """The engine of this key and its record, or None; one that is not what its record says is dropped."""
        folder = self._folder(key)
        try:
            record = json.loads((folder / "record.json").read_bytes())
            if sha256(str(folder / "engine.plan")) == record["sha256"]:
                os.utime(folder)  # what is used stays young for `deploy gc`
                return folder / "engine.plan", record
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def keep(self, key: str, plan: Path, record: Mapping[str, Any]) -> Path:
        """Keep a copy of an engine and its record under a key; both are there or neither. The first one stays.

        Raises DeployError.
        """
        folder = self._folder(key)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key[:16]}-"))
            try:
                shutil.copyfile(plan, part / "engine.plan")
                table = {**record, "key": key, "sha256": sha256(str(part / "engine.plan"))}
                (part / "record.json").write_text(json.dumps(table, sort_keys=True), encoding="utf-8")
                try:
                    os.replace(part, folder)
                except OSError:
                    if self.find(key) is None:  # not there for another build that was faster
                        raise
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            message = f"cannot keep an engine in '{folder.parent}': {error.strerror}."
            raise DeployError(message, "free space or choose another folder.") from None
        return folder / "engine.plan"
