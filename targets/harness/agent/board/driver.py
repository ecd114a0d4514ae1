"""The driver: spawns workers and gives them turns."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional, Tuple

from . import jetson, providers
from .base import CLOCK, END_S, AgentError, Table, program, tell
from .files import sha256
from .flags import flag
from .machine import OVERCURRENT, moved, processor_ticks, temperatures, throttle_counts
from .plan import Plan, plan_blocks, plan_sustained

PROTOCOL = "ort-interleaved-1"


class Worker(object):
    """The driver's end of a worker process."""

    def __init__(self, name: str, environment: Dict[str, str]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile()
        self.buffer = b""
        command = [sys.executable, program(), "worker", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, env=environment)

    def send(self, request: Table) -> None:
        """Send a request."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self.lost() from None

    def receive(self, patience_s: float) -> Table:
        """The answer to the last request."""
        assert self.process.stdout is not None
        pipe, end = self.process.stdout.fileno(), time.monotonic() + patience_s
        while b"\n" not in self.buffer:
            ready = select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]
            if not ready:
                raise AgentError("late", "gave no answer within %.0f s" % patience_s, self.name)
            part = os.read(pipe, 1 << 16)
            if not part:
                raise self.lost()
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        answer: Table = json.loads(line.decode())
        if answer.get("event") == "error":
            more = {k: v for k, v in answer.items() if k not in ("event", "kind", "message", "model")}
            raise AgentError(answer["kind"], answer["message"], self.name, **more)
        return answer

    def ask(self, request: Table, patience_s: float) -> Table:
        """Send and receive."""
        self.send(request)
        return self.receive(patience_s)

    def lost(self) -> AgentError:
        """Why the process ended."""
        return died(self.process, self.errors, self.name)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            try:
                file.close()
            except OSError:
                pass


def died(process: Any, errors: Any, name: Optional[str]) -> AgentError:
    """Why a process ended; one that does not is ended here.

    errors: the file that its stderr went to; name: of the model that it held.
    """
    try:
        code = process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return AgentError("lost", "answered no more and was ended", name)
    errors.seek(0)
    said = errors.read().decode("utf-8", "replace").strip().splitlines()
    if code == -signal.SIGKILL:
        return AgentError("killed", "was killed by signal 9, as a system does that runs out of memory", name)
    how = "crashed by signal %d (%s)" % (-code, signal_name(-code)) if code < 0 else "ended with code %d" % code
    return AgentError("lost", how + (": " + said[-1] if said else ""), name)


def signal_name(number: int) -> str:
    """A signal's name, as SIGSEGV."""
    try:
        return str(signal.Signals(number).name)
    except ValueError:
        return "unknown"


def environment_of(job: Table) -> Dict[str, str]:
    """Environment of a worker: the thread counts of numerical libraries set to the job's."""
    threads = str(job["options"]["threads"])
    return dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, MKL_NUM_THREADS=threads)


def drive(job: Table) -> Table:
    """Measure the job's models in turn, in fresh processes for every repeat; raw results as a plain table.

    With sustained_s the first repeat's processes go on for that long: they begin cold, the others find the device hot.
    """
    rng = random.Random(job["seed"])
    names = [model["name"] for model in job["models"]]
    refuse_changed(job)
    begin, before, warm, throttled = CLOCK(), processor_ticks(), temperatures(), throttle_counts()
    watched = jetson.Telemetry(int(job.get("telemetry_ms") or 0))
    try:
        result = take_turns(job, rng, names, begin)
    finally:
        power = watched.end()
    return dict(result, telemetry=dict(telemetry(begin, before, warm, throttled), **power))


def take_turns(job: Table, rng: random.Random, names: List[str], begin: int) -> Table:
    """The processes and rounds of a job, one after the other."""
    repeats: List[Table] = []
    protocols: Dict[str, str] = {}
    plan: Optional[Plan] = None
    medians: Dict[str, int] = {}
    for repeat in range(job["processes"]):
        workers: Dict[str, Worker] = {}
        try:
            woken = CLOCK()
            warmups = start_workers(job, workers, rng, repeat, protocols)
            if plan is None:
                medians = {name: int(warmups[name]["windows_ns"][-1]) for name in names}
                plan = plan_blocks(job, medians, (CLOCK() - woken) * 1e-9)
            turns = Turns(job, plan, repeat, begin)
            if job.get("sustained_s") and not repeat:
                turns.sustain(job["sustained_s"], *plan_sustained(job, medians, plan[2]))
            repeats.append(turns.run(workers, warmups, rng))
        finally:
            for worker in workers.values():
                worker.close()
    assert plan is not None
    flag(repeats, names)
    return {"repeats": repeats, "rounds": plan[0], "dropped": plan[1], "timed": plan[2], "protocols": protocols}


def refuse_changed(job: Table) -> None:
    """Raise AgentError where a model's file is not the one that the job means."""
    for model in job["models"]:
        if sha256(model["path"]) != model["sha256"]:
            raise AgentError("model", "is not the file that was sent: its SHA-256 differs", model["name"])


def telemetry(
    begin: int, before: Tuple[int, int, int], warm: Dict[str, float], throttled: Dict[str, int]
) -> Dict[str, float]:
    """What was seen of the machine over a session that began at `begin` ns with these ticks, degrees and counts."""
    after, hot = processor_ticks(), temperatures()
    ticks = max(1, after[0] - before[0])
    seen = {
        "seconds": (CLOCK() - begin) * 1e-9,
        "steal_percent": 100.0 * (after[1] - before[1]) / ticks,
        "load_end": os.getloadavg()[0],
    }
    if any(OVERCURRENT in path for path in throttled):
        seen["overcurrent_events"] = float(moved(throttled, throttle_counts(), OVERCURRENT))
    if warm and hot:
        seen.update(hottest_start_c=max(warm.values()), hottest_end_c=max(hot.values()))
    return seen


def start_workers(
    job: Table, workers: Dict[str, Worker], rng: random.Random, repeat: int, protocols: Dict[str, str]
) -> Dict[str, Table]:
    """Start one process a model, open the models and warm them up one after the other, in random order.

    On a GPU they are opened one after the other too: what opening takes beside the network, as an engine that is built,
    is then there once, and not once for each. protocols: filled with how each is timed, where its runtime says so.
    """
    patience, environment = job["patience_s"], environment_of(job)
    order = list(job["models"])
    rng.shuffle(order)
    for together in [[model] for model in order] if providers.take_gpu(job["options"]) else [order]:
        for model in together:
            workers[model["name"]] = Worker(model["name"], environment)
            request = {"do": "open", "name": model["name"], "path": model["path"], "options": job["options"]}
            workers[model["name"]].send(request)
        for model in together:
            said = workers[model["name"]].receive(patience).get("protocol")
            if said:
                protocols[model["name"]] = said
    warmups = {}
    for position, model in enumerate(order):
        name = model["name"]
        warmups[name] = workers[name].ask({"do": "warm", "name": name, "rule": job["warmup"]}, patience)
        tell({"event": "progress", "done": share(job, repeat, 0.4 * (position + 1) / len(order))})
    return warmups


def share(job: Table, repeat: int, done: float) -> float:
    """Done share of a job when `done` of a repeat is; the sustained one weighs by its time."""
    each, longer = job["max_seconds"] / job["processes"], job.get("sustained_s", 0.0)
    before = repeat * each + (longer if repeat else 0.0)
    return float((before + done * (each + (0.0 if repeat else longer))) / (job["max_seconds"] + longer))


class Turns(object):
    """One repeat: every round gives each model one block, in random order.

    begin: when the session began, ns; a block's `started` counts from there.
    """

    def __init__(self, job: Table, plan: Plan, repeat: int, begin: int) -> None:
        self.rounds, self.dropped, self.timed = plan
        self.names = [model["name"] for model in job["models"]]
        self.untimed = dict.fromkeys(self.names, 0)
        self.period_ns, self.patience_s = int(job.get("period_ns") or 0), job["patience_s"]
        self.job, self.repeat, self.begin = job, repeat, begin
        self.least_ns = 0

    def sustain(self, seconds: float, timed: Dict[str, int], untimed: Dict[str, int]) -> None:
        """Go on for so many seconds in blocks of their own size, whatever the rounds."""
        self.least_ns, self.rounds, self.timed, self.untimed = int(seconds * 1e9), 1, timed, untimed

    def run(self, workers: Dict[str, Worker], warmups: Dict[str, Table], rng: random.Random) -> Table:
        """Do the rounds and give back their order and blocks."""
        position = {name: index for index, name in enumerate(self.names)}
        blocks: Dict[str, List[Table]] = {name: [] for name in self.names}
        order: List[List[int]] = []
        first = told = CLOCK()
        while len(order) < self.rounds or CLOCK() - first < self.least_ns:
            ranked = list(self.names)
            rng.shuffle(ranked)
            order.append([position[name] for name in ranked])
            for name in ranked:
                started = CLOCK() - self.begin
                blocks[name].append(dict(self.block(workers[name]), started=started))
            if CLOCK() - told > 1e9:
                told = CLOCK()
                done = min(1.0, (told - first) / self.least_ns) if self.least_ns else len(order) / self.rounds
                tell({"event": "progress", "done": share(self.job, self.repeat, 0.4 + 0.6 * done)})
        return {"order": order, "warmups": warmups, "blocks": blocks, "timed": self.timed, "untimed": self.untimed}

    def block(self, worker: Worker) -> Table:
        """One block of a worker's model."""
        dropped, timed = self.dropped + self.untimed[worker.name], self.timed[worker.name]
        request = {"do": "block", "name": worker.name, "dropped": dropped, "timed": timed, "period_ns": self.period_ns}
        return worker.ask(request, self.patience_s + 2e-9 * self.period_ns * (dropped + timed))
