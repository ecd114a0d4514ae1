"""Times of small models from the store, and from the target for those that it does not hold yet.

Every time is a ratio to `reference.reference()`, taken interleaved with it; the same bytes are never measured twice on
one device. PROTOCOL names how: it changes whenever a number taken before could differ from one taken after.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.latency.reference import reference
from pipeline.latency.store import Store
from profiles.errors import UndecidedError
from targets.base import Target

SESSIONS, ROUNDS = 3, 4
"""Sessions of every model and rounds. Where a session's memory lies moves a small model by 2 to 3 per cent in every
round alike, so sessions mend what rounds do not; rounds mend what the machine does meanwhile."""
PROTOCOL = f"rows/3 {SESSIONS}x{ROUNDS}"
PROCESS_MODELS = 240
log = logging.getLogger(__name__)
Progress = Callable[[float], None]


@dataclass
class Tally:
    """How many rows a table took from the store and how many it measured."""

    reused: int = 0
    measured: int = 0


class Clock:
    """Times models on one target, through a store."""

    def __init__(self, target: Target, store: Store, progress: Progress | None = None) -> None:
        self.target = target
        self.store = store
        self.device = target.fingerprint().digest()
        self.progress = progress
        self.tally = Tally()

    def ratios(self, models: Mapping[str, bytes]) -> dict[str, float]:
        """Key -> time / reference time. Keys of new models are what `key` gives, so equal models are measured once."""
        known = self.store.rows(self.device, PROTOCOL, list(models))
        missing = [name for name in models if name not in known]
        self.tally.reused += len(known)
        self.tally.measured += len(missing)
        for start in range(0, len(missing), PROCESS_MODELS):
            batch = {name: models[name] for name in missing[start : start + PROCESS_MODELS]}
            self._measure(batch, self._part(start / len(missing), len(batch) / len(missing)))
        rows = self.store.rows(self.device, PROTOCOL, list(models))
        return {name: rows[name].ratio for name in models}

    def _part(self, done: float, share: float) -> Progress | None:
        """Tells of the progress of one batch as that of all."""
        whole = self.progress
        return (lambda part: whole(done + share * part)) if whole else None

    def _measure(self, models: Mapping[str, bytes], progress: Progress | None) -> None:
        with tempfile.TemporaryDirectory(prefix="rows-", dir=self.target.state) as name:
            folder = Path(name)
            base = folder / "reference.onnx"
            base.write_bytes(reference())
            paths = []
            for index, model in enumerate(models.values()):
                paths.append(folder / f"row-{index}.onnx")
                paths[-1].write_bytes(model)
            times = self.target.rows(paths * SESSIONS, base, ROUNDS, progress)
        for why in dict.fromkeys(times.again):
            log.warning("rows were measured again: %s.", why)
        if progress:
            progress(1.0)
        ms = times.ms.reshape(SESSIONS, len(models), ROUNDS)
        for group, reference_ms in enumerate(times.reference_ms):
            taken = {name: ms[:, index] for index, name in enumerate(models) if times.group[index] == group}
            self.store.add_rows(self.device, PROTOCOL, reference_ms, taken)

    def reference_ms(self) -> float:
        """Milliseconds of the reference on this device: the scale of every ratio."""
        value = self.store.reference_ms(self.device, PROTOCOL)
        if value is None:
            raise UndecidedError("no row was ever measured on this device.", "deploy gc, then build again.")
        return value


def key(model: bytes) -> str:
    """SHA-256 of a model's bytes, in hex."""
    return hashlib.sha256(model).hexdigest()
