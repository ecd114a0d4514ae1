"""Commands of the board's system, those that change it as root.

Settings have to be given back on a full disk too, so nothing that a command reads or says goes through a disk.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
import time
from typing import Any, Optional, Sequence, Tuple

PLACES = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
COMMAND_S = 30.0
MFD_CLOEXEC = 1


def command(name: str) -> Optional[str]:
    """Path of a system command, also where the login's PATH leaves out the system's folders."""
    path = os.environ.get("PATH", "")
    return shutil.which(name, path=os.pathsep.join([path] + list(PLACES)))


def run(words: Sequence[str], as_root: bool = False) -> Tuple[int, str]:
    """Exit code and all output of a system command. as_root: it changes the board; its questions are answered "NO"."""
    path = command(words[0])
    if path is None:
        return 127, "%s: not found" % words[0]
    asked = [path] + list(words[1:])
    if as_root and os.geteuid() != 0:
        sudo = command("sudo")
        if sudo is None:
            return 126, "%s needs root, and there is no sudo" % words[0]
        asked = [sudo, "-n"] + asked
    with in_memory() as said:
        try:
            with answers() if as_root else open(os.devnull, "rb") as fed:
                process = subprocess.Popen(asked, stdin=fed, stdout=said, stderr=subprocess.STDOUT)
        except OSError as error:
            return 126, "%s: %s" % (words[0], error.strerror)
        try:
            process.wait(COMMAND_S)
        except subprocess.TimeoutExpired:
            try:
                process.kill()
            except PermissionError:
                pass  # sudo has made itself root; nobody waits for it, and the next command waits for its answers
            return 124, "%s did not end within %.0f s" % (words[0], COMMAND_S)
        said.seek(0)
        return process.returncode, said.read().decode("utf-8", "replace").strip()


def in_memory() -> Any:
    """A nameless file in memory (memfd_create, which Python has itself from 3.8 on), else one on the disk."""
    number = getattr(ctypes.CDLL(None), "memfd_create", lambda name, flags: -1)(b"said", MFD_CLOEXEC)
    return tempfile.TemporaryFile() if number < 0 else os.fdopen(number, "w+b", 0)


def answers() -> Any:
    """What a command that changes the board reads: "NO" to all questions. One such command runs at a time.

    It is a named pipe, whose text takes no room on a disk, and locked for as long as the command, or whoever it has
    become through sudo, has it open: one that outlives the job that started it has ended before the next one begins,
    so that nothing is changed after it was given back.
    Raises OSError where the last one does not end, or another user has made a pipe of this name.
    """
    path = os.path.join(tempfile.gettempdir(), "edge-deploy-answers-%d.pipe" % os.getuid())
    try:
        os.mkfifo(path, 0o600)
    except FileExistsError:
        pass
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW), "rb", 0)
    try:
        seen = os.fstat(file.fileno())
        if not stat.S_ISFIFO(seen.st_mode) or seen.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "'%s' is no pipe of this user's; remove it" % path)
        own(file)
        while file.read(1 << 10):
            pass  # what an earlier command did not read
        writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.write(writer, b"NO\n" * 8)
        os.close(writer)
        os.set_blocking(file.fileno(), True)
    except BaseException:
        file.close()
        raise
    return file


def own(file: Any) -> None:
    """Lock a file for this process and those that it hands the file to. Raises OSError where it stays another's."""
    end = time.monotonic() + 2.0 * COMMAND_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(errno.ETIMEDOUT, "an earlier command does not end") from None
            time.sleep(0.1)
