"""Sessions and checks made of numbers, for the tests of reports: drift, slow processes and rare long inferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.nouns import Change, CheckRecord, LayerMove, Ledger, Pin
from profiles.schema import CheckSpec, MeasureSpec
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE, Stage, Tail, Verdict
from targets.harness.device import Condition, Fingerprint, Preflight
from targets.harness.measurement import Blocks, Interval, Measurement, Session, Warmup

PRINT = Fingerprint(
    "board", "a processor", "f" * 64, 2, None, "Linux 6.1", 1024, "", "hidden", "onnxruntime", "1.31.1", "b" * 64,
    "3.11", ("CPUExecutionProvider",), 1, False,
)  # fmt: skip
BUSY = Condition("load", "1.90 on 2 cores", False, "absolute times may be high", "wait.")


def blocks(
    rng: np.random.Generator, ms: float, start_s: float, rounds: int, timed: int, tail: float, paced_ms: float | None
) -> Blocks:
    """A process's blocks of a network that takes `ms`; tail: share of inferences that something makes longer."""
    drift = 1.0 + 0.06 * np.sin(np.linspace(0, 6, rounds))[:, None] + 0.02 * rng.standard_normal((rounds, 1))
    own = ms * drift * (1.0 + 0.01 * np.abs(rng.standard_normal((rounds, timed))))
    own = own * np.where(rng.random(own.shape) < tail, 1.0 + rng.pareto(1.6, own.shape), 1.0)
    ns = np.rint(1e6 * own).astype(np.int64)
    flagged = rng.random(rounds) < 0.03
    late = (ns > 1e6 * paced_ms).sum(axis=1) if paced_ms else np.zeros(rounds, np.int64)
    starts = np.rint(1e9 * (start_s + 0.05 * np.arange(rounds))).astype(np.int64)
    none = np.zeros(rounds, np.int64)
    return Blocks(ns, flagged, none, none, Warmup(50, 0.4, (800_000, 801_000), True), late, starts)


def session(
    networks: Mapping[str, float],
    *,
    processes: int = 8,
    rounds: int = 60,
    timed: int = 10,
    tail: float = 0.004,
    seed: int = 0,
    paced_ms: float | None = None,
    conditions: Sequence[Condition] = (BUSY,),
) -> Session:
    """Networks by name with their milliseconds, measured in turn."""
    rng = np.random.default_rng(seed)
    own: dict[str, list[Blocks]] = {name: [] for name in networks}
    for process in range(processes):
        for index, (name, ms) in enumerate(networks.items()):
            layout = np.exp(0.003 * rng.standard_normal())
            began = 4.0 * process + 0.012 * index
            own[name].append(blocks(rng, ms * layout, began, rounds, timed, tail, paced_ms))
    measured = {
        name: Measurement(name, f"{index:x}" * 64, "onnxruntime 1.31.1", tuple(each), paced_ms)
        for index, (name, each) in enumerate(own.items())
    }
    order = tuple(tuple(tuple(networks) for _ in range(rounds)) for _ in range(processes))
    return Session(
        measured, PRINT, Preflight(tuple(conditions)), MeasureSpec(paced_ms=paced_ms), "accept", seed, order,
        "2026-11-21T03:00:00+00:00", "2026-11-21T03:00:32+00:00", "nightly", "2", "a" * 64, {"throttle_events": 0.0},
    )  # fmt: skip


def arms(slower: float, **how: Any) -> Session:
    """The three arms of a check whose candidate is slower by this share."""
    return session({BASELINE: 0.81, AGAIN: 0.81, CANDIDATE: 0.81 * (1 + slower)}, **how)


def stage(own: Session, number: int, spoilt: str = "") -> Stage:
    """What the check would say of a session, tails aside."""
    ratio = own.ratio(CANDIDATE, BASELINE)
    tails = (Tail("mean", Interval(1.031, 1.012, 1.052, 0.01, ratio.n), False),
             Tail("p99", Interval(1.36, 1.28, 1.45, 0.02, ratio.n), True))  # fmt: skip
    low = replace(ratio, center=ratio.center * 0.999)
    return Stage(number, ratio, low, own.ratio(AGAIN, BASELINE), tails, 0.0113, spoilt, 27.3)


def layers(count: int = 41, moved: Mapping[int, float] | None = None) -> tuple[LayerMove, ...]:
    """Layers of a network of which some take longer, by position in ms."""
    moved = {7: 0.0214, 8: 0.0030, 20: -0.0011} if moved is None else moved
    return tuple(
        LayerMove(f"/layer{i // 6}/{i % 6}/Conv", "Conv", 0.018, 0.018 + moved.get(i, 0.00001 * (i % 3)))
        for i in range(count)
    )


def record(outcome: str = "pass", stages: Sequence[Stage] = (), **fields: Any) -> CheckRecord:
    """A finished check with everything in it that a report can show, save what `fields` replaces."""
    reason = "latency +3.02 % (bounds +2.61 to +3.43 %), beyond 2.0%."
    whole = CheckRecord(
        started="2026-11-21T03:00:00+00:00",
        profile="local",
        device="d" * 64,
        baseline=Pin("resnet20", "1" * 64, "runs/2026-11-01-local", "0.5x", "2026-11-01T09:00:00+00:00"),
        candidate=Pin("resnet20-tonight", "2" * 64, "runs/2026-11-21-local"),
        verdict=Verdict(outcome, reason, tuple(stages)),  # type: ignore[arg-type]
        absolute={
            BASELINE: {"p50": 0.812, "mean": 0.84, "p99": 1.21},
            AGAIN: {"p50": 0.813, "mean": 0.84, "p99": 1.22},
            CANDIDATE: {"p50": 0.837, "mean": 0.87, "p99": None},
        },
        changed={"runtime_version": ("1.31.1", "1.32.0"), "power": ("", "MAXN")},
        conditions=("load is 1.90 on 2 cores",),
        layers=layers() if outcome == "fail" else (),
        ledger=Ledger(412, 5, 1.25),
        changes=(Change("2026-11-18T03:00:00+00:00", "baseline p50", 0.811, 0.905, 0.00002),),
        spec=CheckSpec(),
        protocol="2",
        seconds=81.4,
    )
    return replace(whole, **fields)
