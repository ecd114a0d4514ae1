"""What ships: a folder that holds the network, the proof of its latency and accuracy, and where it all came from.

    manifest.json        checksums, chain of inputs, versions, device, precision, budget, latency, accuracy, layouts
    model.onnx           the network that was measured; dense.onnx: the one it is compared with
    engine files         what the runtime built of them, where it builds any: `model.plan`
    plan.json            what the network grew by, if it did, and which units stay, as indices into it
    pruned.safetensors   weights of the pruned network (the suffix is the encoder's)
    sample.safetensors   an input and the output that belongs to it: `input.<name>`, `output.<name>`
    measurement.json     every raw sample of the accepting session, with its conditions; not where nothing was measured
    passes.json          what each graph pass changed and refused
    report.html          the page for people
    LICENSES.txt         licences of what is in the bundle

It is written into a temporary folder beside its place and moved there at once. The same contents give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pipeline.nouns import PruningPlan
from pipeline.release.encoders.base import load_encoder
from pipeline.release.manifest import NAME, Accuracy, FileEntry, Latency, Link, Manifest, Sample, TensorSpec
from profiles.errors import UsageError
from profiles.schema import Precision
from targets.harness.device import Fingerprint
from targets.harness.measurement import Session

LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")


@dataclass(frozen=True)
class Unmeasured:
    """What stands in the place of a session where nothing could be measured.

    fingerprint: of what the engine was built for; why: nothing was measured, a sentence without its full stop.
    """

    fingerprint: Fingerprint
    why: str


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a bundle. Paths are copied, never moved.

    weights: parameter and buffer name -> array of the pruned network. session: the accepting measurement, raw samples
    included; latency.network and latency.reference name two of its networks; None without a session. passes: plain data
    of the pass log. sample_inputs, sample_outputs: name -> array, as model.onnx computes. artifacts: file name -> built
    by the runtime. sources: name -> SHA-256 of what the user gave. chain: as `Run.chain` gives it. licences: name ->
    text. precision: of model.onnx.
    """

    network: str
    target: str
    model: Path
    dense: Path
    plan: PruningPlan
    weights: Mapping[str, NDArray[Any]]
    session: Session | Unmeasured
    passes: Any
    report: str
    sample_inputs: Mapping[str, NDArray[Any]]
    sample_outputs: Mapping[str, NDArray[Any]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    latency: Latency | None
    accuracy: Accuracy
    versions: Mapping[str, str]
    sources: Mapping[str, str] = field(default_factory=dict)
    chain: Sequence[Mapping[str, Any]] = ()
    licences: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, Path] = field(default_factory=dict)
    encoder: str = "raw"
    precision: Precision = "fp32"
    sample: Sample = field(default_factory=Sample)


def write_bundle(folder: Path, contents: Contents) -> Path:
    """Write a bundle and give its folder; one that is already there is replaced.

    Raises UsageError for an unknown encoder, OSError when the disk is full; then nothing is left behind.
    """
    encoder = load_encoder(contents.encoder)
    texts = _texts(contents) | {f"pruned{encoder.SUFFIX}": encoder.encode(contents.weights)}
    copies = {"model.onnx": contents.model, "dense.onnx": contents.dense, **contents.artifacts}
    for name in copies:
        if not NAME.fullmatch(name) or name in texts:
            raise UsageError(f"'{name}' cannot be a file of a bundle.", "use a plain name that is not taken.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    area = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(area, ignore_errors=True)
    area.mkdir()
    try:
        entries = {name: _write(area / name, data) for name, data in texts.items()}
        entries |= {name: _copy(area / name, source) for name, source in copies.items()}
        _write(area / "manifest.json", _json(_manifest(contents, entries).model_dump(mode="json")))
        _sync(area)
        _replace(area, folder)
    finally:
        shutil.rmtree(area, ignore_errors=True)
    return folder


def licence_texts(project: Path) -> dict[str, str]:
    """Licence and notice files that lie in the project's folder: file name -> text. Unreadable bytes are replaced."""
    found = sorted({path for pattern in LICENCE_FILES for path in project.glob(pattern) if path.is_file()})
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in found}


def _texts(contents: Contents) -> dict[str, bytes]:
    sample = {f"input.{name}": array for name, array in contents.sample_inputs.items()}
    sample |= {f"output.{name}": array for name, array in contents.sample_outputs.items()}
    session = contents.session
    raw = {"measurement.json": session.to_json().encode() + b"\n"} if isinstance(session, Session) else {}
    return raw | {
        "plan.json": contents.plan.to_json().encode() + b"\n",
        "passes.json": _json(contents.passes),
        "report.html": contents.report.encode(),
        "sample.safetensors": bytes(save({name: np.asarray(sample[name], order="C") for name in sorted(sample)})),
        "LICENSES.txt": _licences(contents.licences).encode(),
    }


def _licences(texts: Mapping[str, str]) -> str:
    parts = [f"{name}\n{'=' * len(name)}\n\n{texts[name].strip()}\n" for name in sorted(texts)]
    told = "The network, its weights and the sample come from the project that this bundle was built from."
    none = "\nNo licence file was found in the project's folder: ask its owner before passing the bundle on.\n"
    return f"{told}\n" + ("\n" + "\n\n".join(parts) if parts else none)


def _manifest(contents: Contents, files: Mapping[str, FileEntry]) -> Manifest:
    session, latency = contents.session, contents.latency
    device = session.fingerprint
    runtime, why = f"{device.runtime} {device.runtime_version}", ""
    if isinstance(session, Unmeasured):
        why = session.why
    elif latency is not None:
        runtime = session.measurement(latency.network).runtime
    return Manifest(
        tool=f"edge-deploy {contents.versions.get('edge-deploy', 'unknown')}",
        network=contents.network,
        target=contents.target,
        runtime=runtime,
        precision=contents.precision,
        encoder=contents.encoder,
        files=dict(files),
        sources=dict(contents.sources),
        chain=tuple(Link.model_validate(link) for link in contents.chain),
        versions=dict(contents.versions),
        device=device.to_table(),
        device_sha256=device.digest(),
        latency=latency,
        unmeasured=why,
        accuracy=contents.accuracy,
        inputs=contents.inputs,
        outputs=contents.outputs,
        sample=contents.sample,
    )


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _write(path: Path, data: bytes) -> FileEntry:
    path.write_bytes(data)
    _sync(path)
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def _copy(path: Path, source: Path) -> FileEntry:
    shutil.copyfile(source, path)
    _sync(path)
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(area: Path, folder: Path) -> None:
    """Move the finished folder into place; a kill in between leaves the old bundle or none, never half of one."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    area.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
