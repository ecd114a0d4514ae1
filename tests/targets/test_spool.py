"""Working folders: those of the living are kept, wherever they live, and those of the killed are swept."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from targets.harness import spool
from targets.harness.spool import working_folder

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from targets.harness.spool import working_folder
with working_folder(Path(sys.argv[1]), 'build-'):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_work_that_has_no_process_here_keeps_its_folder_and_a_killed_ones_is_swept(tmp_path, monkeypatch):
    """In another container the number of its process is nobody's here, or somebody else's."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    with working_folder(tmp_path, "build-") as folder:
        assert folder.is_dir() and not left.exists()
        with working_folder(tmp_path, "build-") as other:
            assert folder.is_dir() and other != folder
        (folder / "engine-0.plan").write_bytes(b"plan")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    plain, made = fcntl.flock, []

    def late(file: int, kind: int) -> None:
        """Another process sweeps between the making of the lock file and its locking."""
        if not made:
            made.extend(tmp_path.iterdir())
            spool.sweep(tmp_path, "build-")
        plain(file, kind)

    monkeypatch.setattr(spool.fcntl, "flock", late)
    with working_folder(tmp_path, "build-") as folder:
        assert len(made) == 1 and folder != made[0] and not made[0].exists()
        assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_without_a_lock_is_swept_after_a_day(tmp_path):
    old, new = tmp_path / "build-1-old", tmp_path / "build-new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    with working_folder(tmp_path, "build-"):
        assert new.is_dir() and not old.exists()
