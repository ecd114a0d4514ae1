"""What holds for all tests: signals are heard, and with two workers only one of them measures.

An ignored signal (nohup, a job behind &) is inherited by every program that a test starts, and a shell cannot undo
that. `make test` runs two workers (pytest-xdist). Everything that may measure, lease a device or start a board is one
group, which one worker runs in turn; what only computes runs beside it in the other, one thread of it and at a lower
priority, so that it takes no time from what is measured.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPUTES = tuple(
    f"tests/{name}/"
    for name in (
        "pipeline/graph", "pipeline/latency", "pipeline/nightly", "pipeline/project", "pipeline/prune",
        "pipeline/recover", "profiles",
    )
)  # fmt: skip
"""Folders of tests that measure nothing."""

signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)


def computes(item: pytest.Item) -> bool:
    """Whether a test measures nothing."""
    return item.path.relative_to(ROOT).as_posix().startswith(COMPUTES)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups for the workers: a file each of what computes, and all the rest.

    First of all hooks: xdist's own reads the marks, and one that is set after it groups nothing.
    """
    if config.pluginmanager.has_plugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(item.path.name if computes(item) else "measures"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Raises UsageError where the groups are not heard: two workers would measure at once, and nothing would say so."""
    if "PYTEST_XDIST_WORKER" in os.environ and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            f"pytest {pytest.__version__} does not hear the groups of pytest-xdist; install what pyproject.toml names"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A worker that computes steps back; the group that measures is never given to it afterwards."""
    if "PYTEST_XDIST_WORKER" in os.environ and computes(item):
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
