"""What holds for all tests: signals are heard, and with two workers only one of them measures this machine.

An ignored signal (nohup, a job behind &) is inherited by every program that a test starts, and a shell cannot undo
that. `make test` runs two workers (pytest-xdist). What measures this machine or leases it is one group, which the first
worker runs in turn; what starts boards is another, for the second: a board is a device of its own, and what is tested
there is that it works and not how long it takes. What only computes comes last, a file at a time, in whichever worker
is free, one thread of it and at a lower priority, so that it takes no time from what is measured.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPUTES = tuple(
    f"tests/{name}"
    for name in (
        "docker/", "pipeline/graph/", "pipeline/latency/", "pipeline/nightly/", "pipeline/project/", "pipeline/prune/",
        "pipeline/recover/", "profiles/", "test_architecture",
        *(
            f"targets/test_{name}.py"
            for name in (
                "compare", "device", "engine", "engines", "measurement", "onnxfile", "providers", "running",
                "simulated", "spool", "tensorrt",
            )
        ),
    )
)  # fmt: skip
"""Folders and files of tests that measure nothing."""
BOARDS = tuple(
    f"tests/targets/test_{name}.py"
    for name in (
        "arm64", "building", "changed_device", "check_on_a_board", "engine_target", "faults", "hangs", "jetson",
        "providers_start", "rtx", "ssh", "ssh_build", "trtexec",
    )
)  # fmt: skip
"""Files of tests on boards, and on builders."""

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line has it, here for two workers

signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)


def is_of(item: pytest.Item, places: tuple[str, ...]) -> bool:
    """Whether a test lies in one of these folders or files."""
    return item.path.relative_to(ROOT).as_posix().startswith(places)


def group(item: pytest.Item) -> str:
    """Name of what one worker runs in turn."""
    if is_of(item, COMPUTES):
        return item.path.name
    return "boards" if is_of(item, BOARDS) else "measures"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups for the workers, given out in this order (--no-loadscope-reorder).

    First of all hooks: xdist's own reads the marks, and one that is set after it groups nothing.
    """
    if config.pluginmanager.has_plugin("xdist"):
        items.sort(key=lambda item: {"measures": 0, "boards": 1}.get(group(item), 2))
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group(item)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Raises UsageError where the groups are not heard: two workers would measure at once, and nothing would say so."""
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            f"pytest {pytest.__version__} does not hear the groups of pytest-xdist; install what pyproject.toml names"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A worker that computes steps back; the other groups are given out before, and never to it afterwards."""
    if "PYTEST_XDIST_WORKER" in os.environ and is_of(item, COMPUTES):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def leave_no_project_behind() -> Iterator[None]:
    """One thread of torch, and no user's code left on the path, whatever a test has built or loaded."""
    import torch

    from pipeline.project import usercode

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if usercode._active is not None:
        usercode._active.leave()
