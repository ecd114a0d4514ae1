"""The manifest of a bundle: what is in it, where it came from, and the numbers under which it was released.

Frozen pydantic types; an unknown key, a hash that is none or a name that is a path is refused when it is read.
Times are milliseconds, intervals (lower, upper) are one-sided 99 % bounds.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from profiles.schema import Budget, Precision, Spec
from targets.harness.measurement import Session

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Names of files in a bundle: one plain part, so that no name can lead out of its folder."""

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Bounds = tuple[float, float | None]


class FileEntry(Spec):
    """A file of the bundle."""

    sha256: Sha256
    bytes: int = Field(ge=0)


class Link(Spec):
    """One stage that led here: its key and the hashes of what it made."""

    stage: str
    key: Sha256
    outputs: dict[str, Sha256] = Field(default_factory=dict)


class TensorSpec(Spec):
    """An input or output of the network. shape: -1 for any size. layout: `NCHW`, `NC`, …; normalisation: in words."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    normalisation: str = ""


class Latency(Spec):
    """The accepting measurement. network, reference: names in measurement.json. interval: of `measured_ms`.

    What too few samples can neither give nor bound is None, which no accepted network has.
    """

    budget: str
    percentile: Literal["p50", "mean", "p90", "p99"]
    budget_ms: float | None = Field(gt=0)
    dense_ms: float | None = Field(gt=0)
    measured_ms: float | None = Field(gt=0)
    interval_ms: Bounds
    ratio: float = Field(gt=0)
    ratio_interval: Bounds
    network: str
    reference: str


def latency_of(session: Session, budget: Budget, network: str, reference: str) -> Latency:
    """What a session's raw samples say of a network. Raises UsageError for a name that is not in it."""
    at = budget.percentile
    measured, dense = (session.measurement(name).statistic(at) for name in (network, reference))
    ratio = session.ratio(network, reference, at)
    share = None if dense.value_ms is None else float(budget.ratio or 0.0) * dense.value_ms
    return Latency(
        budget=str(budget), percentile=at, budget_ms=share if budget.limit_ms is None else budget.limit_ms,
        dense_ms=dense.value_ms, measured_ms=measured.value_ms, interval_ms=_bounds(measured.low_ms, measured.high_ms),
        ratio=ratio.center, ratio_interval=_bounds(ratio.low, ratio.high), network=network, reference=reference,
    )  # fmt: skip


def _bounds(low: float, high: float) -> Bounds:
    return low, high if math.isfinite(high) else None


class Agreement(Spec):
    """How far the outputs of both networks agree, which is no accuracy.

    r2: 1 - squared error / variance of the dense outputs. argmax: share of samples with the same largest logit, and
    constant: that of always answering the dense network's most frequent class. on: `noise` or `calibration samples`.
    """

    r2: float
    argmax: float | None
    constant: float | None
    samples: int = Field(ge=1)
    on: str


class Accuracy(Spec):
    """The project's own metric, higher is better, before and after.

    Both are None where no metric judged the networks; then `unjudged` says why and `agreement` what is known instead.
    """

    metric: str
    dense: float | None
    pruned: float | None
    max_drop: float = Field(ge=0)
    unjudged: str = ""
    agreement: Agreement | None = None

    @model_validator(mode="after")
    def _judged_or_said(self) -> Accuracy:
        if (self.dense is None, self.pruned is None) != (bool(self.unjudged),) * 2:
            raise ValueError("dense and pruned are numbers, or null with the reason in unjudged")
        return self


class Sample(Spec):
    """How closely the sample's output must be reproduced: |difference| <= atol + rtol x |expected|."""

    rtol: float = Field(default=1e-3, ge=0, lt=1)
    atol: float = Field(default=1e-4, ge=0)


class Manifest(Spec):
    """manifest.json. sources: name -> hash of what the user gave (weights, project file, …). device: fingerprint.

    precision: of model.onnx, where any of it is in half; None in bundles of versions that did not tell it. latency:
    None where nothing was measured; then `unmeasured` says why.
    """

    version: Literal[1] = 1
    tool: str
    network: str
    target: str
    runtime: str
    precision: Precision | None = None
    encoder: str
    files: dict[str, FileEntry]
    sources: dict[str, Sha256]
    chain: tuple[Link, ...]
    versions: dict[str, str]
    device: dict[str, Any]
    device_sha256: Sha256
    latency: Latency | None
    unmeasured: str = ""
    accuracy: Accuracy
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    sample: Sample = Sample()

    @model_validator(mode="after")
    def _measured_or_said(self) -> Manifest:
        if (self.latency is None) != bool(self.unmeasured):
            raise ValueError("latency is a table, or null with the reason in unmeasured")
        return self

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not NAME.fullmatch(name) or name == "manifest.json":
                raise ValueError(f"{name!r} is not the name of a file beside the manifest")
        return files
