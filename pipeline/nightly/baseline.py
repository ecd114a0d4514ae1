"""What a nightly check compares with: artifacts pinned by content, never numbers.

    .deploy/objects/ab/abcd…         the pinned networks, as in every cache, but kept by `gc` for ever
    .deploy/baselines/<profile>.json {"version": 1, "profile": …, "baselines": [earlier ones first, newest last]}

A baseline comes from a run whose budget was met, from its bundle, or from a bare ONNX file. What is in a bundle is
believed only after its checksums agree, and that its budget was met only after its raw samples have said so again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pipeline.cache import Cache, file_hash, locked, write_atomic
from pipeline.nightly.records import pin_from_table, pin_to_table
from pipeline.nouns import Pin, Ports
from pipeline.run import OPEN, read_state
from profiles.errors import DeployError, UsageError
from profiles.schema import Budget
from targets.harness.device import Fingerprint
from targets.harness.measurement import Session, judge

VERSION = 1
DEVICE = {"machine": "machine", "cpu": "processor", "cores": "cores"}
"""Fields of a fingerprint that make it another device, with their names for people. The processor's flags are none:
a new kernel or microcode changes the list on the same processor."""
RUNTIME = {"runtime": "runtime", "simulated": "simulated"}
"""Fields that make it another thing to measure; a new version of the same runtime is none."""
ROUNDING = 1e-12
"""By how much an accuracy may seem to miss its limit, as at the gate of a build."""
log = logging.getLogger(__name__)


# --- pinning -----------------------------------------------------------------------------------------------------


def accept(state: Path, profile: str, pin: Pin, artifact: Path) -> None:
    """Make an artifact the baseline of a profile, after the earlier ones. state: the `.deploy` folder.

    The time is put into the pin unless it has one. Raises DeployError when the file is not the pinned one or the disk
    is full; then the earlier baseline stands.
    """
    cache = Cache(state)
    with cache.in_use(), locked(state / "locks" / "baselines"):
        earlier = history(state, profile)
        stored = cache.put_file(artifact)
        if stored != pin.sha256:
            message = f"'{artifact}' is not the pinned network: its SHA-256 is {stored[:12]}…, not {pin.sha256[:12]}…."
            raise DeployError(message, accept_with(profile))
        accepted = pin if pin.accepted is not None else replace(pin, accepted=_now())
        pins = [pin_to_table(each) for each in (*earlier, accepted)]
        table = {"version": VERSION, "profile": profile, "baselines": pins}
        write_atomic(_record(state, profile), json.dumps(table, indent=1, allow_nan=False).encode() + b"\n")


def history(state: Path, profile: str) -> tuple[Pin, ...]:
    """Every baseline that a profile ever had, newest last. Raises DeployError for a record that cannot be read."""
    path = _record(state, profile)
    try:
        table = json.loads(path.read_bytes())
        version = table["version"]
        if version != VERSION:
            message = f"'{path}' was written by a newer version (schema {version}, this one knows {VERSION})."
            raise DeployError(message, f"update edge-deploy, or move {path.name} away.")
        return tuple(pin_from_table(row) for row in table["baselines"])
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"'{path}' is damaged: {type(error).__name__} {error}."
        raise DeployError(message, f"move {path.name} away, then {accept_with(profile)}") from None


def baseline_of(state: Path, profile: str) -> Pin | None:
    """The baseline of a profile, or None before the first."""
    pins = history(state, profile)
    return pins[-1] if pins else None


def profiles_with_baseline(state: Path) -> list[str]:
    """Names of the profiles that have a baseline, sorted."""
    return sorted(unquote(path.stem) for path in state.glob("baselines/*.json"))


def accept_with(target: str) -> str:
    """The command that makes a baseline of a target."""
    return f"deploy baseline accept RUN --target {target}"


def profile_file(target: str) -> str:
    """The TOML file that a target names, whole; "" for a profile that ships."""
    return str(Path(target).resolve()) if target.endswith(".toml") else ""


def artifact_of(state: Path, pin: Pin, target: str = "T") -> Path:
    """Where the pinned network lies, its contents checked. Raises DeployError when it is missing or damaged.

    target: what the hint names.
    """
    path = Cache(state).path(pin.sha256)
    hint = f"accept it again from '{pin.source}': {accept_with(target)}"
    try:
        found = file_hash(path)
    except FileNotFoundError:
        raise DeployError(f"the pinned network '{pin.name}' is not in '{state}': {path} is missing.", hint) from None
    if found != pin.sha256:
        message = f"the pinned network '{pin.name}' is damaged: the SHA-256 of {path} is {found[:12]}…."
        raise DeployError(message, hint)
    return path


def _record(state: Path, profile: str) -> Path:
    return state / "baselines" / f"{quote(profile, safe=' ')}.json"


# --- where an artifact comes from ----------------------------------------------------------------------------------


def from_run(run: Path) -> tuple[Pin, Path]:
    """The network of a run's folder, of a bundle's folder or in an ONNX file, with the file; not yet accepted.

    The pin's fingerprint is that of the device on which the bundle was measured, empty for an ONNX file. Raises
    UsageError for what is none of these or met no budget, DeployError for a bundle that was changed.
    """
    if run.is_file():
        return _bare(run)
    if not run.is_dir():
        raise UsageError(f"there is no run, bundle or ONNX file '{run}'.", "name a run, a bundle or a MODEL.onnx.")
    if (run / "manifest.json").is_file():
        whole = run.resolve()
        return _bundle(run, whole.parent.name, whole.parent) if whole.name == "bundle" else _bundle(run, whole.name)
    state = read_state(run)
    status = state.get("status")
    if status in OPEN:
        message = f"run '{run}' is not finished ({status}), so nothing of it was accepted."
        raise UsageError(message, f"deploy build --resume --out {run}")
    if status != "done":
        message = f"run '{run}' ended {status}: it has no network that meets its budget."
        raise UsageError(message, f"deploy show {run}")
    if _dry(state):
        raise UsageError(f"run '{run}' was a dry run, which makes no network.", "deploy build without --dry-run")
    return _bundle(run / "bundle", run.resolve().name, run)


def newest(runs: Path, profile: str, after: Pin | None = None) -> tuple[Pin, Path] | None:
    """The network of the newest run of a profile that met its budget, or None. runs: the folder `runs/`.

    after: a baseline; only runs that ended after it was accepted are meant, of the same project where both are known.
    Nothing but the time of day orders runs across reboots: one that a clock wrote too early is not found until
    `--candidate` names it. Raises DeployError when that run's bundle is missing or was changed: an older network would
    be another answer.
    """
    met: list[tuple[float, str, Path]] = []
    others: list[tuple[float, str, Path]] = []
    for record in runs.glob("*/run.json"):
        try:
            state = read_state(record.parent)
        except UsageError:
            continue
        if state.get("status") != "done" or state.get("profile") != profile or _dry(state):
            continue
        ended = _instant(state.get("finished") or state.get("started"))
        if after is None or ended >= _instant(after.accepted):
            known = after is not None and bool(after.project) and bool(_project(state))
            kind = others if after is not None and known and _project(state) != after.project else met
            kind.append((ended, record.parent.name, record.parent))
    if others and max(others) > max(met, default=(0.0, "", runs)):
        log.warning("run '%s' is left out: the baseline was built from another project.", max(others)[2])
    return from_run(max(met)[2]) if met else None


def _project(state: Mapping[str, Any]) -> str:
    """The folder of the project that a run built, "" where its record does not say."""
    return str((state.get("request") or {}).get("project") or "")


def _dry(state: Mapping[str, Any]) -> bool:
    return bool((state.get("summary") or {}).get("dry_run"))


def _instant(moment: object) -> float:
    """A time of day in ISO 8601 as seconds since 1970; 0 for what is none."""
    try:
        return datetime.fromisoformat(str(moment)).timestamp()
    except ValueError:
        return 0.0


def _bare(path: Path) -> tuple[Pin, Path]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError):
        raise UsageError(f"'{path}' is not an ONNX file.", "name a run, a bundle or a MODEL.onnx.") from None
    if not model.graph.node:
        raise UsageError(f"'{path}' holds no network.", "name a run, a bundle or a MODEL.onnx.")
    outside = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        message = f"'{path}' keeps '{outside[0]}' in a file outside itself, so it cannot be pinned by its contents."
        raise UsageError(message, "save it whole: onnx.save(onnx.load(path), path)")
    return described(Pin(path.stem, file_hash(path), str(path.resolve())), path), path


def described(pin: Pin, path: Path) -> Pin:
    """The pin with the inputs and outputs that its ONNX file has, unless it knows them already."""
    if pin.inputs:
        return pin
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, ValueError):
        raise DeployError(f"'{path}' is not an ONNX file.", accept_with("T")) from None
    weights = {tensor.name for tensor in graph.initializer}
    return replace(pin, inputs=_ports(v for v in graph.input if v.name not in weights), outputs=_ports(graph.output))


def _ports(values: Iterable[Any]) -> Ports:
    """Name and shape of each ONNX value; a size that is not fixed is its name, or "?"."""

    def size(dim: Any) -> int | str:
        return int(dim.dim_value) if dim.HasField("dim_value") else str(dim.dim_param) or "?"

    return tuple((str(v.name), tuple(size(dim) for dim in v.type.tensor_type.shape.dim)) for v in values)


def unlike(pin: Pin, candidate: Pin) -> str | None:
    """Why two networks cannot be compared: they do not take and give the same. None where they do, or it is not known.

    A network of other shapes does other work, and its time says nothing of the baseline's.
    """
    if not (pin.inputs and candidate.inputs) or (pin.inputs, pin.outputs) == (candidate.inputs, candidate.outputs):
        return None
    told = [f"'{each.name}' {_told_ports(each.inputs)} -> {_told_ports(each.outputs)}" for each in (pin, candidate)]
    return f"baseline and candidate are not the same task: {told[0]}, {told[1]}."


def _told_ports(ports: Ports) -> str:
    return ", ".join(f"{name} {'x'.join(str(size) for size in shape) or 'scalar'}" for name, shape in ports)


def _bundle(bundle: Path, name: str, run: Path | None = None) -> tuple[Pin, Path]:
    """The pin of a bundle whose files are what its manifest says, and whose raw samples say that its budget is met.

    run: the run it lies in, which knows the project.
    """
    try:
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        told = {str(file): str(entry["sha256"]) for file, entry in manifest["files"].items()}
        if manifest["latency"] is None:
            message = f"'{bundle}' was built and not measured, so it met no budget."
            raise UsageError(message, "name a run that is done.")
        sha256, _, device = told["model.onnx"], told["measurement.json"], dict(manifest["device"])
        latency, accuracy = dict(manifest["latency"]), dict(manifest["accuracy"])
        drop = 0.0
        if accuracy["dense"] is not None:  # a project without a metric: the latency alone was accepted
            drop = float(accuracy["dense"]) - float(accuracy["pruned"]) - float(accuracy["max_drop"])
        budget, names = Budget.parse(str(latency["budget"])), (str(latency["network"]), str(latency["reference"]))
    except FileNotFoundError:
        raise DeployError(f"there is no bundle in '{bundle}'.", "deploy build makes it anew.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"'{bundle / 'manifest.json'}' is not a manifest: {type(error).__name__} {error}."
        raise DeployError(message, f"deploy verify {bundle}") from None
    for file, digest in sorted(told.items()):
        _unchanged(bundle, file, digest)
    session = Session.from_json((bundle / "measurement.json").read_text(encoding="utf-8", errors="replace"))
    judged = judge(session, *names, budget)
    if session.measurement(names[0]).sha256 not in {digest for file, digest in told.items() if file != "dense.onnx"}:
        message = f"the samples of the bundle '{bundle}' were taken of another network than its own."
        raise DeployError(message, f"deploy verify {bundle}")
    if judged.verdict != "met" or drop > ROUNDING:
        reason = f"budget {judged.verdict}: {judged.reason}" if judged.verdict != "met" else "its accuracy fell too far"
        raise UsageError(f"'{bundle}' was never accepted ({reason}).", "name a run that is done.")
    try:
        project = _project(read_state(run)) if run is not None else ""
    except UsageError:
        project = ""  # a bundle that was moved out of its run
    pin = Pin(name, sha256, str(bundle.resolve()), str(budget), None, device, project=project)
    return described(pin, bundle / "model.onnx"), bundle / "model.onnx"


def _unchanged(bundle: Path, name: str, digest: str) -> None:
    path = bundle / name
    if Path(name).name != name or not path.exists() or not stat.S_ISREG(path.lstat().st_mode):
        raise DeployError(f"{name} is missing from the bundle '{bundle}'.", f"deploy verify {bundle}")
    found = file_hash(path)
    if found != digest:
        message = f"{name} of the bundle '{bundle}' was changed: its SHA-256 is {found[:12]}…, not {digest[:12]}…."
        raise DeployError(message, f"deploy verify {bundle}")


# --- the device then and now ---------------------------------------------------------------------------------------


def environment(pin: Pin, now: Fingerprint) -> tuple[dict[str, tuple[Any, Any]], str | None]:
    """What changed since a baseline was accepted: field -> (then, now), and why it is another device, or None.

    What hits every arm of a check (runtime version, kernel, power mode, clocks) cannot be seen by a ratio, so it is
    recorded. Another machine or another runtime was never accepted: the sentence says which, and the check is refused.
    A field that one of both does not know, because it was written by another version, is not compared.
    """
    then, today = pin.fingerprint, now.to_table()
    changed = {
        name: (_frozen(then[name]), _frozen(today[name]))
        for name in today
        if name in then and _frozen(then[name]) != _frozen(today[name])
    }
    other = [name for name in (*DEVICE, *RUNTIME) if name in changed]
    if not other:
        return changed, None
    told = [f"{(DEVICE | RUNTIME)[name]} was {changed[name][0]}, is {changed[name][1]}" for name in other]
    return changed, f"the baseline '{pin.name}' was accepted on another device or runtime: {'; '.join(told)}."


def machine_of(now: Fingerprint) -> str:
    """Digest of the fields that make it another device (`DEVICE`): a new kernel or runtime leaves it as it was."""
    table = now.to_table()
    return hashlib.sha256(json.dumps({name: table[name] for name in DEVICE}, sort_keys=True).encode()).hexdigest()


def _frozen(value: Any) -> Any:
    """JSON has lists where a fingerprint has tuples."""
    return tuple(value) if isinstance(value, list) else value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
