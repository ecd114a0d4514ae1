"""The nouns of a check as plain, strict JSON and back, exactly: what is read equals what was written.

JSON has no infinity: numbers that are not finite are written as the strings "inf", "-inf" and "nan".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.nouns import Change, CheckRecord, DeviceChange, LayerMove, Ledger, Pin
from profiles.errors import DeployError
from profiles.schema import CheckSpec
from targets.harness.compare import Control, Stage, Tail, Verdict
from targets.harness.measurement import Interval

VERSION = 1
Table = Mapping[str, Any]


def to_table(record: CheckRecord) -> dict[str, Any]:
    """Every field of a record as plain data, strict JSON."""
    table: dict[str, Any] = _plain(
        {
            "version": VERSION,
            "started": record.started,
            "profile": record.profile,
            "device": record.device,
            "baseline": asdict(record.baseline),
            "candidate": asdict(record.candidate),
            "verdict": asdict(record.verdict),
            "absolute": record.absolute,
            "changed": record.changed,
            "conditions": record.conditions,
            "layers": [asdict(layer) for layer in record.layers],
            "ledger": asdict(record.ledger),
            "changes": [asdict(change) for change in record.changes],
            "spec": record.spec.model_dump(mode="json"),
            "protocol": record.protocol,
            "seconds": record.seconds,
            "machine": record.machine,
            "simulated": record.simulated,
            "moved": None if record.moved is None else asdict(record.moved),
        }
    )
    return table


def from_table(table: Table) -> CheckRecord:
    """Inverse of `to_table`. Raises DeployError for what is not a record of version 1."""
    try:
        if table["version"] != VERSION:
            raise DeployError(f"the check record has version {table['version']}, this tool reads version {VERSION}.")
        return CheckRecord(
            started=table["started"],
            profile=table["profile"],
            device=table["device"],
            baseline=pin_from_table(table["baseline"]),
            candidate=pin_from_table(table["candidate"]),
            verdict=_verdict(table["verdict"]),
            absolute={
                arm: {name: None if ms is None else float(ms) for name, ms in statistics.items()}
                for arm, statistics in table["absolute"].items()
            },
            changed=_fields(table["changed"]),
            conditions=tuple(table["conditions"]),
            layers=tuple(_layer(row) for row in table["layers"]),
            ledger=Ledger(**_numbers(table["ledger"], "widened")),
            changes=tuple(Change(**_numbers(row, "before_ms", "after_ms", "p_value")) for row in table["changes"]),
            spec=CheckSpec.model_validate(table["spec"]),
            protocol=table["protocol"],
            seconds=float(table["seconds"]),
            machine=table.get("machine", ""),
            simulated=table.get("simulated", False),
            moved=_moved(table.get("moved")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeployError(f"not a check record: {type(error).__name__} {error}.") from None


def pin_to_table(pin: Pin) -> dict[str, Any]:
    """A pin as plain data, strict JSON."""
    table: dict[str, Any] = _plain(asdict(pin))
    return table


def pin_from_table(table: Table) -> Pin:
    """Inverse of `pin_to_table`. Raises TypeError for other fields."""
    ports = {name: tuple((port, tuple(shape)) for port, shape in table.get(name, ())) for name in ("inputs", "outputs")}
    return Pin(**{**table, **ports})


def control_to_table(control: Control) -> dict[str, Any]:
    """A control arm as plain data, strict JSON."""
    table: dict[str, Any] = _plain(control.to_table())
    return table


def control_from_table(table: Table) -> Control:
    """Inverse of `control_to_table`; strings stand for what is not finite. Raises TypeError for other fields."""
    return Control.from_table({name: float(v) if isinstance(v, str) else v for name, v in table.items()})


def _verdict(table: Table) -> Verdict:
    return Verdict(table["outcome"], table["reason"], tuple(_stage(row) for row in table["stages"]))


def _stage(table: Table) -> Stage:
    intervals = {name: _interval(table[name]) for name in ("ratio", "low", "control")}
    tails = tuple(Tail(**{"shared": False, **row, "interval": _interval(row["interval"])}) for row in table["tails"])
    again = None if table["again"] is None else control_from_table(table["again"])
    return Stage(**{**_numbers(table, "detectable", "seconds"), **intervals, "tails": tails, "again": again})


def _interval(table: Table) -> Interval:
    return Interval(**_numbers(table, "center", "low", "high", "sd"))


def _layer(table: Table) -> LayerMove:
    return LayerMove(**_numbers(table, "baseline_ms", "candidate_ms"))


def _moved(table: Table | None) -> DeviceChange | None:
    if table is None:
        return None
    own = {**table, "fields": _fields(table["fields"]), "nights": tuple(table["nights"])}
    return DeviceChange(**_numbers(own, "after_ms"))


def _fields(table: Table) -> dict[str, tuple[Any, Any]]:
    """What a device told then and now, by the fingerprint's fields."""
    return {name: (_frozen(then), _frozen(now)) for name, (then, now) in table.items()}


def _numbers(table: Table, *names: str) -> dict[str, Any]:
    """The table with these entries as floats, infinities included."""
    return {**table, **{name: float(table[name]) for name in names}}


def _plain(value: Any) -> Any:
    """Plain JSON data: tuples as lists, numpy's numbers as Python's, infinities as strings."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _frozen(value: Any) -> Any:
    """A value of a fingerprint: what JSON made a list is a tuple there."""
    return tuple(_frozen(entry) for entry in value) if isinstance(value, list) else value
