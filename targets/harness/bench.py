"""The host's side of a measurement: writes the agent's job, runs the agent, reads what it wrote into a `Session`.

The agent runs in a process group of its own, so that Ctrl-C reaches only the host, which then ends the whole group;
should the host be killed outright, the system ends agent and workers with it. On this machine that tie is meant
(PR_SET_PDEATHSIG): no link can be lost between host and agent, so there would be nobody to come back for a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from profiles.errors import DeployError, ScarceError, UndecidedError, UsageError
from profiles.schema import MeasureSpec
from targets.harness import building, pack
from targets.harness.agent.board import driver, machine
from targets.harness.agent.board.files import sha256
from targets.harness.device import Fingerprint, Preflight
from targets.harness.measurement import Measurement, Session, block_from_table, pace_of
from targets.harness.spool import working_folder

PROCESS_SAMPLES = 720
"""Inferences in each accepting process: with fewer than 662 its 99th percentile has no upper bound."""
WINDOW_S = 0.5
RANK_WINDOW_S = 0.1
RANK_WARMUP_MAX_S = 2.0
WARMUP_MAX = 10.0
"""A process that is not steady after this many times the shortest warm-up is measured as it is, and said to be so."""
DOCTOR = "deploy doctor --target T"
PATIENCE_S = 120.0
REFERENCE_SESSIONS = 5
ROW_BLOCK_NS = 400_000
LAYER_TURNS, LAYER_DROPPED, LAYER_RUNS = 6, 3, 10
"""Profiled sessions of each model; untimed and profiled inferences in each."""
Mode = Literal["rank", "accept"]
Table = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Everything that is known before a session starts. started: UTC, ISO 8601."""

    fingerprint: Fingerprint
    preflight: Preflight
    spec: MeasureSpec
    mode: Mode
    owner: str
    started: str


def utc_now(ago_s: float = 0.0) -> str:
    """Time of day in UTC, ISO 8601; what it was so many seconds ago."""
    return (datetime.now(UTC) - timedelta(seconds=ago_s)).isoformat(timespec="seconds")


def _options(spec: MeasureSpec, providers: Sequence[str]) -> Table:
    return {"threads": spec.threads, "spin": spec.spin, "providers": list(providers), "seed": spec.seed}


def warmup_rule(spec: MeasureSpec, mode: Mode) -> Table:
    """When a process is warm. Ranking takes shorter windows: the first rounds are interleaved all the same."""
    rule = {"min_inferences": spec.warmup_inferences, "steady": spec.steady, "longest_s": spec.warmup_max_s}
    if mode == "accept":
        return {
            **rule,
            "min_s": spec.warmup_s,
            "window_s": min(WINDOW_S, max(0.02, spec.warmup_s / 2)),
            "max_s": min(spec.warmup_max_s, max(RANK_WARMUP_MAX_S, WARMUP_MAX * spec.warmup_s)),
        }
    shorter = min(spec.warmup_s, 2 * RANK_WINDOW_S)
    return {
        **rule,
        "min_s": shorter,
        "window_s": max(0.02, shorter / 2),
        "max_s": min(spec.warmup_max_s, RANK_WARMUP_MAX_S),
    }


def drive_job(
    artifacts: Mapping[str, Path], hashes: Mapping[str, str], spec: MeasureSpec, mode: Mode, providers: Sequence[str]
) -> Table:
    """The job of a measuring session; in a sustained one the first process of each model is the long one."""
    accept = mode == "accept"
    rounds = spec.accept_rounds if accept else spec.rank_rounds
    return {
        "models": _models(artifacts, hashes),
        "processes": spec.accept_processes if accept else spec.rank_processes,
        "rounds": rounds,
        "dropped": spec.block_dropped,
        "timed": max(spec.block_timed, -(-PROCESS_SAMPLES // rounds)) if accept else spec.block_timed,
        "block_min_ns": round(spec.block_min_ms * 1e6),
        "period_ns": round((spec.paced_ms or 0.0) * 1e6),
        "sustained_s": spec.sustained_s if accept else 0.0,
        "max_seconds": spec.max_seconds,
        "warmup": warmup_rule(spec, mode),
        "options": _options(spec, providers),
        "patience_s": PATIENCE_S,
        "seed": spec.seed,
        "tied": True,
    }


def _models(artifacts: Mapping[str, Path], hashes: Mapping[str, str]) -> list[Table]:
    return [{"name": name, "path": str(path.resolve()), "sha256": hashes[name]} for name, path in artifacts.items()]


def session_limit_s(spec: MeasureSpec) -> float:
    """Seconds after which a session has gone astray."""
    return 2.0 * spec.max_seconds + spec.sustained_s + 300.0


def layers_job(
    artifacts: Mapping[str, Path], hashes: Mapping[str, str], spec: MeasureSpec, providers: Sequence[str]
) -> Table:
    """The job of asking the runtime's profiler for the time of every layer."""
    return {
        "models": _models(artifacts, hashes),
        "turns": LAYER_TURNS,
        "dropped": LAYER_DROPPED,
        "runs": LAYER_RUNS,
        "options": _options(spec, providers),
        "seed": spec.seed,
        "tied": True,
    }


def rows_job(
    models: Sequence[Path], reference: Path, rounds: int, spec: MeasureSpec, providers: Sequence[str]
) -> Table:
    """The job of timing rows of the latency table."""
    return {
        "models": [str(path.resolve()) for path in models],
        "reference": str(reference.resolve()),
        "sessions": REFERENCE_SESSIONS,
        "rounds": rounds,
        "dropped": 2,
        "timed": 4,
        "timed_max": 25,
        "block_ns": ROW_BLOCK_NS,
        "options": _options(spec, providers),
        "seed": spec.seed,
        "tied": True,
    }


def protocol(spec: MeasureSpec, mode: Mode, result: Mapping[str, Any]) -> str:
    """One line that says how the numbers were taken; its first word is the protocol's id.

    result: `protocols` names how each model was timed, where a model says so itself.
    """
    flags = f"threads={spec.threads} spin={int(spec.spin)} inter=1 sequential optimisation=all"
    blocks = f"{len(result['repeats'])}x{result['rounds']} blocks of {result['dropped']}+{_counts(result['timed'])}"
    if spec.sustained_s and mode == "accept":
        first = result["repeats"][0]
        untimed = {name: result["dropped"] + count for name, count in first["untimed"].items()}
        blocks += f", the first 1x{len(first['order'])} of {_counts(untimed)}+{_counts(first['timed'])}"
    kinds = sorted(set(result.get("protocols", {}).values())) or [driver.PROTOCOL]
    return f"{'+'.join(kinds)} {mode} {pace_of(spec, mode)} {blocks} {flags}"


def _counts(counts: Mapping[str, int]) -> str:
    """The counts of all models without repetition, e.g. `12` or `12,250`."""
    return ",".join(str(count) for count in sorted(set(counts.values())))


def session_of(result: Mapping[str, Any], hashes: Mapping[str, str], setting: Setting) -> Session:
    """The typed session made of the agent's raw result."""
    runtime = f"{setting.fingerprint.runtime} {setting.fingerprint.runtime_version}"
    names = list(hashes)
    measurements = {
        name: Measurement(
            name,
            hashes[name],
            runtime,
            tuple(block_from_table(_block_table(r, name)) for r in result["repeats"]),
            setting.spec.paced_ms,
            str(result.get("protocols", {}).get(name, "")),
        )
        for name in names
    }
    return Session(
        measurements=measurements,
        fingerprint=setting.fingerprint,
        preflight=setting.preflight,
        spec=setting.spec,
        mode=setting.mode,
        seed=setting.spec.seed,
        order=tuple(tuple(tuple(names[i] for i in turn) for turn in repeat["order"]) for repeat in result["repeats"]),
        started=setting.started,
        ended=utc_now(),
        lease_owner=setting.owner,
        protocol=protocol(setting.spec, setting.mode, result),
        agent_sha256=pack.digest(),
        telemetry=dict(result["telemetry"]),
    )


def _block_table(repeat: Mapping[str, Any], name: str) -> Table:
    blocks = repeat["blocks"][name]
    return {
        "ns": [block["ns"] for block in blocks],
        "flagged": [block["flagged"] for block in blocks],
        "switches": [block["switches"] for block in blocks],
        "quota_stops": [block["stops"] for block in blocks],
        "misses": [block["missed"] for block in blocks],
        "started_ns": [block["started"] for block in blocks],
        "warmup": repeat["warmups"][name],
        **({"gpu_ns": [block["gpu_ns"] for block in blocks]} if "gpu_ns" in blocks[0] else {}),
    }


# --- running the agent on this machine -----------------------------------------------------------------------------


def run_agent(
    verb: Literal["drive", "rows", "layers"],
    job: Table,
    folder: Path,
    limit_s: float,
    progress: Callable[[float], None] | None = None,
    started: Callable[[int], None] | None = None,
) -> Table:
    """Run one job of the agent in a process of its own and return its raw result.

    folder: where its temporary files go. started: called with the process id. Raises DeployError for what went wrong.
    """
    with working_folder(folder, "measure-") as spool:
        job_file, out = spool / "job.json", spool / "out.json"
        _write(job_file, json.dumps(job))
        with (spool / "stderr").open("w+b") as errors:
            command = [sys.executable, str(pack.FOLDER), verb, str(job_file), str(out)]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
            )
            try:
                if started is not None:
                    started(process.pid)
                last = _follow(process, limit_s, progress)
            finally:
                end_group(process)
            if last.get("event") == "error":
                raise mendable(last, _paths(job), _version())
            if last.get("event") != "done":
                errors.seek(0)
                raise died(process.returncode, errors.read().decode("utf-8", "replace"))
        return _read_result(out, last["sha256"])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DeployError(f"cannot write '{path}': {error.strerror}.", "free space or choose another folder.") from None


def _follow(process: subprocess.Popen[bytes], limit_s: float, progress: Callable[[float], None] | None) -> Table:
    """Read the agent's lines until it ends; the last event that is not progress."""
    assert process.stdout is not None
    pipe, end, buffer = process.stdout.fileno(), time.monotonic() + limit_s, b""
    last: Table = {}
    while True:
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            raise astray(limit_s)
        part = os.read(pipe, 1 << 16)
        if not part:
            process.wait()
            return last
        *lines, buffer = (buffer + part).split(b"\n")
        for event in map(json.loads, lines):
            if event["event"] != "progress":
                last = event
            elif progress is not None:
                progress(float(event["done"]))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own group, and everything in the group; close its pipes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _read_result(out: Path, expected: str) -> Table:
    data = out.read_bytes()
    if hashlib.sha256(data).hexdigest() != expected:
        raise DeployError(f"the agent's result '{out.name}' is damaged: its SHA-256 differs.", "measure again.")
    table: Table = json.loads(data)
    return table


def astray(limit_s: float) -> DeployError:
    """The user's error for an agent that did not end in its time."""
    return DeployError(
        f"the measuring agent did not end within {limit_s:.0f} s.",
        f"lower measure.max_seconds (check.max_seconds in a check), or {DOCTOR}.",
    )


def died(code: int, said: str) -> DeployError:
    """The user's error for an agent that ended without a word. code: as of subprocess; said: its stderr."""
    lines = said.strip().splitlines()
    how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return DeployError(f"the measuring agent {how}{': ' + lines[-1] if lines else ''}.", DOCTOR)


def _paths(job: Mapping[str, Any]) -> dict[str, str]:
    return {model["name"]: model["path"] for model in job["models"] if isinstance(model, dict)}


def mendable(event: Mapping[str, Any], paths: Mapping[str, str], version: str) -> DeployError:
    """The user's error for what the agent reported.

    paths: of models, by what the agent calls them; version: of the runtime on the device.
    """
    kind, message, name = event["kind"], str(event["message"]).rstrip("."), event["model"]
    where = paths.get(name, name)
    if "hint" in event:
        return building.refused(event, "tensorrt")
    if kind == "model":
        hint = "export the network again, or check the file."
        return DeployError(f"ONNX Runtime {version} cannot run '{where}': {message}.", hint)
    if kind == "memory":
        about = f"'{name}'" if name else "the networks"
        return ScarceError(
            f"not enough memory to measure {about}: {message}.", "free memory, or measure fewer networks at once."
        )
    if kind == "long":
        hint = "raise measure.max_seconds; in a check, raise check.max_seconds."
        return UndecidedError(f"measuring takes too long: {message}.", hint)
    if kind == "disturbed":
        hint = "nothing of it was kept: check cooling and power supply, then build again; deploy doctor --target T"
        return UndecidedError(f"rows of the latency table are no result: {message}.", hint)
    if kind == "disk":
        return DeployError(f"{message}.", "free space or choose another folder.")
    if kind == "killed":
        hint = "free memory, or measure fewer networks at once."
        return ScarceError(f"the measuring process of '{name}' {message}.", hint)
    if message.startswith("crashed"):
        hint = "measure it alone; if it crashes again, export the network again or use another runtime version."
        return DeployError(f"the measuring process of '{name}' {message}.", hint)
    if kind in ("lost", "late"):
        return DeployError(f"the measuring process of '{name}' {message}.", DOCTOR)
    return DeployError(f"the measuring agent refused its job: {message}.")


def _version() -> str:
    return machine.runtime_build("onnxruntime")[0]


def hash_artifacts(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """Name -> SHA-256 of the file. Raises UsageError where there is nothing to measure or a file is missing."""
    if not artifacts:
        raise UsageError("no network to measure was given.")
    for name, path in artifacts.items():
        if not path.is_file():
            raise UsageError(f"'{name}' cannot be measured: there is no file '{path}'.")
    return {name: sha256(str(path)) for name, path in artifacts.items()}
