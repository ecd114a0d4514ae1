"""Who the device is (`Fingerprint`) and what state it is in before a measurement (`Preflight`).

A fingerprint holds nothing that moves between two runs on the same machine; whatever moves is a `Condition` of the
preflight. Both are made from the plain tables that the agent's `facts` and `state` print on the device, so
that a board and the machine at hand are described by the same lines. measurement.md, section 3, rules 2, 8 and 9.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from profiles.errors import UndecidedError
from profiles.schema import MeasureSpec
from targets.harness.agent.board import machine

FREE_DISK_MIB = 256
FREE_MEMORY_MIB = 256
HOT_C = 85.0
STEAL_PERCENT = 2.0
GOVERNORS = frozenset({"", "performance", "userspace"})
"""Frequency governors that leave the clock alone; "" where the system shows none."""
HASH = 64
"""Letters of a SHA-256; values of a fingerprint as long as that are only named."""
Look = Callable[[Mapping[str, Any], Mapping[str, Any]], object]
"""Called with the facts of a device once it is leased, and with its state before a `drive`; what it raises ends the
job."""

LATER = frozenset({"serial", "board", "power_mode", "gpu", "libraries"})
"""Fields of a fingerprint that are part of it only where a device has them."""


@dataclass(frozen=True)
class Fingerprint:
    """What a latency depends on and what stays the same between runs on one machine.

    cpu_flags and runtime_build are SHA-256 hashes; cpu_quota: cores that a control group allows, or None; power: the
    frequency governor, "" where the system shows none; clocks: "locked", "floating" or "hidden". serial: of a board
    with a device tree, since two of one model differ in speed; elsewhere only root may read it. board and power_mode:
    of a Jetson, its module with the release of its system, and the mode by name. gpu: what engines run on, with the
    versions of CUDA and of the driver. libraries: TensorRT and cuDNN with version and hash, where ONNX Runtime runs on
    a GPU by them.
    """

    machine: str
    cpu: str
    cpu_flags: str
    cores: int
    cpu_quota: float | None
    kernel: str
    memory_mib: int
    power: str
    clocks: str
    runtime: str
    runtime_version: str
    runtime_build: str
    python: str
    providers: tuple[str, ...]
    threads: int
    spin: bool
    simulated: bool = False
    serial: str = ""
    board: str = ""
    power_mode: str = ""
    gpu: str = ""
    libraries: str = ""

    def digest(self) -> str:
        """SHA-256 of all fields, in hex: equal on the same machine, runtime and threading."""
        return hashlib.sha256(json.dumps(self.to_table(), sort_keys=True).encode()).hexdigest()

    def differs(self, other: Fingerprint) -> dict[str, tuple[Any, Any]]:
        """Field name -> (this value, the other's), for the fields that differ."""
        mine, theirs = asdict(self), asdict(other)
        return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}

    def changes(self, now: Fingerprint) -> str:
        """The fields that differ in a later one, in words, or "". Hashes say nothing to people."""
        told = []
        for name, values in self.differs(now).items():
            shown = [str(value) or "not shown" for value in values]
            both = "" if max(map(len, shown)) >= HASH else f" was {shown[0]}, is {shown[1]}"
            told.append(name.replace("_", " ") + both)
        return ", ".join(told)

    def to_table(self) -> dict[str, Any]:
        """Plain table for JSON."""
        table = asdict(self)
        table["providers"] = list(self.providers)
        return {key: value for key, value in table.items() if value or key not in LATER}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Fingerprint:
        """Inverse of `to_table`."""
        return cls(**{**table, "providers": tuple(table["providers"])})


@dataclass(frozen=True)
class Condition:
    """One thing that can spoil a measurement. value: as seen, with its unit; ok: whether it is as it should be.

    why: what it does to a number; mend: what the user can do. fatal: measuring makes no sense while it is not ok.
    """

    name: str
    value: str
    ok: bool
    why: str = ""
    mend: str = ""
    fatal: bool = False

    def undecided(self, profile: str) -> UndecidedError:
        """The error for what cannot be measured on a profile's device because of it."""
        return UndecidedError(f"nothing can be measured for '{profile}': {self.why}.", self.mend)


@dataclass(frozen=True)
class Preflight:
    """The state of the device just before a session, kept with its numbers."""

    conditions: tuple[Condition, ...]

    @property
    def spoilt(self) -> tuple[Condition, ...]:
        """Conditions that are not as they should be."""
        return tuple(c for c in self.conditions if not c.ok)

    def require(self) -> Preflight:
        """Itself, or an UndecidedError for the first condition that makes measuring meaningless."""
        for condition in self.conditions:
            if condition.fatal and not condition.ok:
                raise UndecidedError(
                    f"cannot measure: {condition.name} is {condition.value}; {condition.why}.", condition.mend
                )
        return self

    def to_table(self) -> list[dict[str, Any]]:
        """Plain table for JSON."""
        return [asdict(c) for c in self.conditions]

    @classmethod
    def from_table(cls, table: list[dict[str, Any]]) -> Preflight:
        """Inverse of `to_table`."""
        return cls(tuple(Condition(**row) for row in table))


def fingerprint(facts: Mapping[str, Any], providers: tuple[str, ...], spec: MeasureSpec) -> Fingerprint:
    """The fingerprint made of what `agent.facts` reads on the device and how inference is asked to run there."""
    kept = {name: facts[name] for name in Fingerprint.__dataclass_fields__ if name in facts}
    return Fingerprint(**kept, providers=providers, threads=spec.threads, spin=spec.spin)


def require_same(known: Fingerprint, seen: Fingerprint) -> None:
    """Raise UndecidedError where a device is no longer what it was when it was first looked at."""
    changed = known.changes(seen)
    if changed:
        hint = "set it back, or run it again: rows and engines are then made for the device as it is now."
        raise UndecidedError(f"the device has changed: {changed}.", hint)


def preflight(spec: MeasureSpec, state: Mapping[str, Any] | None = None, folder: Path | None = None) -> Preflight:
    """Look at the device before a session; nothing is changed on it and nothing is refused here (`Preflight.require`).

    state: what `agent.state` read on the device, the machine at hand if left out; folder: where results are written.
    Fatal are threads that spin against others, too few cores, too little memory or disk, a throttle counter that moves
    now, and a temperature above the one that the profile declares; the rest is advice and stays with the numbers.
    """
    seen = dict(machine.state(str(folder or Path.cwd()))) if state is None else dict(state)
    makers = (
        _busy, _processes, _load, _steal, _cores, _quota, _mode, _governor, _clocks, _heat, _throttle, _memory, _disk
    )  # fmt: skip
    return Preflight(tuple(c for maker in makers if (c := maker(seen, spec)) is not None))


def _busy(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    others = int(seen["runnable"])
    why = (
        "waiting threads that spin disturb each other: two equal networks then differ by 7.6 %"
        if spec.spin
        else ("they take the cores and the caches, so absolute times rise; ratios of one session stay true")
    )
    mend = (
        "set measure.spin = false, or stop what else runs there." if spec.spin else "stop what else runs on the device."
    )
    return Condition("runnable threads", f"{others} of others", others == 0, why, mend, fatal=spec.spin)


def _processes(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    """The busiest other processes by name: those that spin or compute while a measurement would run."""
    busy = list(seen.get("busy", ()))
    named = ", ".join(f"{p['command']} (process {p['pid']}) at {float(p['cores']):.2f} cores" for p in busy)
    why = "a process that computes or spins takes cores and caches for as long as it runs"
    mend = f"wait for it, or end it if it is yours: kill {busy[0]['pid']}." if busy else ""
    return Condition("busy processes", named or "none seen", not busy, why, mend)


def lease_condition(holder: str | None) -> Condition:
    """Whether the device is free. holder: who has it and until when, in words."""
    why = "one measurement at a time runs on a device, so the next one waits"
    mend = "wait until then, or end that process; its lease ends with it."
    return Condition("lease", "free" if holder is None else f"held by {holder}", holder is None, why, mend)


def providers_condition(asked: Sequence[str], there: Sequence[str]) -> Condition:
    """Whether the runtime on the device can run where the profile asks for."""
    lacking = [name for name in asked if name not in there]
    why, mend = "the runtime would run elsewhere than asked", f"set providers to some of {', '.join(there)}."
    return Condition("providers", ", ".join(asked), not lacking, why, mend, fatal=True)


def gpu_condition(facts: Mapping[str, Any], mend: str) -> Condition:
    """Whether there is a GPU that engines can run on. facts: what `agent.facts` reads where a runtime of engines is."""
    gpu = str(facts["gpu"])
    return Condition("gpu", gpu, gpu != "none", "engines are run and timed on it", mend, fatal=True)


def _load(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    load, cores = float(seen["load"]), int(seen["cores"])
    why = "the machine was busy in the last minute, so absolute times may be high"
    return Condition(
        "load", f"{load:.2f} on {cores} cores", load < 0.5 * cores, why, "wait, or stop what else runs there."
    )


def _steal(seen: dict[str, Any], spec: MeasureSpec) -> Condition | None:
    if seen.get("steal_percent") is None:
        return None
    steal = float(seen["steal_percent"])
    why = "the host of this virtual machine gives its cores to others"
    return Condition(
        "steal", f"{steal:.1f} %", steal < STEAL_PERCENT, why, "measure at a quieter time or on real hardware."
    )


def _cores(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    cores = int(seen["cores"])
    mend = f"set measure.threads = {cores} or lower."
    why = f"{spec.threads} threads on {cores} cores wait for each other"
    return Condition("cores", str(cores), spec.threads <= cores, why, mend, fatal=True)


def _quota(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    quota = seen.get("cpu_quota")
    value = "none" if quota is None else f"{float(quota):g} cores"
    why = "the control group stops the process in the middle of inferences: the median hides it, mean and p99 do not"
    return Condition("processor quota", value, quota is None, why, "lift the quota of the container or control group.")


def _mode(seen: dict[str, Any], spec: MeasureSpec) -> Condition | None:
    if "power_mode" not in seen:
        return None
    mode, others = str(seen["power_mode"]), ", ".join(seen.get("power_modes", ()))
    why = "which clocks and cores the board may use depends on it"
    mend = "look by hand with nvpmodel -q; numbers of different modes cannot be compared."
    value = f"{mode} of {others}" if mode and others else mode or "unknown"
    return Condition("power mode", value, bool(mode), why, mend)


def _governor(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    governor = str(seen["power"])
    why = "it lowers the clock between inferences, so times depend on what ran before"
    mend = "cpupower frequency-set -g performance, and restore it afterwards; or measure paced, as the robot runs."
    return Condition("governor", governor or "not shown by this system", governor in GOVERNORS, why, mend)


def _clocks(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    clocks = str(seen["clocks"])
    if clocks == "hidden":
        return Condition("clocks", "not shown by this system", True)
    rates = [int(khz) // 1000 for khz in seen.get("clocks_khz", ()) if khz]
    low, high = (min(rates), max(rates)) if rates else (0, 0)
    now = f", now {low} to {high} MHz" if high > low else f", now {high} MHz" if rates else ""
    if (gpu := dict(seen.get("gpu_khz") or {})).get("max"):
        now += f"; GPU {int(gpu['min']) // 1000} to {int(gpu['max']) // 1000} MHz"
    why = "the clock follows load and heat, so times move with what ran before"
    mend = "lock it (cpupower frequency-set with equal -d and -u, jetson_clocks), or accept floating clocks."
    return Condition("clocks", clocks + now, clocks == "locked", why, mend)


def _heat(seen: dict[str, Any], spec: MeasureSpec) -> Condition | None:
    zones, declared = dict(seen["temperatures"]), spec.start_below_c
    if not zones and declared is None:
        return None
    why = "a hot chip lowers its clock during the run"
    if declared is not None:
        why = f"a measurement starts below {declared:g} C (measure.start_below_c)"
    if not zones:
        mend = "leave measure.start_below_c out on this device."
        return Condition("temperature", "not shown by this system", False, why, mend, fatal=True)
    name, hottest = max(((zone, float(degrees)) for zone, degrees in zones.items()), key=lambda item: item[1])
    ok, value = hottest < (HOT_C if declared is None else declared), f"{hottest:.0f} C at {name}"
    return Condition(
        "temperature", value, ok, why, "let the device cool, or cool it better.", fatal=declared is not None
    )


def _throttle(seen: dict[str, Any], spec: MeasureSpec) -> Condition | None:
    counters = dict(seen["throttle"])
    if not counters:
        return None
    total = sum(int(count) for count in counters.values())
    moved = int(seen.get("throttle_moved", 0))
    value = f"{total}, of them {moved} just now" if moved else str(total)
    why = "the device has lowered its clock since it was started; a block in which a counter moves is rejected"
    if moved:
        why = "the device lowers its clock now, which voids a measurement"
    mend = "check cooling and power supply."
    return Condition("throttle events", value, total == 0 and not moved, why, mend, fatal=moved > 0)


def _memory(seen: dict[str, Any], spec: MeasureSpec) -> Condition | None:
    if seen.get("memory_free_mib") is None:
        return None
    free = int(seen["memory_free_mib"])
    why = f"{FREE_MEMORY_MIB} MiB are needed: a network may not fit, or the system may swap during the run"
    mend = "stop what holds memory on the device."
    return Condition("free memory", f"{free} MiB", free >= FREE_MEMORY_MIB, why, mend, fatal=True)


def _disk(seen: dict[str, Any], spec: MeasureSpec) -> Condition:
    free = int(seen["disk_free_mib"])
    why = f"{FREE_DISK_MIB} MiB are needed: raw samples that do not fit are lost"
    mend = f"free space where {seen['folder']} lies."
    return Condition("free disk", f"{free} MiB", free >= FREE_DISK_MIB, why, mend, fatal=True)
