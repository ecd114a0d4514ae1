"""Works one unit: the contestant's search, the recoveries, the finished files and what they are worth."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import builds
from benchmarks.frontier import dense, depgraph, fastnas, ours, scratch
from benchmarks.frontier.arena import Arena, Entry, NeverMet, Pace
from benchmarks.frontier.cells import DENSE, Store, Unit
from benchmarks.lines import Row
from pipeline.cache import file_hash
from pipeline.stage import tool_versions

TOOLS = ("edge-deploy", "torch", "numpy", "onnx", "onnxruntime", "torch-pruning", "nvidia-modelopt")


Enter = Callable[[Arena, Unit, Path, Path], Entry]
"""A unit's network before its recovery. The folders: of what it leaves behind, and of what only its search needs."""


def contest(unit: Unit, store: Store, pace: Pace, base: Path, enter: Enter, *, again: bool) -> None:
    """Work what a unit lacks and keep each cell as soon as it is there; what goes wrong is a result too."""
    begun, todo = time.monotonic(), store.lacks(unit, again)
    seconds = dense.ensure(unit.net, pace, base / unit.net, Path(os.environ["EDGE_TRAINED"]))
    arena = Arena(unit.net, pace, base / unit.net)
    head = {
        "net": unit.net, "budget": unit.budget, "contestant": unit.contestant, "group": unit.group,
        "machine": builds.machine(), "versions": tool_versions(*TOOLS),
    }  # fmt: skip

    def keep(recovery: str, row: Row) -> None:
        now = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "load": os.getloadavg()[0]}
        store.add({"cell": f"{unit.name}/{recovery}", "recovery": recovery, **head, **now, **row})

    try:
        if unit.contestant == DENSE:
            keep(DENSE, dense.judge(arena) | {"seconds": seconds})
        else:
            work(arena, unit, todo, keep, enter)
    except NeverMet as missed:
        for recovery in todo:
            seconds = {name: round(took, 1) for name, took in missed.seconds.items()}
            keep(recovery, {"missed": str(missed), "seconds": seconds, "sittings": missed.sittings})
    except Exception as error:  # noqa: BLE001 - one contestant that fails must not end hours of others
        traceback.print_exc()
        for recovery in store.lacks(unit, again):
            told = f"{type(error).__name__}: {error}"[:400]
            keep(recovery, {"failed": told, "seconds": {"all": round(time.monotonic() - begun, 1)}})


def work(arena: Arena, unit: Unit, todo: list[str], keep: Callable[[str, Row], None], enter: Enter) -> None:
    """Search once, then every recovery."""
    folder = arena.folder / unit.budget / unit.contestant
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as trials:
        entry = enter(arena, unit, folder, Path(trials))
    for recovery in todo:
        keep(recovery, finished(arena, entry, recovery, folder / f"{recovery}.onnx"))


def enter(arena: Arena, unit: Unit, folder: Path, trials: Path) -> Entry:
    """The contestant's network before its recovery."""
    name = unit.contestant
    if name == "ours" or name.startswith("ours-"):
        return ours.enter(arena, unit.budget, name, folder)
    if name.startswith("torch-pruning-"):
        return depgraph.enter(arena, unit.ratio, name, trials)
    if name.startswith("fastnas-"):
        return fastnas.enter(arena, unit.ratio, name, trials)
    return scratch.enter(arena, unit.ratio, name, trials)


def finished(arena: Arena, entry: Entry, recovery: str, onnx: Path) -> Row:
    """Recover, export, judge."""
    distilled, seconds = recovery == "distilled", dict(entry.seconds)
    row: dict[str, Any] = {"before": entry.before, "searched": entry.ratio, "sittings": entry.sittings}
    row["contaminated"] = entry.contaminated
    if distilled and entry.finished is not None:
        path, accuracy = entry.finished
        shutil.copyfile(path, onnx)
        row |= {"accuracy": accuracy, "parameters": entry.facts["parameters"], "macs": entry.facts["macs"]}
    else:
        begun = time.monotonic()
        done = arena.recovered(
            entry.start(), distilled=distilled, epochs=entry.epochs, learning_rate=entry.learning_rate
        )
        for step in ours.AFTER:
            seconds.pop(step, None)
        seconds["recover"] = time.monotonic() - begun
        arena.written(done.module, onnx)
        row |= arena.size(done.module)
        row |= {"epochs": [[e.epoch, e.steps, e.loss, e.validate] for e in done.history], "stopped": done.stopped}
        row["validate"], row["accuracy"] = arena.judged(onnx)
    row |= arena.mistakes(onnx)
    row |= {"images": arena.images, "onnx": str(onnx.relative_to(builds.ROOT)), "sha256": file_hash(onnx)}
    return row | {"seconds": {name: round(took, 1) for name, took in seconds.items()}, "facts": entry.facts}
