"""What holds for all tests: signals are heard, also where they were started with some ignored (nohup, a job behind &).

An ignored signal is inherited by every program that a test starts, and a shell cannot undo that.
"""

import signal
from collections.abc import Iterator

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)


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
