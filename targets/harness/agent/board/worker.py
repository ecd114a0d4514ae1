"""The worker: one process that infers, asked in JSON lines."""

import gc
import json
import os
import signal
import sys
from typing import Any, Dict, List

from . import jetson
from .base import AgentError, Table, die_with_parent, read_number, read_text
from .machine import clock_folders, clocks, group_folders, moved, quota_stops, throttle_counts, throttle_paths
from .model import open_model


class Watch(object):
    """Reads, around a block, what may have disturbed it."""

    def __init__(self) -> None:
        self.paths = throttle_paths()
        self.clocks = [f + "/scaling_cur_freq" for f in clock_folders()] if clocks() == "locked" else []
        self.gpu = jetson.gpu_folder() if jetson.there() and jetson.gpu_locked() else ""
        self.membership = ""
        self.groups: List[str] = []

    def read(self) -> Table:
        """Counters at this moment."""
        import resource

        membership = read_text("/proc/self/cgroup")
        if membership != self.membership:
            self.membership, self.groups = membership, group_folders()
        return {
            "switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
            "throttle": throttle_counts(self.paths),
            "stops": quota_stops(self.groups),
            "khz": [read_number(path) or 0 for path in self.clocks],
            "gpu_khz": [hertz // 1000 for hertz in (read_number(self.gpu + "/cur_freq"),) if hertz] if self.gpu else [],
        }


def quiet_collector() -> None:
    """Collect once, then never during a measurement."""
    gc.collect()
    gc.disable()
    if hasattr(gc, "freeze"):
        gc.freeze()


def worker() -> int:
    """Answer requests until stdin ends. stdout is kept for answers; whatever a library prints goes to stderr."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    models: Dict[str, Any] = {}
    watch = Watch()
    for line in sys.stdin:
        try:
            answer = answer_request(json.loads(line), models, watch)
        except AgentError as error:
            answer = error.to_table()
        except MemoryError:
            answer = AgentError("memory", "out of memory").to_table()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def answer_request(request: Table, models: Dict[str, Any], watch: Watch) -> Table:
    """Do one request: open, warm or block."""
    verb, name = request["do"], request["name"]
    if verb == "open":
        models[name] = open_model(request["path"], request["options"])
        quiet_collector()
        return {"opened": name, "protocol": getattr(models[name], "protocol", "")}
    if verb == "warm":
        warmth: Table = models[name].warm(request["rule"])
        models[name].check()
        return warmth
    if verb == "block":
        dropped, timed, period_ns, missed = request["dropped"], request["timed"], request.get("period_ns", 0), 0
        before = watch.read()
        if period_ns:
            ns, missed = models[name].paced(dropped, timed, period_ns)
        else:
            ns = models[name].block(dropped, timed)
        after = watch.read()
        counts = {key: after[key] - before[key] for key in ("switches", "stops")}
        rates = {key: [before[key], after[key]] for key in ("khz", "gpu_khz")}
        found = dict(counts, throttle=moved(before["throttle"], after["throttle"]), ns=ns, missed=missed, **rates)
        events = getattr(models[name], "events", None)
        return dict(found, gpu_ns=events) if events else found
    raise AgentError("job", "unknown request '%s'" % verb)
