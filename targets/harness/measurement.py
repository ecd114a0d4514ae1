"""Measurements and what may be said of them: raw nanoseconds are kept, every statistic is derived from them.

Two levels of scatter, two tools (measurement.md, sections 2 and 3):

- Between processes (memory layout, drift): the unit is a process. A ratio at the median is
  e_i = median over rounds of log(block median of a / block median of b) in process i, and its bounds are
  mean(e) -/+ t(0.99, R-1) sd(e) / sqrt(R): two one-sided 99 % bounds. Blocks of one round follow each other at once,
  so what the machine does to both cancels.
- Within a distribution: a percentile gets distribution-free bounds from order statistics, by the early-stopping rule
  of MLPerf Inference with c = 0.99: of n samples the t-1 highest are discarded, t the largest with
  P[Bin(n, 1-p) <= t] <= 1-c, and the highest left bounds the percentile from above; the lower bound is the mirror
  image. With too few samples there is no bound and the value is None with the reason, never the maximum in disguise.

A ratio of means or tails is the ratio of the pooled statistics. Its bounds are a two-level bootstrap (processes, then
rounds inside them, the same rounds for both networks), stretched about the centre by
t(0.99, R-1) / z(0.99) x sqrt(R / (R-1)) because few processes show too little of their own scatter.

Flagged blocks are left out; nothing is ever trimmed by its value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from profiles.errors import DeployError, UndecidedError, UsageError, near_miss
from profiles.schema import Budget, MeasureSpec
from targets.harness.device import Fingerprint, Preflight

CONFIDENCE = 0.99
CONTAMINATED = 0.20
DRIFT_S = 30.0
"""Length of the first and of the last stretch of a process that `Measurement.drift` compares."""
STOPPED = 0.05
"""Share of blocks in which a processor quota, or something else, held a network up: a stop lasts as long as many
blocks."""
TORN = 1.5
"""Third quartile over first of a block's inferences, above which something else held the processor between them; below
1.1 where nothing does. Evenly busy machines flag few blocks, since flags are relative to the run's own median."""
NEEDED = {"p90": 1024, "p99": 4096}
"""Pooled inferences without which a tail percentile is not reported."""
BOOTSTRAP = 1000
LOW_SHARE = 0.10
SHARES = {"p50": 0.50, "p90": 0.90, "p99": 0.99}

VERSIONS = (1, 2)
"""Versions of the text form that are read; the last is written."""

Statistic = Literal["p50", "mean", "p90", "p99"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
Outcome = Literal["met", "missed", "undecided"]
Nanoseconds = NDArray[np.int64]


@dataclass(frozen=True)
class Percentile:
    """A statistic of latencies with its one-sided 99 % bounds, in milliseconds.

    value_ms is None, with the reason, where there are too few samples; bounds that do not exist are 0 and infinity.
    """

    value_ms: float | None
    low_ms: float
    high_ms: float
    reason: str = ""


@dataclass(frozen=True)
class Interval:
    """A ratio with its one-sided 99 % bounds. sd: scatter of its logarithm between processes; n: processes."""

    center: float
    low: float
    high: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.center:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Warmup:
    """How a process was warmed up. windows_ns: medians of its last windows; steady: whether two in a row agreed."""

    inferences: int
    seconds: float
    windows_ns: tuple[int, ...]
    steady: bool


@dataclass(frozen=True, eq=False)
class Blocks:
    """One process's timed blocks of one network: one row a round.

    ns: nanoseconds of each timed inference, int64, shape (rounds, timed). flagged: shape (rounds,), True where
    something that is not the network disturbed the block. switches: involuntary context switches, shape (rounds,).
    quota_stops: how often a control group's processor quota stopped the process, shape (rounds,). misses: inferences
    that were not done before the next tick of the control period, int64, shape (rounds,); zeros when back to back.
    started_ns: when the block began, ns since its session's start, int64, shape (rounds,); zeros where not recorded.
    gpu_ns: nanoseconds between the CUDA events around the engine in the same inferences, the shape of `ns`; or None.
    """

    ns: Nanoseconds
    flagged: NDArray[np.bool_]
    switches: NDArray[np.int64]
    quota_stops: NDArray[np.int64]
    warmup: Warmup
    misses: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    started_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    gpu_ns: Nanoseconds | None = None

    def __post_init__(self) -> None:
        for name in ("misses", "started_ns"):
            if not getattr(self, name).size:
                object.__setattr__(self, name, _frozen(np.zeros(len(self.ns), np.int64)))

    @property
    def kept(self) -> Nanoseconds:
        """Nanoseconds of the blocks that are not flagged, in one row; of all blocks where every one is flagged."""
        return self.ns[self.usable].ravel()

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Rounds to use, shape (rounds,)."""
        return np.ones_like(self.flagged) if bool(self.flagged.all()) else ~self.flagged

    @property
    def medians_ns(self) -> NDArray[np.float64]:
        """Block medians, shape (rounds,)."""
        medians: NDArray[np.float64] = np.median(self.ns, axis=1)
        return medians

    @property
    def lows_ns(self) -> NDArray[np.float64]:
        """10th percentile of each block, shape (rounds,): what the network takes when little disturbs it."""
        lows: NDArray[np.float64] = np.quantile(self.ns, LOW_SHARE, axis=1)
        return lows


def _frozen(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array.setflags(write=False)
    return array


def percentile_bounds(samples_ns: Nanoseconds, share: float) -> tuple[float, float]:
    """Lower and upper 99 % bound in ms of the `share` quantile, distribution-free; 0 and infinity without one."""
    ordered = np.sort(samples_ns)
    n = ordered.size
    drop_high = _count(n, 1.0 - share)
    drop_low = _count(n, share)
    high = float(ordered[n - drop_high]) * 1e-6 if drop_high >= 1 else math.inf
    low = float(ordered[drop_low - 1]) * 1e-6 if drop_low >= 1 else 0.0
    return low, high


def _count(n: int, share: float) -> int:
    """Largest t with P[Bin(n, share) <= t] <= 1 - c, or 0."""
    if n == 0:
        return 0
    t = int(stats.binom.ppf(1.0 - CONFIDENCE, n, share))
    while t >= 1 and float(stats.binom.cdf(t, n, share)) > 1.0 - CONFIDENCE:
        t -= 1
    return max(t, 0)


def _quantile(samples_ns: Nanoseconds, statistic: Statistic, pooled: bool) -> Percentile:
    n, share = int(samples_ns.size), SHARES[statistic]
    low, high = percentile_bounds(samples_ns, share)
    needed = NEEDED.get(statistic, 1) if pooled else 1
    if n < needed:
        return Percentile(None, low, high, f"{statistic} needs {needed} inferences, there are {n}")
    if math.isinf(high):
        return Percentile(None, low, high, f"{n} inferences are too few to bound {statistic} from above")
    return Percentile(float(np.quantile(samples_ns, share)) * 1e-6, low, high)


@dataclass(frozen=True, eq=False)
class Measurement:
    """All raw samples of one artifact in one session.

    name: its name in the session; sha256: of the artifact; runtime: name and version; processes: the `Blocks` of each
    fresh process; paced_ms: the control period, None when back to back. protocol: how it was timed where that is not
    the same for a whole session, as through Python or through trtexec; "" where the session's says it.
    """

    name: str
    sha256: str
    runtime: str
    processes: tuple[Blocks, ...]
    paced_ms: float | None = None
    protocol: str = ""

    @cached_property
    def pooled_ns(self) -> Nanoseconds:
        """Nanoseconds of every usable inference of all processes."""
        return np.concatenate([block.kept for block in self.processes])

    @property
    def p50_ms(self) -> float:
        """Median over all usable inferences, in ms."""
        return float(np.median(self.pooled_ns)) * 1e-6

    @property
    def mean_ms(self) -> float:
        """Mean over all usable inferences, in ms."""
        return float(np.mean(self.pooled_ns)) * 1e-6

    @property
    def p90(self) -> Percentile:
        """Pooled 90th percentile."""
        return _quantile(self.pooled_ns, "p90", pooled=True)

    @property
    def p99(self) -> Percentile:
        """Pooled 99th percentile."""
        return _quantile(self.pooled_ns, "p99", pooled=True)

    @property
    def mean(self) -> Percentile:
        """Mean with a t bound over the means of the processes."""
        means = np.array([float(np.mean(block.kept)) for block in self.processes]) * 1e-6
        return Percentile(self.mean_ms, *_t_bounds(means))

    @property
    def p50(self) -> Percentile:
        """Pooled median."""
        return _quantile(self.pooled_ns, "p50", pooled=True)

    @property
    def spread(self) -> float:
        """Process-to-process spread: standard deviation of the log medians of the processes; 0 for one process."""
        medians = np.log([float(np.median(block.kept)) for block in self.processes])
        return float(np.std(medians, ddof=1)) if medians.size > 1 else 0.0

    @cached_property
    def on_gpu(self) -> Measurement | None:
        """The same inferences by the CUDA events around the engine: copies, enqueueing and waiting are no part of it.

        None where no events were taken. It says where the time goes; what is compared and promised is the measurement.
        """
        parts = [replace(block, ns=block.gpu_ns) for block in self.processes if block.gpu_ns is not None]
        return replace(self, processes=tuple(parts)) if len(parts) == len(self.processes) else None

    @property
    def flagged_share(self) -> float:
        """Share of the blocks that are flagged."""
        return float(np.mean(np.concatenate([block.flagged for block in self.processes])))

    @property
    def torn_share(self) -> float:
        """Share of the blocks whose inferences lie further apart than TORN."""
        quartiles = [np.quantile(block.ns, (0.25, 0.75), axis=1) for block in self.processes]
        return float(np.mean(np.concatenate([third > TORN * first for first, third in quartiles])))

    @property
    def stopped_share(self) -> float:
        """Share of the blocks in which a processor quota stopped the process."""
        return float(np.mean(np.concatenate([block.quota_stops > 0 for block in self.processes])))

    @property
    def deadline_misses(self) -> tuple[int, int] | None:
        """Inferences that were not done before the next tick, and all, over usable blocks; None when back to back."""
        if self.paced_ms is None:
            return None
        missed = sum(int(block.misses[block.usable].sum()) for block in self.processes)
        return missed, int(self.pooled_ns.size)

    @property
    def miss_ratio(self) -> float | None:
        """Share of the inferences that missed their deadline; None when back to back."""
        counts = self.deadline_misses
        return None if counts is None else counts[0] / counts[1]

    @property
    def drift(self) -> float | None:
        """Median of the last 30 s of a process over that of its first 30 s: what heat did; over 1 is slower.

        The geometric mean over the processes that lasted 60 s or longer; None where there is none.
        """
        logs = [log for block in self.processes if (log := _drift_log(block)) is not None]
        return math.exp(sum(logs) / len(logs)) if logs else None

    @property
    def steady(self) -> bool:
        """Whether every process was steady at the end of its warm-up."""
        return not self.unsteady

    @property
    def unsteady(self) -> int:
        """How many processes never became steady in their warm-up."""
        return sum(not block.warmup.steady for block in self.processes)

    def statistic(self, name: Statistic) -> Percentile:
        """The pooled statistic by name."""
        return {"p50": self.p50, "mean": self.mean, "p90": self.p90, "p99": self.p99}[name]

    def by_process(self, name: Statistic) -> tuple[Percentile, ...]:
        """The statistic in every process alone. A process's mean is bounded by a t bound over its block means."""
        if name == "mean":
            return tuple(_block_mean(block) for block in self.processes)
        return tuple(_quantile(block.kept, name, pooled=False) for block in self.processes)


def _drift_log(block: Blocks) -> float | None:
    ends = np.append(block.started_ns[1:], block.started_ns[-1] + block.ns[-1].sum())
    begin, end, stretch = int(block.started_ns[0]), int(ends[-1]), int(DRIFT_S * 1e9)
    if end - begin < 2 * stretch:
        return None
    first, last = block.usable & (ends <= begin + stretch), block.usable & (block.started_ns >= end - stretch)
    if not first.any() or not last.any():
        return None
    return math.log(float(np.median(block.ns[last])) / float(np.median(block.ns[first])))


def _block_mean(block: Blocks) -> Percentile:
    means = block.ns[block.usable].mean(axis=1) * 1e-6
    return Percentile(float(means.mean()), *_t_bounds(means))


def _t_bounds(values: NDArray[np.float64]) -> tuple[float, float]:
    n = values.size
    if n < 2:
        return 0.0, math.inf
    half = float(stats.t.ppf(CONFIDENCE, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return max(0.0, float(values.mean()) - half), float(values.mean()) + half


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


@dataclass(frozen=True, eq=False)
class Session:
    """Artifacts measured in turn, and all that is needed to judge and to repeat it. Times of day are in UTC, ISO 8601.

    order: for each process and round the names in the order they ran. telemetry: what was read during the run.
    """

    measurements: Mapping[str, Measurement]
    fingerprint: Fingerprint
    preflight: Preflight
    spec: MeasureSpec
    mode: Literal["rank", "accept"]
    seed: int
    order: tuple[tuple[tuple[str, ...], ...], ...]
    started: str
    ended: str
    lease_owner: str
    protocol: str
    agent_sha256: str
    telemetry: Mapping[str, float] = field(default_factory=dict)

    @property
    def contaminated(self) -> bool:
        """Whether too much was disturbed for any result."""
        return self.contamination is not None

    @property
    def contamination(self) -> str | None:
        """What makes the session no result, in words, or None.

        More than 20 % of some network's blocks flagged; over-current, which lowers a Jetson's clocks for all that runs;
        a processor quota that stops every network, or something else that holds the processor between the inferences of
        every one: it takes long blocks more often than short ones, so that the median of the longer network jumps first
        and the ratio falls (0.34 was measured for 0.50). What meets a single network is that network's own trouble and
        shows in its mean and p99.
        """
        if self.telemetry.get("overcurrent_events", 0.0) > 0.0:
            return f"the board's power supply was overloaded {self.telemetry['overcurrent_events']:.0f} times meanwhile"
        if any(m.flagged_share > CONTAMINATED for m in self.measurements.values()):
            return f"more than {_percent(CONTAMINATED)} of the blocks of a network were disturbed"
        if all(m.stopped_share > STOPPED for m in self.measurements.values()):
            return "a processor quota stopped every network"
        torn = [m.torn_share for m in self.measurements.values()]
        if len(torn) > 1 and max(torn) > CONTAMINATED and min(torn) > STOPPED:
            return (
                f"something else held the processor between inferences, in {_percent(max(torn))} of a network's blocks"
            )
        return None

    @property
    def unstable(self) -> Mapping[str, tuple[int, int]]:
        """Networks of which processes never became steady (rule 4's UNSTABLE): name -> (how many, of how many)."""
        return {name: (m.unsteady, len(m.processes)) for name, m in self.measurements.items() if m.unsteady}

    @property
    def simulated(self) -> bool:
        """Whether the numbers come from the simulated device and are no user's."""
        return self.fingerprint.simulated

    def measurement(self, name: str) -> Measurement:
        """The measurement of this name. Raises UsageError with the near miss."""
        if name not in self.measurements:
            raise UsageError(f"no network named '{name}' in this session. {near_miss(name, self.measurements)}")
        return self.measurements[name]

    @property
    def manner(self) -> str:
        """How the numbers were taken, without a session's counts: only those taken alike are joined or compared."""
        kind = self.protocol.partition(" ")[0]
        return f"{kind} {self.mode} {pace_of(self.spec, self.mode)}"

    @property
    def _span_ns(self) -> int:
        """When the last block ended, ns since the session's start."""
        blocks = [block for m in self.measurements.values() for block in m.processes]
        return max(int((block.started_ns + block.ns.sum(axis=1)).max()) for block in blocks)

    def joined(self, later: Session) -> Session:
        """Both sessions as one, with the processes of both: more samples where the first left a question open.

        Raises UndecidedError when they did not measure the same files on the same device in the same way. The later
        blocks' start times are moved behind the first session's.
        """
        if self.manner != later.manner:
            raise UndecidedError(
                f"two sessions were measured differently: '{self.manner}' and '{later.manner}'.",
                "measure both with the same [measure] keys.",
            )
        if self.fingerprint.digest() != later.fingerprint.digest():
            raise UndecidedError("the device has changed between two sessions.", "deploy doctor --target T")
        mine, theirs = ({n: m.protocol for n, m in each.measurements.items()} for each in (self, later))
        if mine != theirs:
            raise UndecidedError(
                f"two sessions timed their networks under different protocols: {mine} and {theirs}.",
                "time both through the same runtime and providers with the same [measure] and [tensorrt] keys.",
            )
        if {n: m.sha256 for n, m in self.measurements.items()} != {n: m.sha256 for n, m in later.measurements.items()}:
            raise UndecidedError("two sessions did not measure the same networks.", "measure them again together.")
        offset = self._span_ns
        both = {
            name: replace(first, processes=(*first.processes, *_later(later.measurements[name].processes, offset)))
            for name, first in self.measurements.items()
        }
        name = "overcurrent_events"
        events = [each.telemetry[name] for each in (self, later) if name in each.telemetry]
        telemetry = {**self.telemetry, name: sum(events)} if events else self.telemetry
        order = (*self.order, *later.order)
        return replace(self, measurements=both, order=order, ended=later.ended, telemetry=telemetry)

    def ratio(self, a: str, b: str, statistic: Statistic = "p50") -> Interval:
        """Latency of `a` over that of `b` with 99 % bounds, which are 0 and infinity without enough samples."""
        first, second = self.measurement(a), self.measurement(b)
        return (
            log_interval(_process_logs(first, second))
            if statistic == "p50"
            else _pooled_ratio(first, second, statistic, self.seed)
        )

    def low_ratio(self, a: str, b: str) -> Interval:
        """Like `ratio` at the median, of the blocks' 10th percentiles instead of their medians: less of the machine."""
        return log_interval(_process_low_logs(self.measurement(a), self.measurement(b)))

    def process_ratios(self, a: str, b: str, statistic: Statistic = "p50") -> tuple[float, ...]:
        """Latency of `a` over that of `b` in every process alone; the geometric mean of p50 is `ratio`'s centre.

        Empty for a tail that a process alone has too few samples to bound.
        """
        first, second = self.measurement(a), self.measurement(b)
        if statistic == "p50":
            return tuple(float(ratio) for ratio in np.exp(_process_logs(first, second)))
        pairs = [(x.ns[use], y.ns[use]) for x, y, use in _pairs(first, second)]
        sides = [side.ravel() for pair in pairs for side in pair]
        if statistic in NEEDED and any(math.isinf(percentile_bounds(s, SHARES[statistic])[1]) for s in sides):
            return ()
        return tuple(_pooled([x], statistic) / _pooled([y], statistic) for x, y in pairs)

    def to_json(self) -> str:
        """Text form with every raw sample, exact."""
        return json.dumps(_session_table(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Session:
        """Inverse of `to_json`. Raises DeployError for what is not a session of version 1 or 2.

        Version 1 had neither deadline misses nor start times; both are zeros then.
        """
        try:
            table = json.loads(text)
            if table["version"] not in VERSIONS:
                raise DeployError(f"the measurement has version {table['version']}, this tool reads versions 1 and 2.")
            return _session(table)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            said = str(error).splitlines()[0] if str(error) else "without a word"
            raise DeployError(f"not a measurement record: {type(error).__name__} {said}.") from None


def pace_of(spec: MeasureSpec, mode: Literal["rank", "accept"]) -> str:
    """How inferences follow each other, in words without blanks but one between two: `back-to-back`, `paced=33ms`."""
    pace = "back-to-back" if spec.paced_ms is None else f"paced={spec.paced_ms:g}ms"
    return f"{pace} sustained={spec.sustained_s:g}s" if spec.sustained_s and mode == "accept" else pace


def _later(processes: tuple[Blocks, ...], offset: int) -> tuple[Blocks, ...]:
    """Processes whose blocks began `offset` ns later; start times that were not recorded stay zero."""
    return tuple(
        replace(block, started_ns=_frozen(block.started_ns + offset)) if block.started_ns.any() else block
        for block in processes
    )


def _pairs(a: Measurement, b: Measurement) -> list[tuple[Blocks, Blocks, NDArray[np.bool_]]]:
    """Processes of both with the rounds in which neither is flagged; all rounds where none is left.

    Raises UndecidedError where the two were timed under different protocols: their times are different quantities.
    """
    if a.protocol != b.protocol:
        raise UndecidedError(
            f"'{a.name}' and '{b.name}' were timed under different protocols, '{a.protocol}' and '{b.protocol}', "
            "so their times do not compare.",
            "time both through the same runtime and providers with the same [measure] and [tensorrt] keys.",
        )
    pairs = []
    for one, two in zip(a.processes, b.processes, strict=True):
        usable = ~one.flagged & ~two.flagged
        pairs.append((one, two, usable if bool(usable.any()) else np.ones_like(usable)))
    return pairs


def _process_logs(a: Measurement, b: Measurement) -> NDArray[np.float64]:
    """e_i of every process: the median over its rounds of log(block median of a / block median of b)."""
    return np.array([float(np.median(np.log(x.medians_ns / y.medians_ns)[use])) for x, y, use in _pairs(a, b)])


def _process_low_logs(a: Measurement, b: Measurement) -> NDArray[np.float64]:
    """The same of the blocks' 10th percentiles."""
    return np.array([float(np.median(np.log(x.lows_ns / y.lows_ns)[use])) for x, y, use in _pairs(a, b)])


def log_interval(logs: NDArray[np.float64]) -> Interval:
    """Ratio whose logarithm the processes scatter about, with t bounds; logs: one a process, shape (processes,)."""
    n, center = logs.size, float(logs.mean())
    if n < 2:
        return Interval(math.exp(center), 0.0, math.inf, 0.0, n)
    sd = float(np.std(logs, ddof=1))
    half = float(stats.t.ppf(CONFIDENCE, n - 1)) * sd / math.sqrt(n)
    return Interval(math.exp(center), math.exp(center - half), math.exp(center + half), sd, n)


def _pooled_ratio(a: Measurement, b: Measurement, statistic: Statistic, seed: int) -> Interval:
    pairs = [(x.ns[use], y.ns[use]) for x, y, use in _pairs(a, b)]
    n = len(pairs)
    center = math.log(_pooled([x for x, _ in pairs], statistic) / _pooled([y for _, y in pairs], statistic))
    enough = min(sum(x.size for x, _ in pairs), sum(y.size for _, y in pairs)) >= NEEDED.get(statistic, 1)
    if n < 2 or not enough:
        return Interval(math.exp(center), 0.0, math.inf, 0.0, n)
    logs = _bootstrap(pairs, statistic, np.random.default_rng(seed))
    stretch = float(stats.t.ppf(CONFIDENCE, n - 1) / stats.norm.ppf(CONFIDENCE)) * math.sqrt(n / (n - 1))
    low, high = (center + stretch * (float(np.quantile(logs, q)) - center) for q in (1.0 - CONFIDENCE, CONFIDENCE))
    sd = float(np.std(logs, ddof=1)) * math.sqrt(n * n / (n - 1))
    return Interval(math.exp(center), math.exp(min(low, center)), math.exp(max(high, center)), sd, n)


def _pooled(blocks: list[Nanoseconds], statistic: Statistic) -> float:
    samples = np.concatenate([block.ravel() for block in blocks])
    return float(np.mean(samples)) if statistic == "mean" else float(np.quantile(samples, SHARES[statistic]))


def _bootstrap(
    pairs: list[tuple[Nanoseconds, Nanoseconds]], statistic: Statistic, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Log ratios of the pooled statistic, shape (BOOTSTRAP,). A resample is a count for every round of a process."""
    n = len(pairs)
    picks = rng.multinomial(n, np.full(n, 1.0 / n), size=BOOTSTRAP)
    rounds = [len(x) for x, _ in pairs]
    counts = np.concatenate(
        [rng.multinomial(picks[:, i] * size, np.full(size, 1.0 / size)) for i, size in enumerate(rounds)], axis=1
    )
    first, second = (_weighted([pair[side] for pair in pairs], counts, statistic) for side in (0, 1))
    logs: NDArray[np.float64] = np.log(first / second)
    return logs


def _weighted(blocks: list[Nanoseconds], counts: NDArray[np.int64], statistic: Statistic) -> NDArray[np.float64]:
    """The statistic of the pooled samples when round r counts counts[:, r] times, shape (resamples,)."""
    if statistic == "mean":
        sums = np.concatenate([block.sum(axis=1) for block in blocks])
        sizes = np.concatenate([np.full(len(block), block.shape[1]) for block in blocks])
        means: NDArray[np.float64] = (counts @ sums) / (counts @ sizes)
        return means
    samples = np.concatenate([block.ravel() for block in blocks])
    starts = np.cumsum([0, *(len(block) for block in blocks[:-1])])
    owners = np.concatenate([s + np.repeat(np.arange(len(b)), b.shape[1]) for s, b in zip(starts, blocks, strict=True)])
    ranking = np.argsort(samples)
    samples, owners = samples[ranking], owners[ranking]
    values = np.empty(len(counts))
    for i, row in enumerate(counts):
        passed = np.cumsum(row[owners])
        values[i] = samples[np.searchsorted(passed, SHARES[statistic] * passed[-1])]
    return values


# --- what is said of a budget --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """A verdict with its numbers. value, low, high and limit are ratios for a relative budget, else milliseconds."""

    verdict: Outcome
    value: float
    low: float
    high: float
    limit: float
    unit: Literal["x", "ms"]
    reason: str


def judge(session: Session, candidate: str, dense: str, budget: Budget) -> Judgement:
    """Whether a candidate keeps a budget, with the numbers that say so.

    Relative: met when the upper 99 % bound of the interleaved ratio is at most the budget, missed when the lower bound
    is above it. Absolute: met when the upper bound of the declared percentile is at most the limit in every process,
    missed when the lower bound is above it in every one. Anything else, a contaminated session included, is undecided.
    """
    judged = (
        _judge_ratio(session, candidate, dense, budget)
        if budget.ratio is not None
        else _judge_limit(session, candidate, budget)
    )
    if session.contamination:
        reason = f"the session is contaminated: {session.contamination}"
        return Judgement("undecided", judged.value, judged.low, judged.high, judged.limit, judged.unit, reason)
    return judged


def verdict(session: Session, candidate: str, dense: str, budget: Budget) -> Outcome:
    """The bare verdict of `judge`."""
    return judge(session, candidate, dense, budget).verdict


def _outcome(low: float, high: float, limit: float) -> Outcome:
    return "met" if high <= limit else "missed" if low > limit else "undecided"


def _judge_ratio(session: Session, candidate: str, dense: str, budget: Budget) -> Judgement:
    limit = float(budget.ratio or 0.0)
    interval = session.ratio(candidate, dense, budget.percentile)
    outcome = _outcome(interval.low, interval.high, limit)
    bounds = f"bounds {interval.low:.3f} to {interval.high:.3f}"
    few = session.measurement(candidate).statistic(budget.percentile).reason if math.isinf(interval.high) else ""
    reason = f"{budget.percentile} is {interval.center:.3f}x of '{dense}', {few or bounds}, budget {limit:g}x"
    return Judgement(outcome, interval.center, interval.low, interval.high, limit, "x", reason)


def _judge_limit(session: Session, candidate: str, budget: Budget) -> Judgement:
    limit = float(budget.limit_ms or 0.0)
    measurement = session.measurement(candidate)
    each = measurement.by_process(budget.percentile)
    low, high = min(p.low_ms for p in each), max(p.high_ms for p in each)
    pooled = measurement.statistic(budget.percentile)
    value = pooled.value_ms if pooled.value_ms is not None else math.nan
    if pooled.value_ms is None:
        return Judgement("undecided", value, low, high, limit, "ms", pooled.reason)
    outcome = _outcome(low, high, limit)
    bounds = f"bounds over {len(each)} processes {low:.3f} to {high:.3f} ms"
    reason = f"{budget.percentile} is {value:.3f} ms, {bounds}, budget {limit:g} ms"
    return Judgement(outcome, value, low, high, limit, "ms", reason)


# --- text form -----------------------------------------------------------------------------------------------------


def _block_table(block: Blocks) -> dict[str, Any]:
    return {
        "ns": block.ns.tolist(),
        "flagged": [int(f) for f in block.flagged],
        "switches": block.switches.tolist(),
        "quota_stops": block.quota_stops.tolist(),
        "misses": block.misses.tolist(),
        "started_ns": block.started_ns.tolist(),
        **({"gpu_ns": block.gpu_ns.tolist()} if block.gpu_ns is not None else {}),
        "warmup": {
            "inferences": block.warmup.inferences,
            "seconds": block.warmup.seconds,
            "windows_ns": list(block.warmup.windows_ns),
            "steady": block.warmup.steady,
        },
    }


def block_from_table(table: Mapping[str, Any]) -> Blocks:
    """A process's blocks from their plain table; without `misses` and `started_ns` (version 1) these are zeros.

    Without `gpu_ns` there were no CUDA events. Raises ValueError where the shapes do not agree.
    """
    ns = np.array(table["ns"], dtype=np.int64)
    flagged = np.array(table["flagged"], dtype=bool)
    switches = np.array(table["switches"], dtype=np.int64)
    stops = np.array(table["quota_stops"], dtype=np.int64)
    if ns.ndim != 2 or not ns.size or bool((ns <= 0).any()):
        raise ValueError(f"samples of shape {ns.shape} are not rounds of positive nanoseconds")
    if not (flagged.shape == switches.shape == stops.shape == ns.shape[:1]):
        raise ValueError(
            f"{ns.shape[0]} rounds, but {flagged.size} flags, {switches.size} switches and {stops.size} stops"
        )
    nothing = [0] * len(ns)
    misses = np.array(table.get("misses", nothing), dtype=np.int64)
    started = np.array(table.get("started_ns", nothing), dtype=np.int64)
    if not (misses.shape == started.shape == ns.shape[:1]):
        raise ValueError(f"{ns.shape[0]} rounds, but {misses.size} counts of misses and {started.size} start times")
    gpu = np.array(table["gpu_ns"], dtype=np.int64) if "gpu_ns" in table else None
    if gpu is not None and (gpu.shape != ns.shape or bool((gpu < 0).any())):
        raise ValueError(f"times on the GPU of shape {gpu.shape}, or negative ones, beside samples of shape {ns.shape}")
    for array in (ns, flagged, switches, stops, misses, started, *([] if gpu is None else [gpu])):
        array.setflags(write=False)
    warmup = dict(table["warmup"])
    warmup["windows_ns"] = tuple(warmup["windows_ns"])
    return Blocks(ns, flagged, switches, stops, Warmup(**warmup), misses, started, gpu)


def _session_table(session: Session) -> dict[str, Any]:
    names = list(session.measurements)
    position = {name: index for index, name in enumerate(names)}
    return {
        "version": VERSIONS[-1],
        "names": names,
        "measurements": [
            {
                "name": m.name,
                "sha256": m.sha256,
                "runtime": m.runtime,
                "processes": [_block_table(b) for b in m.processes],
                **({"protocol": m.protocol} if m.protocol else {}),
            }
            for m in session.measurements.values()
        ],
        "fingerprint": session.fingerprint.to_table(),
        "fingerprint_sha256": session.fingerprint.digest(),
        "preflight": session.preflight.to_table(),
        "spec": session.spec.model_dump(),
        "mode": session.mode,
        "seed": session.seed,
        "order": [[[position[name] for name in turn] for turn in process] for process in session.order],
        "started": session.started,
        "ended": session.ended,
        "lease_owner": session.lease_owner,
        "protocol": session.protocol,
        "agent_sha256": session.agent_sha256,
        "telemetry": dict(session.telemetry),
    }


def _session(table: Mapping[str, Any]) -> Session:
    names = [str(name) for name in table["names"]]
    spec = MeasureSpec.model_validate(table["spec"])
    measurements = {
        row["name"]: Measurement(
            row["name"],
            row["sha256"],
            row["runtime"],
            tuple(block_from_table(b) for b in row["processes"]),
            spec.paced_ms,
            str(row.get("protocol", "")),
        )
        for row in table["measurements"]
    }
    shapes = {name: [len(block.ns) for block in m.processes] for name, m in measurements.items()}
    if not shapes or any(rounds != next(iter(shapes.values())) or not rounds for rounds in shapes.values()):
        raise ValueError(f"its networks do not have the same processes and rounds: {shapes}")
    return Session(
        measurements=measurements,
        fingerprint=Fingerprint.from_table(table["fingerprint"]),
        preflight=Preflight.from_table(table["preflight"]),
        spec=spec,
        mode=table["mode"],
        seed=int(table["seed"]),
        order=tuple(tuple(tuple(names[i] for i in turn) for turn in process) for process in table["order"]),
        started=table["started"],
        ended=table["ended"],
        lease_owner=table["lease_owner"],
        protocol=table["protocol"],
        agent_sha256=table["agent_sha256"],
        telemetry={str(key): float(value) for key, value in table["telemetry"].items()},
    )
