"""Nights on a simulated device whose truth is known: three arms in turn, thousands of nights as one array.

A sample is the exponential of: log of the arm's truth, what the machine does to all arms, what it does to the end of
this block alone, the layout of the process, noise that only adds. Shared by the arms: a random walk over rounds, a
clock that drops once and stays, a tenant that comes and goes. What a pair does not cancel: the scatter between
neighbouring blocks, Student's t with 3 degrees of freedom, so that some are far out, and blocks in which the tenant
arrives or leaves. "quiet" and "busy" scatter about as measurement.md, section 2 found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from profiles.schema import CheckSpec, MeasureSpec
from targets.harness.compare import (
    AGAIN,
    BASELINE,
    CANDIDATE,
    Control,
    Stage,
    Verdict,
    confirm,
    detectable,
    screen,
    unlike,
)
from targets.harness.device import Condition, Fingerprint, Preflight
from targets.harness.measurement import Blocks, Measurement, Session, Warmup, log_interval

ARMS = (BASELINE, AGAIN, CANDIDATE)
SPEC = CheckSpec()
TIMED = 10
Samples = dict[str, NDArray[np.float32]]

PRINT = Fingerprint(
    machine="simulated", cpu="cpu", cpu_flags="", cores=2, cpu_quota=None, kernel="", memory_mib=0, power="",
    clocks="hidden", runtime="simulated", runtime_version="1", runtime_build="", python="", providers=(), threads=1,
    spin=False, simulated=True,
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """The truth. noise, block, layout, drift: standard deviations of logarithms.

    noise: of an inference (its upper half); block: between neighbouring blocks; layout: of a process; drift: of one
    step of the walk; throttle: factor of the clock's drop; tenant: factor while it is there; rounds: how long it stays;
    tail: (share of inferences, factor) of hiccups that fall on all arms alike.
    """

    noise: float = 0.06
    block: float = 0.035
    layout: float = 0.001
    drift: float = 0.01
    throttle: float = 1.0
    tenant: float = 1.0
    rounds: int = 7
    tail: tuple[float, float] = (0.004, 3.0)


QUIET = Device(noise=0.04, block=0.015)
BUSY = Device(noise=0.06, block=0.055, layout=0.0015)
DEVICES: Mapping[str, Device] = {
    "quiet": QUIET,
    "busy": BUSY,
    "drifting": Device(drift=0.05),
    "heavy tails": Device(tail=(0.03, 8.0)),
    "throttling": Device(throttle=1.6),
    "alternating tenants": Device(tenant=1.4),
}


def draw(rng: np.random.Generator, device: Device, nights: int, processes: int, slower: float = 0.0) -> Samples:
    """Nanoseconds of every arm, shape (nights, processes, rounds, timed); the candidate's truth is 1 + slower."""
    rounds = SPEC.rounds
    shape = (nights, processes, rounds)
    shared = np.cumsum(rng.normal(0.0, device.drift, shape), axis=2)
    when = rng.integers(1, 2 * rounds, shape[:2])[:, :, None]
    shared += np.log(device.throttle) * (np.arange(rounds) >= when)
    phase = rng.integers(0, 2 * device.rounds, shape[:2])[:, :, None]
    there = (np.arange(rounds) + phase) // device.rounds % 2 == 1
    arrives = np.diff(there, axis=2, prepend=there[:, :, :1])
    samples = {}
    for arm in ARMS:
        block = device.block / np.sqrt(3.0) * rng.standard_t(3, shape)
        present = np.where(arrives, rng.random(shape), there)
        layout = rng.normal(0.0, device.layout, shape[:2])[:, :, None]
        level = shared + layout + np.log(device.tenant) * present
        level += np.log1p(slower) if arm == CANDIDATE else 0.0
        ns = rng.standard_normal((*shape, TIMED), dtype=np.float32)
        np.abs(ns, out=ns)
        ns *= np.float32(device.noise)
        ns += level[..., None].astype(np.float32)
        hit = np.arange(TIMED) >= rng.integers(1, TIMED - 3, shape, dtype=np.int8)[..., None]
        ns += hit * block[..., None].astype(np.float32)
        np.exp(ns, out=ns)
        share, factor = device.tail
        ns[rng.random(ns.shape, dtype=np.float32) < share] *= np.float32(factor)
        samples[arm] = ns * np.float32(8e5)
    return samples


def logs(samples: Samples, a: str, b: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """e of the block medians and of the blocks' 10th percentiles, each of shape (nights, processes)."""
    each = []
    for place in (0.5, 0.1):
        first, second = (_quantile(samples[arm], place) for arm in (a, b))
        each.append(np.median(np.log(first / second), axis=2).astype(np.float64))
    return each[0], each[1]


def _quantile(ns: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """np.quantile over the last axis, by one sort."""
    ordered = np.sort(ns, axis=-1)
    at = share * (ns.shape[-1] - 1)
    below, part = int(at), np.float32(at - int(at))
    return ordered[..., below] * (1 - part) + ordered[..., min(below + 1, ns.shape[-1] - 1)] * part


def stages(samples: Samples, number: int, spec: CheckSpec = SPEC) -> list[Stage]:
    """A stage a night, by the rules of `compare.stage` but for the tails, which cost a bootstrap each."""
    moved = logs(samples, CANDIDATE, BASELINE)
    still = logs(samples, AGAIN, BASELINE)
    told = []
    for night in range(len(moved[0])):
        ratio, low, control, control_low = (log_interval(e[night]) for e in (*moved, *still))
        bounds = np.log([control.center, control.low, control.high])
        lows = np.log([control_low.center, control_low.low, control_low.high])
        again = Control(*map(float, bounds), *map(float, lows), None, None, control.n, number)
        seen = detectable(ratio, control, spec)
        told.append(Stage(number, ratio, low, control, (), seen, unlike(control, spec), 20.0, again))
    return told


def check(
    rng: np.random.Generator, device: Device, nights: int, slower: float = 0.0, spec: CheckSpec = SPEC
) -> list[Verdict]:
    """The whole check of many nights: stage 1, one retry where it is spoilt, stage 2 where it is needed."""
    first = stages(draw(rng, device, nights, spec.screen_processes, slower), 1, spec)
    first = _again(first, rng, device, spec.screen_processes, slower, spec)
    verdicts: list[Verdict | None] = [screen(each, spec) for each in first]
    open_nights = [night for night, verdict in enumerate(verdicts) if verdict is None]
    second = stages(draw(rng, device, len(open_nights), spec.confirm_processes, slower), 2, spec)
    second = _again(second, rng, device, spec.confirm_processes, slower, spec)
    for night, each in zip(open_nights, second, strict=True):
        verdicts[night] = confirm(first[night], each, spec)
    return [verdict for verdict in verdicts if verdict is not None]


def _again(
    told: list[Stage], rng: np.random.Generator, device: Device, processes: int, slower: float, spec: CheckSpec
) -> list[Stage]:
    """The stages with the spoilt ones measured again, once."""
    spoilt = [night for night, each in enumerate(told) if each.spoilt]
    retried = stages(draw(rng, device, len(spoilt), processes, slower), told[0].number, spec) if spoilt else []
    fresh = dict(zip(spoilt, retried, strict=True))
    return [fresh.get(night, each) for night, each in enumerate(told)]


def session(samples: Samples, night: int = 0, seed: int = 7) -> Session:
    """One night's session as it would be measured, with every raw sample."""
    measured = {
        arm: Measurement(
            arm,
            "bb" * 32 if arm == CANDIDATE else "aa" * 32,
            "simulated 1",
            tuple(_blocks(ns) for ns in samples[arm][night].astype(np.int64)),
        )
        for arm in ARMS
    }
    count, rounds = samples[BASELINE].shape[1:3]
    return Session(
        measured, PRINT, Preflight((Condition("device", "simulated", True),)), MeasureSpec(), "accept", seed,
        tuple(tuple(ARMS for _ in range(rounds)) for _ in range(count)),
        "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:30+00:00", "nobody", "simulated accept", "ab" * 32,
    )  # fmt: skip


def changed(session: Session, arm: str, **fields: object) -> Session:
    """The session with fields of every process of one arm replaced: flags, quota stops, warm-ups, misses."""
    old = session.measurements[arm]
    parts = tuple(replace(block, **fields) for block in old.processes)  # type: ignore[arg-type]
    return replace(session, measurements={**session.measurements, arm: replace(old, processes=parts)})


def first_rounds(session: Session, count: int) -> Session:
    """The session with the first rounds of every process alone."""
    measured = {
        name: replace(m, processes=tuple(_blocks(block.ns[:count]) for block in m.processes))
        for name, m in session.measurements.items()
    }
    return replace(session, measurements=measured)


def _blocks(ns: NDArray[np.int64]) -> Blocks:
    zeros = np.zeros(len(ns), np.int64)
    return Blocks(ns, zeros.astype(bool), zeros, zeros, Warmup(50, 0.25, (800_000, 801_000), True))
