"""Rows of the latency table: many small models in one process, as many open at once as there is room for.

What counts is the ratio of a model to the reference in the same round. So models are taken in groups: those of a group
and several sessions of the reference, which stay open from group to group, infer in turn; a group's models are closed
before the next ones are opened. Where all fit, there is one group.

A row is kept for good, so what would make a session no result does so for a group too: over-current at any time, or
more than a fifth of its stretches in which a hardware throttle counter moved or a held clock was another than usual.
Such a group is measured again while it is open, and after TRIES the whole job has no result.
"""

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import providers
from .base import CLOCK, AgentError, Table, median, program, tell
from .driver import died
from .files import write_file
from .flags import CLOCKS, strayed, usual_clocks
from .machine import OVERCURRENT, free_memory_mib, moved
from .model import open_model
from .worker import Watch, quiet_collector

OPEN_SHARE, SPARE_MIB = 0.5, 256
"""A group may take this share of the memory that is free beside the reference, and leaves so many MiB."""
MOST_ENGINES = 64
"""Engines or sessions on a GPU of a group: each has a stream, events and page-locked memory too, which no count of free
memory shows."""
BUILDING = 0.9
"""Share of a job's time that building engines takes, about."""
TRIES, STRETCH_NS, DISTURBED = 3, 100_000_000, 0.2
"""How often a group is measured; how long blocks follow each other until counters and clocks are read again (a board
takes half a millisecond for each core's); the share of such stretches that may be disturbed, as of a session's blocks.
"""
Opened = List[Tuple[int, Any]]
"""Models with their positions in the job."""


def rows(job: Table, folder: str) -> Table:
    """Block medians in ns of every model in every round, and of the reference's sessions in the rounds of each group.

    `group`: the group that each model was in; `again`: why groups were measured again. Of a job with `build`, which is
    what a builder is asked for, the models are ONNX files: engines are made of them first, in the folder.
    """
    paths, reference, begun = list(job["models"]), job["reference"], 0.0
    if "build" in job:
        made, begun = engines(dict(job["build"], models=list(dict.fromkeys(paths + [reference]))), folder), BUILDING
        paths, reference = [made[path] for path in paths], made[reference]
    references = [open_model(reference, job["options"]) for _ in range(job["sessions"])]
    room, rng, watch = Room(job["options"]), random.Random(job["seed"]), Watch()
    again: List[str] = []
    times: List[List[int]] = [[] for _ in paths]
    groups: List[List[List[int]]] = []
    group = [0] * len(paths)
    left = alike(paths)
    while left or not groups:
        opened = room.fill(paths, left)
        found = undisturbed(job, [model for _, model in opened] + references, rng, watch, again)
        positions = [position for position, _ in opened]
        for position, row in zip(positions, found):
            times[position], group[position] = row, len(groups)
        groups.append(found[len(positions) :])
        while opened:
            close(opened.pop()[1])
        tell({"event": "progress", "done": 1.0 - (1.0 - begun) * len(left) / max(1, len(set(paths)))})
    return {"rows": times, "group": group, "reference": groups, "again": again}


def alike(paths: Sequence[str]) -> List[List[int]]:
    """Positions of equal paths, in order of the first: the sessions of a model stay together."""
    found: Dict[str, List[int]] = {}
    for position, path in enumerate(paths):
        found.setdefault(path, []).append(position)
    return list(found.values())


class Room(object):
    """How many models may be open at once, beside what is open when this is made."""

    def __init__(self, options: Table) -> None:
        self.options = options
        self.engines = providers.take_gpu(options)
        free = self.free_mib()
        self.least = None if free is None else max(SPARE_MIB, int(free * (1.0 - OPEN_SHARE)))

    def free_mib(self) -> Optional[int]:
        """Free memory of what the models run on."""
        if not self.engines:
            return free_memory_mib()
        from .tensorrt import library

        return library.free_mib()[0]

    def for_more(self, count: int) -> bool:
        """Whether there is room for more, so that there are so many."""
        free = self.free_mib()
        roomy = free is None or self.least is None or free > self.least
        return roomy and not (self.engines and count > MOST_ENGINES)

    def fill(self, paths: Sequence[str], left: List[List[int]]) -> Opened:
        """Open models, whose positions are taken from `left`, while there is room; those of one path together.

        A model that turns out not to fit waits for the next group. Raises its error where it does not fit alone.
        """
        opened: Opened = []
        while left and (not opened or self.for_more(len(opened) + len(left[0]))):
            before = len(opened)
            try:
                for position in left[0]:
                    opened.append((position, open_model(paths[position], self.options)))
            except (AgentError, MemoryError) as error:
                if not before or getattr(error, "kind", "memory") != "memory":
                    raise
                for _, model in opened[before:]:
                    close(model)
                return opened[:before]
            left.pop(0)
        return opened


def close(model: Any) -> None:
    """Give back what a model holds; a session of ONNX Runtime does so when nobody knows it any more."""
    getattr(model, "close", lambda: None)()


def undisturbed(
    job: Table, models: Sequence[Any], rng: random.Random, watch: Watch, again: List[str]
) -> List[List[int]]:
    """What `timed` finds when nothing disturbs it. again: told why it is not the first try.

    Raises AgentError where each of TRIES was disturbed.
    """
    for _ in range(TRIES):
        readings = [watch.read()]
        found = timed(job, models, rng, watch, readings)
        why = disturbance(readings)
        if not why:
            return found
        again.append(why)
    raise AgentError("disturbed", "%s, %d times in a row" % (again[-1], TRIES))


def disturbance(readings: Sequence[Table]) -> str:
    """What makes the times between several readings of a `Watch` no result, in words, or ""."""
    events = moved(readings[0]["throttle"], readings[-1]["throttle"], OVERCURRENT)
    if events:
        return "the board's power supply was overloaded %d times meanwhile" % events
    usual = {kind: usual_clocks([reading[kind] for reading in readings]) for kind in CLOCKS}
    pairs = list(zip(readings, readings[1:]))
    lowered = sum(moved(a["throttle"], b["throttle"]) > 0 for a, b in pairs)
    off = sum(any(strayed((a[kind], b[kind]), usual[kind]) for kind in CLOCKS) for a, b in pairs)
    most = DISTURBED * len(pairs)
    return "a throttle counter moved again and again" if lowered > most else "a held clock moved" if off > most else ""


def timed(
    job: Table, models: Sequence[Any], rng: random.Random, watch: Watch, readings: List[Table]
) -> List[List[int]]:
    """Block medians of models that infer in turn, ns: one a model and round, after a round that does not count.

    readings: filled with what the watch reads, after every stretch of blocks and every round.
    """
    if hasattr(gc, "unfreeze"):
        gc.unfreeze()
    quiet_collector()
    counts = []
    for model in models:
        once = min(model.block(1, 3))
        counts.append(max(job["timed"], min(job["timed_max"], int(job["block_ns"] // max(1, once)))))
    order = list(range(len(models)))
    times: List[List[int]] = [[] for _ in models]
    for turn in range(job["rounds"] + 1):
        rng.shuffle(order)
        begin = CLOCK()
        for index in order:
            middle = median(models[index].block(job["dropped"], counts[index]))
            if turn:
                times[index].append(middle)
            if CLOCK() - begin > STRETCH_NS:
                readings.append(watch.read())
                begin = CLOCK()
        readings.append(watch.read())
    return times


def engines(order: Table, folder: str) -> Dict[str, str]:
    """Path of an ONNX file -> path of the engine made of it. order: the job of building them.

    They are built by a process of its own: what a builder takes, it has given back before anything is timed.
    """
    work, out, last = os.path.join(folder, "build.json"), os.path.join(folder, "built.json"), {}
    write_file(work, json.dumps(dict(order, tied=True)).encode())
    with tempfile.TemporaryFile() as errors:
        command = [sys.executable, program(), "build", work, out]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                last = json.loads(line.decode())
                if last["event"] == "progress":
                    tell(dict(last, done=BUILDING * last["done"]))
        if last.get("event") == "error":
            process.wait()
            raise AgentError(last.pop("kind"), last.pop("message"), last.pop("model"), **last)
        if process.wait() or last.get("event") != "done":
            end = died(process, errors, None)
            hint = "lower tensorrt.workspace_mib, close what else holds memory there, or add swap while building."
            raise AgentError(end.kind, "the building process " + end.message, hint=hint)
    return {path: os.path.join(folder, "engine-%d.plan" % number) for number, path in enumerate(order["models"])}
