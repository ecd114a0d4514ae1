"""A board on this machine for tests: see board.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from profiles.schema import Profile, load_profile

SCRIPT = Path(__file__).parent / "board.sh"
ARM = Path(__file__).parent / "arm_root.sh"
NEEDED = {"ssh": "openssh-client", "sshd": "openssh-server", "ip": "iproute2", "tc": "iproute2", "nft": "nftables",
          "unshare": "util-linux"}  # fmt: skip
PYTHON = "/home/env/bin/python"


def lacking() -> str:
    """Why no board can be brought up here, or ""."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a board in a namespace needs root on Linux"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({package for tool, package in NEEDED.items() if shutil.which(tool, path=path) is None})
    return f"a board in a namespace needs apt-get install {' '.join(missing)}" if missing else ""


def arm_root() -> str:
    """Folder of an arm64 system, made once on a machine and kept; skips the test where it cannot be made."""
    tools = {"debootstrap": "debootstrap", "qemu-aarch64-static": "qemu-user-static", "dpkg-deb": "dpkg"}
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = sorted({package for tool, package in tools.items() if shutil.which(tool, path=path) is None})
    if missing:
        pytest.skip(f"an arm64 board needs apt-get install {' '.join(missing)}")
    place = Path("/var/tmp/edge-arm64")
    pip = Path(sys.executable).with_name("pip")
    done = subprocess.run([str(ARM), str(place), str(pip)], capture_output=True, text=True, timeout=500, check=False)
    if done.returncode:
        log = (place / "log").read_text().splitlines() if (place / "log").is_file() else []
        pytest.skip(f"no arm64 system could be made: {(done.stderr.splitlines() or log or ['no word why'])[-1]}")
    return str(place)


class TestBoard:
    """A board that is up. folder: its own folder on this machine; home: of the user `ada` on it.

    recording: for a Jetson, the folder of its recording and that of the commands that stand for its own. arm_root: of
    an arm64 board, the folder that arm_root.sh made.
    """

    __test__ = False

    def __init__(self, *recording: str, arm_root: str = "") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="edge-board-", dir="/var/tmp")) / "board"
        self.folder.parent.chmod(0o755)
        self.home = self.folder / "home" / "ada"
        self.cache = self.home / ".cache" / "edge-deploy"
        self.python = "/usr/bin/python3" if arm_root else PYTHON
        self._env = {"ARM_ROOT": arm_root} if arm_root else {}
        try:
            self.do("up", sys.base_prefix, sysconfig.get_path("purelib"), *recording)
        except BaseException:
            self.down()
            raise
        self.address = f"10.99.{(self.folder / 'number').read_text().strip()}.2"

    def do(self, verb: str, *words: str) -> str:
        """Run board.sh."""
        command = [str(SCRIPT), verb, str(self.folder), *words]
        env = {**os.environ, **self._env, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
        assert done.returncode == 0, f"board.sh {verb}: {done.stdout}{done.stderr}"
        return done.stdout

    def down(self) -> None:
        """End it, and remove all of it."""
        self.do("down")
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def mend(self) -> None:
        """Undo every fault of the link."""
        self.do("link", "up")
        self.do("loss", "0")
        self.do("rate", "0")

    def file(self, name: str, *lines: str, extends: str = "ssh", **ssh: Any) -> Path:
        """A profile file of a user for this board."""
        keys = {"python": self.python, "config": str(self.folder / "ssh_config"), **ssh}
        table = [f"{key} = {_toml(value)}" for key, value in keys.items()]
        path = self.folder.parent / f"{name}.toml"
        path.write_text("\n".join([f'extends = "{extends}"', 'host = "board"', *lines, "[ssh]", *table, ""]))
        return path

    def profile(self, **ssh: Any) -> Profile:
        """The profile of such a file."""
        return load_profile(str(self.file("board", **ssh)))

    def agents(self) -> list[psutil.Process]:
        """Processes on it that run the agent."""
        return [process for process, _ in self._commands()]

    def running(self, word: str) -> list[psutil.Process]:
        """Those that have this word on their command line."""
        return [process for process, words in self._commands() if word in words]

    def _commands(self) -> list[tuple[psutil.Process, list[str]]]:
        """Processes on it that run the agent, each with its command line, read once: it may end at any moment."""
        found = []
        for pid in self.do("pids").split():
            try:
                process = psutil.Process(int(pid))
                words = process.cmdline()
                if process.status() != psutil.STATUS_ZOMBIE and any(word.endswith("agent.pyz") for word in words):
                    found.append((process, words))
            except psutil.NoSuchProcess:
                continue
        return found

    def quiet(self, patience_s: float = 10.0) -> bool:
        """Whether nothing of ours runs on it any more, at the latest after so many seconds."""
        end = time.monotonic() + patience_s
        while self.agents() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.agents()

    def jobs(self) -> list[str]:
        """Jobs that the agent still keeps."""
        folder = self.cache / "jobs"
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    return str(value) if isinstance(value, int) else f'"{value}"'
