"""A device with a known truth: a roofline over the ONNX shapes with seeded noise and drift. Never a user's number.

The loop is tested against it. The time of a node is max(MACs / peak, bytes / bandwidth) + overhead, where channels
count as rounded up to the next multiple of `grid`: the staircase that real runtimes show. A sample is that truth times
a drift that all networks share, a factor of the process (memory layout) and a factor of its own with a heavy tail.
Artifacts are built and run by ONNX Runtime for real; only the clock is simulated, and every session says so.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from profiles.errors import DeployError
from profiles.schema import MeasureSpec, Profile
from targets.base import LayerTime, Progress, RowTimes, Target
from targets.harness import bench, pack
from targets.harness.device import Condition, Fingerprint, Preflight
from targets.harness.measurement import Blocks, Measurement, Session, Warmup, pace_of
from targets.local import Local

FREE_OPS = frozenset({"Constant", "Dropout", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
ELEMENT_BYTES, HALF_BYTES = 4, 2


@dataclass(frozen=True)
class Truth:
    """What the device really is. Rates are per second, overheads in microseconds, the rest are standard deviations.

    drift: of one step of the walk that all networks share; layout: of a process; noise: of one inference.
    """

    grid: int = 8
    macs_per_s: float = 2.0e10
    bytes_per_s: float = 1.0e10
    node_us: float = 1.0
    call_us: float = 5.0
    drift: float = 0.01
    layout: float = 0.0015
    noise: float = 0.02
    tail: float = 0.01


class Simulated(Local):
    """The simulated device. truth: what it is; `true_ms` gives the latency that its measurements scatter about."""

    def __init__(self, profile: Profile, state: Path, truth: Truth | None = None) -> None:
        super().__init__(profile, state)
        self.truth = truth or Truth()

    def fingerprint(self) -> Fingerprint:
        """The truth itself, and that it is simulated."""
        return self._fingerprint(self.profile.measure)

    def _fingerprint(self, spec: MeasureSpec) -> Fingerprint:
        return Fingerprint(
            machine="simulated", cpu=str(self.truth), cpu_flags="", cores=1, cpu_quota=None, kernel="", memory_mib=0,
            power="", clocks="hidden", runtime="simulated", runtime_version="1", runtime_build="", python="",
            providers=self.profile.providers, threads=spec.threads, spin=spec.spin, simulated=True,
        )  # fmt: skip

    def preflight(self) -> Preflight:
        """One condition that says that nothing here is a user's number."""
        return Preflight((Condition("device", "simulated; its times are no device's", True),))

    def _leasing(self) -> list[Condition]:
        """Nobody has to wait for it."""
        return []

    def _leased(self, holds_s: float) -> AbstractContextManager[object]:
        return nullcontext()

    def true_ms(self, artifact: Path) -> float:
        """Latency of an ONNX file on this device without any noise, in ms."""
        return roofline_ms(artifact, self.truth)

    def measure(
        self,
        artifacts: Mapping[str, Path],
        spec: MeasureSpec,
        mode: Literal["rank", "accept"],
        progress: Progress | None = None,
    ) -> Session:
        """Draw the samples of a session; the same files and seed give the same samples."""
        hashes = bench.hash_artifacts(artifacts)
        job = bench.drive_job(artifacts, hashes, spec, mode, self.profile.providers)
        started = bench.utc_now()
        truth_ms = {name: self.true_ms(path) for name, path in artifacts.items()}
        seed = [spec.seed, *(int(digest[:8], 16) for digest in hashes.values())]
        rng, turns = np.random.default_rng(seed), random.Random(spec.seed)
        blocks: dict[str, list[Blocks]] = {name: [] for name in artifacts}
        order, now = [], 0
        for repeat in range(job["processes"]):
            rounds = _rounds(job, repeat, truth_ms)
            order.append(tuple(tuple(turns.sample(list(artifacts), len(artifacts))) for _ in range(rounds)))
            drift = _drift(rng, rounds, self.truth)
            starts, now = _starts(order[-1], job, truth_ms, now)
            for name, ms in truth_ms.items():
                block = _draw(rng, ms, drift, job["timed"], self.truth)
                late = (block.ns >= job["period_ns"]).sum(axis=1) if job["period_ns"] else block.misses
                blocks[name].append(replace(block, misses=late, started_ns=starts[name]))
            if progress is not None:
                progress((repeat + 1) / job["processes"])
        return Session(
            measurements={
                name: Measurement(name, hashes[name], "simulated 1", tuple(blocks[name]), spec.paced_ms)
                for name in artifacts
            },
            fingerprint=self._fingerprint(spec),
            preflight=self.preflight(),
            spec=spec,
            mode=mode,
            seed=spec.seed,
            order=tuple(order),
            started=started,
            ended=bench.utc_now(),
            lease_owner="nobody, simulated",
            protocol=f"simulated {mode} {pace_of(spec, mode)} {job['processes']}x{job['rounds']}",
            agent_sha256=pack.digest(),
        )

    def layers(self, artifacts: Mapping[str, Path], spec: MeasureSpec) -> Mapping[str, tuple[LayerTime, ...]]:
        """The roofline's time of every node, without any noise."""
        bench.hash_artifacts(artifacts)
        return {name: roofline_layers(path, self.truth) for name, path in artifacts.items()}

    def rows(self, models: Sequence[Path], reference: Path, rounds: int, progress: Progress | None = None) -> RowTimes:
        """Draw one median a model and round, with the drift that all share in a round."""
        bench.hash_artifacts({path.name: path for path in (*models, reference)})
        truth_ms = np.array([self.true_ms(path) for path in (*models, reference)])
        seed = [self.profile.measure.seed, rounds, *(int(ms * 1e9) for ms in truth_ms)]
        rng = np.random.default_rng(seed)
        scatter = self.truth.noise / 3.0
        noise = np.exp(
            rng.normal(0.0, scatter, (truth_ms.size, rounds)) + rng.normal(0.0, self.truth.layout, (truth_ms.size, 1))
        )
        ms = truth_ms[:, None] * noise * _drift(rng, rounds, self.truth)
        return RowTimes(ms[:-1], ms[-1:], np.zeros(len(models), np.int64))


def _inference_ns(ms: float, period_ns: int) -> int:
    """Time from one inference to the next: its own, or the whole periods that it takes."""
    own = max(1, round(ms * 1e6))
    return period_ns * -(-own // period_ns) if period_ns else own


def _rounds(job: Mapping[str, Any], repeat: int, truth_ms: Mapping[str, float]) -> int:
    """Rounds of a process; in the first one of a sustained session as many as fill its time."""
    if not job["sustained_s"] or repeat:
        return int(job["rounds"])
    count = job["dropped"] + job["timed"]
    round_ns = int(sum(count * _inference_ns(ms, job["period_ns"]) for ms in truth_ms.values()))
    return math.ceil(float(job["sustained_s"]) * 1e9 / round_ns)


def _starts(
    order: Sequence[Sequence[str]], job: Mapping[str, Any], truth_ms: Mapping[str, float], now: int
) -> tuple[dict[str, NDArray[np.int64]], int]:
    """When each block of a process begins, ns since the session's start; and when the last one ends."""
    count = job["dropped"] + job["timed"]
    starts: dict[str, list[int]] = {name: [] for name in truth_ms}
    for turn in order:
        for name in turn:
            starts[name].append(now)
            now += count * _inference_ns(truth_ms[name], job["period_ns"])
    return {name: np.array(begun, dtype=np.int64) for name, begun in starts.items()}, now


def _drift(rng: np.random.Generator, rounds: int, truth: Truth) -> NDArray[np.float64]:
    """Factor of each round. Over many rounds the walk's steps shrink, so that it strays no farther than over sixty."""
    step = truth.drift * min(1.0, math.sqrt(60 / rounds))
    return np.exp(np.cumsum(rng.normal(0.0, step, rounds)) + abs(rng.normal(0.0, 5 * truth.drift)))


def _draw(rng: np.random.Generator, ms: float, drift: NDArray[np.float64], timed: int, truth: Truth) -> Blocks:
    rounds = drift.size
    own = rng.normal(0.0, truth.noise, (rounds, timed)) + rng.normal(0.0, truth.layout)
    late = rng.random((rounds, timed)) < truth.tail
    own[late] += rng.exponential(0.3, int(late.sum()))
    ns = np.maximum(1, np.rint(ms * 1e6 * drift[:, None] * np.exp(own))).astype(np.int64)
    nothing = np.zeros(rounds, dtype=np.int64)
    return Blocks(ns, np.zeros(rounds, dtype=bool), nothing, nothing, Warmup(0, 0.0, (), True))


# --- the truth -----------------------------------------------------------------------------------------------------


def roofline_ms(path: Path, truth: Truth) -> float:
    """Sum over nodes of max(padded MACs / peak, bytes / bandwidth) + overhead, in ms."""
    return sum(layer.ms for layer in roofline_layers(path, truth)) + 1e-3 * truth.call_us


def roofline_layers(path: Path, truth: Truth) -> tuple[LayerTime, ...]:
    """Every node's max(padded MACs / peak, bytes / bandwidth) + overhead, in ms."""
    import onnx

    try:
        model = onnx.load(path)
        for value in model.graph.input:
            first = value.type.tensor_type.shape.dim
            if first and not first[0].HasField("dim_value"):
                first[0].dim_value = 1
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    except (OSError, ValueError, onnx.shape_inference.InferenceError, _decode_error()) as error:
        raise DeployError(f"'{path}' is not an ONNX file with known shapes: {str(error).splitlines()[0]}.") from None
    shapes = {init.name: tuple(init.dims) for init in graph.initializer}
    half = {init.name for init in graph.initializer if init.data_type == onnx.TensorProto.FLOAT16}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
            half.add(value.name)
    return tuple(
        LayerTime(node.name or f"{node.op_type}_{index}", node.op_type, 1e3 * _node_s(node, shapes, half, truth))
        for index, node in enumerate(graph.node)
    )


def _decode_error() -> type[Exception]:
    from google.protobuf import message

    error: type[Exception] = message.DecodeError
    return error


def _node_s(node: Any, shapes: Mapping[str, tuple[int, ...]], half: Collection[str], truth: Truth) -> float:
    """Seconds of a node; half: names of tensors of float16, which the memory moves in half the time."""
    overhead = truth.node_us * 1e-6
    if node.op_type in FREE_OPS:
        return overhead
    touched = [name for name in (*node.input, *node.output) if name]
    counts = {name: math.prod(_padded(shapes.get(name, ()), truth.grid)) for name in touched}
    moved = sum(counts[name] * (HALF_BYTES if name in half else ELEMENT_BYTES) for name in touched)
    return max(_macs(node, shapes, truth.grid) / truth.macs_per_s, moved / truth.bytes_per_s) + overhead


def _up(count: int, grid: int) -> int:
    return -(-count // grid) * grid


def _padded(shape: tuple[int, ...], grid: int) -> tuple[int, ...]:
    """The shape with its channel axis on the grid, for feature maps."""
    return (shape[0], _up(shape[1], grid), *shape[2:]) if len(shape) == 4 else shape


def _macs(node: Any, shapes: Mapping[str, tuple[int, ...]], grid: int) -> float:
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return 0.0
    first, weight, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type != "Conv":
        return float(math.prod(out[:-1]) * _up(out[-1], grid) * _up(first[-1], grid))
    pixels, kernel = out[0] * math.prod(out[2:]), math.prod(weight[2:])
    groups = first[1] // weight[1]
    if weight[1] == 1 and groups > 1:
        return float(pixels * kernel * _up(out[1], grid))
    return float(pixels * kernel * groups * _up(weight[1], grid) * _up(out[1] // groups, grid))


def target(profile: Profile, state: Path) -> Target:
    """The plug-in. A grid in the profile is the device's true grid here."""
    truth = Truth()
    return Simulated(profile, state, replace(truth, grid=profile.prune.grid or truth.grid))
