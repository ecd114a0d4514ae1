"""What the runtime's profiler says of every layer."""

import json
import os
import random
from typing import Dict, List, Sequence, Tuple

from .base import AgentError, Table, median, tell
from .driver import refuse_changed
from .model import Model, open_model


def layers(job: Table, folder: str) -> Table:
    """Milliseconds of every layer of every model per inference, as the runtime's profiler counts them.

    In each turn every model, in random order, gets a fresh session that is profiled over `runs` inferences; a layer's
    number is the median over turns of its mean in a turn, so that one disturbed turn moves none. The profiler slows the
    run by a third to a half and counts whole microseconds: the numbers tell layers apart and are no latency.
    """
    refuse_changed(job)
    rng = random.Random(job["seed"])
    models = list(job["models"])
    seen: Dict[str, List[Dict[Tuple[str, str], float]]] = {model["name"]: [] for model in models}
    for turn in range(job["turns"]):
        rng.shuffle(models)
        for model in models:
            seen[model["name"]].append(profiled(model, job, os.path.join(folder, "profile")))
        tell({"event": "progress", "done": (turn + 1) / job["turns"]})
    return {"layers": {name: typical(turns) for name, turns in seen.items()}}


def profiled(model: Table, job: Table, prefix: str) -> Dict[Tuple[str, str], float]:
    """One profiled session of a model: (name, operator) of a layer -> its ms per inference, in order of execution."""
    if job["options"].get("library"):
        engine = open_model(model["path"], job["options"])
        try:
            engine.block(job["dropped"], 1)
            found: Dict[Tuple[str, str], float] = engine.profile(job["runs"])
            return found
        finally:
            getattr(engine, "close", lambda: None)()
    opened = Model(model["path"], dict(job["options"], profile=prefix))
    opened.block(job["dropped"], job["runs"])
    path = opened.session.end_profiling()
    try:
        with open(path, "rb") as file:
            events = json.loads(file.read().decode("utf-8", "replace"))
    except (OSError, ValueError):
        raise AgentError("disk", "the runtime's profile '%s' is cut off, as on a full disk" % path) from None
    finally:
        if os.path.exists(path):
            os.remove(path)
    return layer_times(events, job["runs"])


def layer_times(events: Sequence[Table], runs: int) -> Dict[Tuple[str, str], float]:
    """(name, operator) of a layer -> its ms per inference over the last `runs` inferences of a profile."""
    begins = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    end = "_kernel_time"
    found: Dict[Tuple[str, str], float] = {}
    for event in sorted((e for e in events if e.get("cat") == "Node"), key=lambda e: int(e["ts"])):
        if event["name"].endswith(end) and event["ts"] >= begins[-runs]:
            key = (event["name"][: -len(end)], event["args"]["op_name"])
            found[key] = found.get(key, 0.0) + event["dur"] * 1e-3 / runs
    return found


def typical(turns: Sequence[Dict[Tuple[str, str], float]]) -> List[Table]:
    """Layers of the first turn with their median over turns."""
    found = []
    for key in turns[0]:
        middle = median([int(round(turn.get(key, 0.0) * 1e6)) for turn in turns])
        found.append({"name": key[0], "op": key[1], "ms": middle * 1e-6})
    return found
