"""What a report is made of: one frozen record that the flow fills and that the text, JSON and HTML forms read.

Times are milliseconds, intervals are (lower, upper) at 99 %, `latency_ratio` is measured / dense in one interleaved
session, accuracies are in the metric's own unit (higher is better). None means: was not measured; it is shown as such.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from pipeline.nouns import BUILT

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figures:
    """The numbers of one network, dense or pruned, in the order of the closing table.

    predicted_ms: what the latency table says. measured_ms: at the budget's percentile, with its interval.
    """

    accuracy: float | None
    parameters: int
    macs: int
    predicted_ms: float | None = None
    measured_ms: float | None = None
    interval_ms: Interval | None = None


@dataclass(frozen=True)
class Agreement:
    """How far the outputs of the pruned network are those of the dense one, where no metric judged them. No accuracy.

    r2: 1 - squared error / variance of the dense outputs. argmax: share of samples whose largest logit is the same one,
    and constant: the share that always answering the dense network's most frequent class reaches; both None where the
    outputs are no logits. on: `noise` or `calibration samples`.
    """

    r2: float
    argmax: float | None
    constant: float | None
    samples: int
    on: str


@dataclass(frozen=True)
class GroupRow:
    """One channel group. stage: heading that it is listed under, e.g. `layer2`. frozen: why it was not offered.

    dropped: it went with a removed block; then kept is 0.
    """

    name: str
    dense: int
    kept: int
    stage: str = ""
    frozen: str | None = None
    dropped: bool = False


@dataclass(frozen=True)
class BlockRow:
    """A residual block: removed or not, or why it was not offered."""

    name: str
    removed: bool
    frozen: str | None = None


@dataclass(frozen=True)
class SiteRow:
    """A row of the latency table: where the milliseconds are, before and after. pruned_ms 0: removed with its block."""

    name: str
    kind: str
    dense_ms: float
    pruned_ms: float


@dataclass(frozen=True)
class RoundRow:
    """One turn of the loop. correction: factor on the table that this round's prediction used. said: what followed."""

    number: int
    predicted_ms: float
    spread_ms: float
    measured_ms: float | None
    interval_ms: Interval | None = None
    correction: float = 1.0
    loss: float | None = None
    said: str = ""


@dataclass(frozen=True)
class PointRow:
    """A network that was tried: its latency and its quality. shipped: this one is in the bundle.

    accuracy: by `evaluate`, where it was asked. loss: on the calibration samples, where only that is known.
    """

    label: str
    latency_ms: float
    accuracy: float | None = None
    loss: float | None = None
    shipped: bool = False


@dataclass(frozen=True)
class Distribution:
    """Latencies of one network in the accepting session.

    percentiles: `p50`, `mean`, `p90`, `p99` -> ms, None where samples were too few. upper: their 99 % upper bounds.
    samples_ms: raw samples, thinned for the plot. count: how many there were before thinning.
    """

    name: str
    percentiles: Mapping[str, float | None]
    upper: Mapping[str, float | None] = field(default_factory=dict)
    samples_ms: tuple[float, ...] = ()
    count: int = 0


@dataclass(frozen=True)
class RepairRow:
    """A way of repairing the cut network without training, and the calibration loss and accuracy after it."""

    name: str
    loss: float
    accuracy: float | None = None
    seconds: float = 0.0
    chosen: bool = False


@dataclass(frozen=True)
class PassRow:
    """A graph pass or candidate: how many nodes it changed, and what it refused with the reasons."""

    name: str
    changed: int
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class CandidateRow:
    """A rewrite that was measured beside the network without it. taken: the ratio's upper bound showed it faster.

    node: what it rewrites; several where they were measured together.
    """

    name: str
    node: str
    before_ms: float
    after_ms: float
    ratio: float
    interval: Interval
    taken: bool


@dataclass(frozen=True)
class StageRow:
    """A finished stage of the run."""

    name: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows. Only the first block has to be given; an empty part is left out of the page.

    network: the factory, as the project file names it. budget: as asked, `0.5x@p90`; budget_ms: in this session,
    None where it is a share of what too few samples could give.
    verdict: `met`, `missed`, `accuracy missed`, `undecided` or `built, not measured`, with the sentence that explains
    it in `reason`.
    ratio, ratio_interval: measured / dense of the accepting session; process_ratios: one a fresh process.
    conditions: device fingerprint and what was found before measuring, by label. leaves: (module, why channels stay).
    notes: what a release engineer should know, one sentence each. bundle: path of the bundle or of the rejected point.
    unjudged: why the accuracy was not judged, empty where it was; `agreement` is then what is known instead.
    loss_name: what `loss` is everywhere in it, `calibration loss` or `loss on noise`.
    """

    network: str
    target: str
    budget: str
    budget_ms: float | None
    verdict: str
    dense: Figures
    pruned: Figures
    metric: str = "accuracy"
    reason: str = ""
    run: str = ""
    bundle: str | None = None
    percentile: str = "p50"
    max_drop: float | None = None
    unjudged: str = ""
    agreement: Agreement | None = None
    loss_name: str = "calibration loss"
    ratio: float | None = None
    ratio_interval: Interval | None = None
    process_ratios: tuple[float, ...] = ()
    seconds: float = 0.0

    groups: tuple[GroupRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    leaves: tuple[tuple[str, str], ...] = ()
    sites: tuple[SiteRow, ...] = ()
    rounds: tuple[RoundRow, ...] = ()
    points: tuple[PointRow, ...] = ()
    distributions: tuple[Distribution, ...] = ()
    repairs: tuple[RepairRow, ...] = ()
    passes: tuple[PassRow, ...] = ()
    candidates: tuple[CandidateRow, ...] = ()
    stages: tuple[StageRow, ...] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def timeless(self) -> ReportData:
        """The same without what differs between an undisturbed run and one that was killed and resumed.

        Without its seconds, its stages and the folders that it was made in.
        """
        repairs = tuple(replace(row, seconds=0.0) for row in self.repairs)
        return replace(self, seconds=0.0, stages=(), repairs=repairs, run="", bundle=None)

    def to_json(self) -> str:
        """Text from which `from_json` makes an equal record."""
        return json.dumps(_writable(asdict(self)), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ReportData:
        """Inverse of `to_json`. Raises ValueError for what is no such record."""
        try:
            return typing.cast(ReportData, _read(cls, json.loads(text)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the data of a report: {error}") from None


def summary(data: ReportData) -> dict[str, Any]:
    """The one JSON object that `deploy build --json` prints."""
    return {
        "bundle": data.bundle if data.verdict == "met" else None,
        "rejected": None if data.verdict in ("met", BUILT) else data.bundle,
        "built": data.bundle if data.verdict == BUILT else None,
        "verdict": data.verdict,
        "budget": data.budget,
        "budget_ms": data.budget_ms,
        "dense_ms": data.dense.measured_ms,
        "measured_ms": data.pruned.measured_ms,
        "measured_ms_interval": _finite(data.pruned.interval_ms),
        "latency_ratio": data.ratio,
        "latency_ratio_interval": _finite(data.ratio_interval),
        "percentile": data.percentile,
        "accuracy_dense": data.dense.accuracy,
        "accuracy": data.pruned.accuracy,
        "accuracy_judged": not data.unjudged,
        "agreement": asdict(data.agreement) if data.agreement else None,
        "parameters_dense": data.dense.parameters,
        "parameters": data.pruned.parameters,
        "macs_dense": data.dense.macs,
        "macs": data.pruned.macs,
        "rounds": len({row.number for row in data.rounds}),
        "seconds": round(data.seconds, 1),
        "run": data.run,
    }


def _writable(value: Any) -> Any:
    """The same with infinity, which JSON has not, as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _writable(item) for name, item in value.items()}
    return [_writable(item) for item in value] if isinstance(value, list | tuple) else value


def _finite(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [bound if math.isfinite(bound) else None for bound in interval]


def _read(kind: Any, value: Any) -> Any:
    """Rebuild a value of an annotated type from plain JSON."""
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - {f.name for f in fields(kind)}
        if unknown:
            raise ValueError(f"not the data of a report: unknown field '{min(unknown)}'")
        return kind(**{name: _read(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(next(arm for arm in inner if arm is not type(None)), value)
    if origin is tuple:
        each = inner[:1] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else inner
        return tuple(_read(arm, item) for arm, item in zip(each, value, strict=True))
    return float(value) if kind is float else value
