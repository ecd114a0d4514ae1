"""How far a build has come: from the phases that the library tells, or from a clock where it tells none.

A library with IProgressMonitor announces phases inside phases, each with a number of steps. The done share of a phase
is (steps done + share of its running children, at most 1) / steps. The build's is that of its outermost phase; there is
one as a rule, so it takes nine tenths, and every further one nine tenths of what is left. Without a monitor the share
is t / (t + EXPECTED_S), which never reaches the end: a sign of life.
"""

import threading
import time
from typing import Any, Callable, Dict, List, Optional

from .errors import Table

EXPECTED_S = 60.0
EVERY_S = 1.0
OUTERMOST = 0.9
Tell = Callable[[Table], None]


class Phase(object):
    """A phase that runs. parent: the phase that it is a part of, or None."""

    def __init__(self, name: str, parent: Optional["Phase"], steps: int) -> None:
        self.name, self.parent, self.steps, self.done = name, parent, max(1, steps), 0
        self.children: List["Phase"] = []
        if parent is not None:
            parent.children.append(self)

    def share(self) -> float:
        """Done share, 0 to 1."""
        running = min(1.0, sum(child.share() for child in self.children))
        return min(1.0, (self.done + running) / self.steps)


class Phases(object):
    """All phases of a build, as they are announced by threads of the library and asked for by another."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: Dict[str, Phase] = {}
        self.left = 1.0
        self.latest = ""
        self.best = 0.0

    def start(self, name: str, parent: Optional[str], steps: int) -> None:
        """A phase begins."""
        with self.lock:
            above = self.running.get(parent) if parent else None
            self.running[name] = Phase(name, above, steps)
            self.latest = name

    def step(self, name: str, step: int) -> None:
        """A step of a phase is done, counted from 0."""
        with self.lock:
            if name in self.running:
                self.running[name].done = max(self.running[name].done, step + 1)

    def finish(self, name: str) -> None:
        """A phase ends, whether or not all its steps were told."""
        with self.lock:
            phase = self.running.pop(name, None)
            if phase is None:
                return
            if phase.parent is None:
                self.left *= 1.0 - OUTERMOST
            elif phase in phase.parent.children:
                phase.parent.children.remove(phase)

    def share(self) -> float:
        """Done share of the build; it never falls."""
        with self.lock:
            roots = [phase.share() for phase in self.running.values() if phase.parent is None]
            now = 1.0 - self.left + OUTERMOST * self.left * min(1.0, sum(roots))
            self.best = max(self.best, min(1.0, now))
            return self.best


class Beat(object):
    """Tells at the beginning, once a second and at the end how far the build is, from a thread of its own.

    phases: what the library has told of, or None where it tells nothing.
    """

    def __init__(self, tell: Tell, phases: Optional[Phases], every_s: float = EVERY_S) -> None:
        self.tell, self.phases, self.every_s = tell, phases, every_s
        self.begin = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Beat":
        self.tell(self.event())
        self.thread.start()
        return self

    def __exit__(self, kind: Optional[type], *ignored: object) -> None:
        self.over.set()
        self.thread.join()
        if kind is None:
            self.tell(dict(self.event(), done=1.0))

    def _run(self) -> None:
        while not self.over.wait(self.every_s):
            self.tell(self.event())

    def event(self) -> Table:
        """How far it is: done, 0 to 1; seconds; phase, "" where it is not known."""
        seconds = time.monotonic() - self.begin
        if self.phases is None:
            done, phase = seconds / (seconds + EXPECTED_S), ""
        else:
            done, phase = self.phases.share(), self.phases.latest
        return {"event": "progress", "done": done, "seconds": round(seconds, 1), "phase": phase}


def make_monitor(api: Any, phases: Phases) -> Any:
    """An IProgressMonitor of the library that keeps the phases."""

    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """Told of phases and steps, from threads of the library."""

        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: Optional[str], num_steps: int) -> None:
            """A phase begins."""
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """A step is done; True lets the build go on."""
            phases.step(phase_name, step)
            return True

        def phase_finish(self, phase_name: str) -> None:
            """A phase ends."""
            phases.finish(phase_name)

    return Monitor()
