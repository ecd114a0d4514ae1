"""A board behind a real sshd, with a link that fails in every way that links fail."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from boards import PYTHON, TestBoard

from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import MeasureSpec, load_profile
from targets.base import load_target
from targets.harness import lease, pack, transport
from targets.harness.agent.board import lease as board_lease
from targets.harness.agent.board.base import AgentError
from targets.harness.agent.board.lease import Lease, holder_of
from targets.harness.agent.board.peer import MARK, Lost, Peer
from targets.harness.measurement import Session
from targets.harness.transport import Board, Place
from targets.ssh import Ssh

ROOT = Path(__file__).parents[2]
SHORT = MeasureSpec(
    rank_processes=1, rank_rounds=8, block_min_ms=1.0, warmup_s=0.1, warmup_inferences=10, warmup_max_s=0.5
)
LONG = SHORT.model_copy(update={"rank_rounds": 250, "block_min_ms": 8.0})
"""Takes about six seconds of measuring."""


@pytest.fixture
def make(board, tmp_path):
    """Makes targets for the board, with other keys where they are given, and hangs up in the end."""
    made: list[Ssh] = []
    (tmp_path / ".deploy").mkdir()

    def one(**ssh) -> Ssh:
        made.append(load_target(board.profile(**ssh), tmp_path / ".deploy"))
        return made[-1]

    yield one
    for target in made:
        target.board.close()


@pytest.fixture
def target(make):
    return make()


@pytest.fixture
def starts(monkeypatch):
    """Ids of the jobs that were started."""
    seen: list[str] = []
    real = Board._started

    def spy(self, verb, job, limit_s, follow):
        seen.append(follow.id)
        return real(self, verb, job, limit_s, follow)

    monkeypatch.setattr(Board, "_started", spy)
    return seen


class Once:
    """A progress that does something at its first call past `share`, and remembers what it was told."""

    def __init__(self, action: Callable[[], object], share: float = 0.0) -> None:
        self.action, self.share, self.done, self.told = action, share, False, []

    def __call__(self, done: float) -> None:
        self.told.append(done)
        if not self.done and done >= self.share:
            self.done = True
            self.action()


def later(seconds: float, action: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


def is_whole(session: Session, rounds: int) -> bool:
    """Whether a session of one process has each of its rounds once."""
    return [len(process) for process in session.order] == [rounds] and all(
        len(measured.processes[0].ns) == rounds for measured in session.measurements.values()
    )


# --- what it does ---------------------------------------------------------------------------------------------------


def test_a_session_of_a_board_holds_its_facts_its_state_and_who_held_it(target, conv, starts, board):
    session = target.measure({"a": conv("net"), "b": conv("net")}, SHORT, "rank")
    assert session.fingerprint == target.fingerprint() and session.fingerprint.python == "3.11"
    assert {"runnable threads", "free disk"} <= {c.name for c in session.preflight.conditions}
    assert session.lease_owner == lease.owner() and session.started <= session.ended
    assert session.protocol.startswith("ort-interleaved-1 rank back-to-back 1x8 blocks of 4+")
    assert is_whole(session, 8) and len(starts) == 1 and board.jobs() == []
    assert session.measurement("a").p50_ms > 0 and session.measurement("a").sha256 == session.measurement("b").sha256


@pytest.mark.parametrize("batch", [1, 4, None])
def test_a_board_infers_what_this_machine_infers_for_a_batch_of_any_size(target, local, conv, tmp_path, batch):
    net = conv("net", batch=batch, size=8)
    here = load_target(local, tmp_path / ".deploy")
    for samples in (1, 7, 70):
        data = [np.random.default_rng(samples).standard_normal((samples, 3, 8, 8)).astype(np.float32)]
        np.testing.assert_allclose(target.infer(net, data)[0], here.infer(net, data)[0], atol=1e-5)


def test_what_is_there_is_not_sent_again_and_a_changed_file_is_another_one(target, conv, board):
    first = [np.ones((1, 3, 8, 8), np.float32)]
    assert target.infer(conv("net", size=8, channels=16), first)[0].shape == (1, 16)
    assert target.infer(conv("net", size=8, channels=24), first)[0].shape == (1, 24)
    objects = {path.name: path.stat().st_ino for path in (board.cache / "objects").iterdir()}
    target.rows([conv("net", size=8, channels=24)], conv("net", size=8, channels=24), 3)
    assert {path.name: path.stat().st_ino for path in (board.cache / "objects").iterdir()} == objects


def test_building_opens_the_network_on_the_board_and_copies_it(target, conv, tmp_path):
    out = target.build(conv("net"), tmp_path / "made" / "model.onnx")
    assert out.read_bytes() == conv("net").read_bytes()


def test_a_file_that_is_no_onnx_is_named_by_every_verb(target, conv, tmp_path):
    path, version = tmp_path / "broken.onnx", target.fingerprint().runtime_version
    path.write_bytes(b"this is no network" * 4)
    for verb in (
        lambda: target.measure({"dense": conv("net"), "cut": path}, SHORT, "rank"),
        lambda: target.rows([conv("net"), path], conv("net"), 3),
        lambda: target.layers({"cut": path}, SHORT),
    ):
        with pytest.raises(DeployError) as error:
            verb()
        assert str(error.value).startswith(f"ONNX Runtime {version} cannot run '{path}': ")
        assert error.value.hint == "export the network again, or check the file."
    for verb in (lambda: target.build(path, tmp_path / "o.onnx"), lambda: target.infer(path, [np.zeros(1)])):
        with pytest.raises(DeployError) as error:
            verb()
        assert str(error.value).startswith(f"ONNX Runtime {version} cannot open '{path}': ")
    assert not (tmp_path / "o.onnx").exists()


def test_the_doctor_finds_the_connection_the_agent_and_the_runtime(target):
    found = {c.name: c for c in target.doctor()}
    assert found["connection"].value == "board" and found["lease"].value == "free"
    assert found["agent"].value == "python 3.11 in /home/ada/.cache/edge-deploy"
    assert found["runtime"].value.startswith("onnxruntime ") and found["providers"].ok
    assert found["free disk"].value.endswith(" MiB") and int(found["free disk"].value.split()[0]) <= 700


def test_whatever_a_login_shell_prints_is_no_part_of_the_link(make, board):
    (board.home / ".bashrc").write_text('echo "Welcome to the board"; echo \'edge {"event": 1}\'; echo oops >&2\n')
    try:
        assert make().fingerprint().python == "3.11"
    finally:
        (board.home / ".bashrc").unlink()


def test_more_threads_than_cores_on_the_board_are_refused_and_the_job_is_ended(target, conv, board):
    with pytest.raises(UndecidedError) as error:
        target.measure({"net": conv("net")}, LONG.model_copy(update={"threads": 64}), "rank")
    assert error.value.message.startswith("cannot measure: cores is ")
    assert board.running("job") == []


def test_a_command_line_measures_with_a_users_own_file(board, conv, tmp_path):
    few = ("accept_processes = 2", "accept_rounds = 5", "warmup_s = 0.1", "least_s = 0")
    path = board.file("robot-7", "[measure]", *few)
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "measure", str(conv("net")), "--json",
               "--target", str(path)]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told["models"]) == ["net"] and told["device"]["python"] == "3.11"


def test_a_board_behind_another_host_is_reached_through_it(make, board):
    assert make(options={"ProxyJump": "ben@board"}).fingerprint() == make().fingerprint()


def test_a_connection_that_a_user_shares_is_used_and_one_that_is_dead_is_passed_by(make, conv, board):
    shared = {"ControlMaster": "auto", "ControlPath": str(board.folder / "mux"), "ControlPersist": 20}
    first, second = make(options=shared), make(options=shared)
    first.fingerprint()
    assert (board.folder / "mux").is_socket()
    asked = ["ssh", "-F", str(board.folder / "ssh_config"), "-S", str(board.folder / "mux"), "-O"]
    assert second.fingerprint() == first.fingerprint()
    said = subprocess.run([*asked, "check", "board"], capture_output=True, text=True, check=True).stderr
    os.kill(int(said.split("pid=")[1].split(")")[0]), signal.SIGKILL)
    session = second.measure({"net": conv("net")}, SHORT, "rank")
    assert is_whole(session, 8)
    subprocess.run([*asked, "exit", "board"], capture_output=True, check=False)


# --- what is refused ------------------------------------------------------------------------------------------------


def fails(make, **ssh) -> DeployError:
    with pytest.raises(DeployError) as error:
        make(**ssh).fingerprint()
    return error.value


@pytest.mark.parametrize("name", ["ssh", "jetson", "jetson-orin-nano"])
def test_a_profile_without_a_board_says_how_to_write_one(name, tmp_path):
    with pytest.raises(UsageError) as error:
        load_target(load_profile(name), tmp_path)
    assert str(error.value) == (
        f"the profile '{name}' names no board.\n"
        f'write a file robot-7.toml with extends = "{name}" and host = "robot-7", then --target robot-7.toml'
    )
    (tmp_path / "arm-3.toml").write_text(f'extends = "{name}"\n', encoding="utf-8")
    with pytest.raises(UsageError) as error:
        load_target(load_profile(str(tmp_path / "arm-3.toml")), tmp_path)
    assert str(error.value) == "the profile 'arm-3' names no board.\nadd host = \"robot-7\"."


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "a b", ""])
def test_a_host_that_is_no_name_never_reaches_ssh(host, tmp_path):
    with pytest.raises(UsageError) as error:
        load_target(load_profile("ssh", {"host": host}), tmp_path)
    assert error.value.message == f"host '{host}' is no name of a board."


@pytest.mark.parametrize("name", ["StrictHostKeyChecking", "batchmode"])
def test_strict_host_keys_cannot_be_turned_off(name):
    with pytest.raises(UsageError) as error:
        load_profile("ssh", {"ssh": {"options": {name: "no"}}})
    assert error.value.message.endswith(f"ssh.options sets {name}, which is always yes here; leave it out.")


def test_a_changed_host_key_is_refused_with_the_command_to_look_at_it(make, board):
    known = (board.folder / "known_hosts").read_text()
    board.do("newkey")
    try:
        error = fails(make)
    finally:
        new = (board.folder / "hostkey.pub").read_text().split()
        (board.folder / "known_hosts").write_text(f"[{board.address}]:2222 {new[0]} {new[1]}\n")
    assert error.message == "the host key of 'board' is not the known one, so nothing was sent to it."
    first, second = error.hint.splitlines()
    assert first == f"look at the key that it shows: ssh-keyscan -p 2222 {board.address} | ssh-keygen -lf -"
    assert f'ssh-keygen -f "{board.folder}/known_hosts" -R "[{board.address}]:2222"' in second
    assert known != (board.folder / "known_hosts").read_text()
    assert make().fingerprint()


def test_an_unknown_host_key_is_refused_until_it_was_compared(make, board, tmp_path):
    error = fails(make, options={"UserKnownHostsFile": str(tmp_path / "none")})
    assert error.message == "the host key of 'board' is not known yet."
    assert error.hint.startswith("compare its fingerprint once by hand: ssh -F ") and error.hint.endswith("board true")


def test_a_board_that_does_not_answer_is_named_with_the_command_to_try(make, board):
    error = fails(make, options={"Port": 2223})
    assert error.message.startswith(
        f"the board 'board' cannot be reached: ssh: connect to host {board.address} port 2223: "
    )
    assert error.hint.startswith("is it on, and in the network? ssh -F ")
    found = make(options={"Port": 2223}).doctor()
    assert [(c.name, c.ok, c.fatal) for c in found] == [("connection", False, True)] and found[0].mend == error.hint


def test_a_key_that_is_not_let_in_is_told_apart(make, tmp_path):
    error = fails(make, options={"User": "nobody"})
    assert error.message.startswith("'board' lets nobody in with your keys: ")
    assert error.hint.startswith("ssh-copy-id board, or ssh-add your key")


def test_a_name_that_nobody_knows_is_told_apart(tmp_path):
    profile = load_profile("ssh", {"host": "robot-7.invalid"})
    with pytest.raises(DeployError) as error:
        load_target(profile, tmp_path).fingerprint()
    assert error.value.message.startswith("no board named 'robot-7.invalid' is known: ")


UNRESOLVED = "ssh: Could not resolve hostname robot-7: Temporary failure in name resolution"
DENIED = "ada@robot-7: Permission denied (publickey)."
JUMPED = "kex_exchange_identification: Connection closed by remote host\nConnection closed by UNKNOWN port 65535"


@pytest.fixture
def called(monkeypatch):
    """A board whose link is lost in the middle of something, and what ssh says at each call from then on."""

    class Spoken:
        """A link that is made unless ssh says something."""

        def __init__(self, place: Place, fresh: bool) -> None:
            said = words.pop(0) if words else ""
            calls.append(said)
            if said:
                raise transport.explain(place, 255, said, "was closed")

        def ended(self) -> bool:
            return False

        def lost(self, error: Lost) -> Exception:
            return transport.LinkLost(str(error))

        def close(self) -> None:
            pass

    def cut(link: object) -> str:
        if len(calls) == 1:
            raise Lost("was silent")
        return "went on"

    words: list[str] = [""]
    calls: list[str] = []
    monkeypatch.setattr(transport, "Link", Spoken)
    monkeypatch.setattr(transport, "time", Passing())
    return Board(Place("robot-7", load_profile("ssh").ssh)), words, calls, cut


class Passing:
    """A clock on which only sleeping takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("said", [UNRESOLVED, DENIED, f"{UNRESOLVED}\n{JUMPED}"])
def test_a_board_that_was_met_is_called_again_when_its_name_or_its_keys_fail_for_a_while(called, said):
    board, words, calls, cut = called
    words += [said] * 7
    assert board._persist(cut) == "went on"
    assert calls == ["", *[said] * 7, ""]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (UNRESOLVED, "no board named 'robot-7' is known: "),
        (DENIED, "'robot-7' lets nobody in with your keys: "),
        (f"{DENIED}\n{JUMPED}", "'robot-7' lets nobody in with your keys: ada@robot-7: Permission denied (publickey)."),
    ],
)
def test_a_board_that_fails_by_its_name_or_its_keys_is_given_up_when_patience_ends(called, said, told):
    board, words, calls, cut = called
    words += [said] * 1000
    with pytest.raises(DeployError) as error:
        board._persist(cut)
    assert error.value.message.startswith(told) and error.value.hint
    assert transport.PATIENCE_S < transport.time.now < transport.PATIENCE_S + 2 * transport.CALLS_S[-1]
    calls.clear()
    unmet = Board(board.place)
    with pytest.raises(DeployError) as error:
        unmet._persist(cut)
    assert error.value.message.startswith(told) and calls == [said], "a board that was never met is not called again"


def test_a_host_key_that_changes_while_a_board_is_called_again_is_refused_at_once(called):
    board, words, calls, cut = called
    words += [UNRESOLVED, "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", ""]
    with pytest.raises(DeployError, match="the host key of 'robot-7' is not the known one"):
        board._persist(cut)
    assert len(calls) == 3


@pytest.mark.parametrize("own", ["/home/ada/.bashrc: line 9: /opt/log: Permission denied", DENIED, UNRESOLVED])
def test_what_a_login_shell_complains_of_says_nothing_about_the_link(own):
    place = Place("robot-7", load_profile("ssh").ssh)
    said = f"{own}\nTimeout, server robot-7 not responding."
    lost = transport.explain(place, 255, said, "was closed")
    assert isinstance(lost, transport.LinkLost) and lost.unmet is None
    lost = transport.explain(place, 255, "/home/ada/.bashrc: line 9: /opt/log: Permission denied", "was closed")
    assert isinstance(lost, transport.LinkLost) and lost.unmet is None


def test_a_board_without_the_python_that_was_named_says_where_to_look(make):
    error = fails(make, python="python9")
    assert error.message.startswith("there is no 'python9' on 'board': ")
    assert error.hint.startswith("set ssh.python to Python 3.6 or later; look for it: ssh -F ")


def test_a_board_without_the_runtime_says_how_to_install_it(make, conv, board):
    target = make(python="/usr/bin/python3")
    with pytest.raises(DeployError) as error:
        target.fingerprint()
    assert error.value.message == "onnxruntime is not installed for '/usr/bin/python3' on 'board'."
    assert error.value.hint.splitlines()[0].endswith("board '/usr/bin/python3 -m pip install --user onnxruntime'")
    for verb in (
        lambda: target.measure({"net": conv("net")}, SHORT, "rank"),
        lambda: target.build(conv("net"), conv("net")),
    ):
        with pytest.raises(DeployError) as again:
            verb()
        assert again.value.message == error.value.message
    found = {c.name: c for c in target.doctor()}["runtime"]
    assert not found.ok and found.fatal and found.mend == error.value.hint


def fill(board: TestBoard, leave: int, name: str = "filler") -> Path:
    """Fill the board's disk but for so many bytes, by a file of this name."""
    filler = board.folder / "home" / name
    disk = os.statvfs(filler.parent)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - leave)
    return filler


def test_a_full_disk_is_told_with_the_bytes_needed_and_free(make, conv, board):
    target, net = make(), conv("heavy", channels=512, layers=3)
    target.fingerprint()
    filler = fill(board, 9 << 20)
    try:
        with pytest.raises(DeployError) as error:
            target.measure({"net": net}, SHORT, "rank")
    finally:
        filler.unlink()
    size = net.stat().st_size
    assert size > 9 << 20
    assert error.value.message.startswith(f"the disk of 'board' is full: {size} bytes are needed, 1048576 are free in ")
    assert error.value.hint.startswith("free space there: ssh -F ") and error.value.hint.endswith("board 'df -h'")
    assert is_whole(target.measure({"net": conv("net")}, SHORT, "rank"), 8)


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_measures_is_told_and_nothing_is_left(target, conv, board):
    made: list[Path] = []
    once = Once(lambda: made.append(fill(board, 0)))
    try:
        with pytest.raises(DeployError) as error:
            target.measure({"net": conv("net")}, LONG, "rank", once)
    finally:
        for filler in made:
            filler.unlink()
    assert error.value.message.startswith("on 'board': cannot write ")
    assert error.value.message.endswith(": No space left on device.")
    assert error.value.hint.endswith("board 'df -h'")


def test_a_disk_with_no_room_for_the_agent_is_told(make, board):
    filler = fill(board, 0)
    try:
        error = fails(make, folder="~/elsewhere")
    finally:
        filler.unlink()
    assert error.message.startswith("the disk of 'board' is full: ") or "No space left" in error.message


def test_old_files_agents_and_results_are_swept_and_new_ones_are_kept(make, board):
    make().board.send({})
    old = [board.cache / "objects" / ("0" * 64), board.cache / "agent" / ("0" * 16), board.cache / "jobs" / "00000000"]
    old.append(board.cache / "engines" / ("0" * 64))
    new = board.cache / "objects" / ("1" * 64)
    for path in (old[0], new):
        path.write_bytes(b"")
    for path in old[1:]:
        path.mkdir(parents=True)
    for path in old:
        os.utime(path, (0, 0))
    for path in (*old, new, board.cache / "engines"):
        os.chown(path, 2301, 2301)
    make().board.send({})
    assert [path.exists() for path in old] == [False] * 4 and new.exists()
    new.unlink()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch):
    """Sizes of what this machine writes to its links."""
    sizes: list[int] = []
    real = Peer.write

    def write(self, data):
        sizes.append(len(data))
        real(self, data)

    monkeypatch.setattr(Peer, "write", write)
    return sizes


def blob(tmp_path: Path, size: int) -> tuple[str, Path]:
    data = np.random.default_rng(size).bytes(size)
    path = tmp_path / "blob"
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest(), path


def test_a_half_sent_file_goes_on_where_it_stopped(target, board, monkeypatch, tmp_path):
    puts: list[int] = []
    real = Peer.send

    def send(self, table, data=b""):
        if table.get("do") == "put":
            puts.append(table["files"][0][2])
        real(self, table, data)

    monkeypatch.setattr(Peer, "send", send)
    digest, path = blob(tmp_path, 3_000_000)
    target.board.send({})
    board.do("rate", "4000")
    killed: list[int] = []

    def cut() -> None:
        part = board.cache / "objects" / f"{digest}.part"
        while not part.exists() or part.stat().st_size < 500_000:
            time.sleep(0.02)
        killed.append(part.stat().st_size)
        os.kill(target.board._link._process.pid, signal.SIGKILL)

    thread = threading.Thread(target=cut)
    thread.start()
    target.board.send({digest: path})
    thread.join()
    assert (board.cache / "objects" / digest).read_bytes() == path.read_bytes()
    assert puts[0] == 0 and len(puts) == 2 and puts[1] >= killed[0] >= 500_000
    assert not (board.cache / "objects" / f"{digest}.part").exists()


def test_what_stood_on_the_board_is_not_sent_again(target, board, sent, tmp_path):
    digest, path = blob(tmp_path, 1_000_000)
    target.board.send({})
    (board.cache / "objects" / f"{digest}.part").write_bytes(path.read_bytes()[:900_000])
    os.chown(board.cache / "objects" / f"{digest}.part", 2301, 2301)
    before = sum(sent)
    target.board.send({digest: path})
    assert 100_000 <= sum(sent) - before < 101_000


@pytest.mark.parametrize("name", ["{}", "{}.part"])
def test_what_was_damaged_on_the_board_is_found_by_its_hash_and_sent_again(target, board, tmp_path, name):
    digest, path = blob(tmp_path, 100_000)
    target.board.send({})
    damaged = board.cache / "objects" / name.format(digest)
    (board.cache / "objects" / digest).unlink(missing_ok=True)
    damaged.write_bytes(b"\0" * 60_000)
    os.chown(damaged, 2301, 2301)
    target.board.send({digest: path})
    assert (board.cache / "objects" / digest).read_bytes() == path.read_bytes()


def test_a_file_that_changes_while_it_is_sent_is_named(target, tmp_path):
    digest, path = blob(tmp_path, 1000)
    path.write_bytes(bytes(1000))
    with pytest.raises(DeployError) as error:
        target.board.send({digest: path})
    assert error.value.message == f"'{path}' changed while it was sent to 'board': its SHA-256 differs."


def test_only_the_owner_reads_what_was_sent(target, board, tmp_path):
    digest, path = blob(tmp_path, 1000)
    target.board.send({digest: path})
    assert (board.cache / "objects").stat().st_mode & 0o077 == 0
    assert (board.cache / "objects" / digest).stat().st_mode & 0o077 == 0


# --- the link -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_link_that_is_down_for_three_seconds_is_survived(target, conv, board, starts):
    def cut() -> None:
        board.do("link", "down")
        later(3.0, lambda: board.do("link", "up"))

    link = []
    once = Once(lambda: (link.append(target.board._link), cut()))
    session = target.measure({"net": conv("net")}, LONG, "rank", once)
    assert is_whole(session, 250) and len(starts) == 1
    assert target.board._link is link[0]


@pytest.mark.slow
def test_a_link_that_is_down_for_a_minute_finds_the_result_afterwards(target, conv, board, starts):
    def cut() -> None:
        board.do("link", "down")
        later(60.0, lambda: board.do("link", "up"))

    link = []
    once = Once(lambda: (link.append(target.board._link), cut()))
    begin = time.monotonic()
    session = target.measure({"net": conv("net")}, LONG, "rank", once)
    assert is_whole(session, 250) and len(starts) == 1
    assert time.monotonic() - begin > 60.0 and target.board._link is not link[0]


@pytest.mark.slow
def test_a_third_of_the_packets_lost_loses_nothing(target, conv, board, starts):
    target.fingerprint()
    board.do("loss", "30")
    once = Once(lambda: os.kill(target.board._link._process.pid, signal.SIGKILL))
    session = target.measure({"net": conv("net"), "other": conv("other")}, LONG, "rank", once)
    assert is_whole(session, 250) and len(starts) == 1 and once.done


@pytest.mark.slow
def test_a_link_of_400_kbit_carries_a_network_and_a_result(target, conv, board, starts):
    board.do("rate", "400")
    net = conv("net", channels=64, layers=4)
    assert net.stat().st_size > 400_000
    session = target.measure({"net": net}, SHORT, "rank")
    assert is_whole(session, 8) and len(starts) == 1


@pytest.mark.slow
def test_a_killed_ssh_is_called_again_and_the_same_job_goes_on(target, conv, board, starts):
    once = Once(lambda: os.kill(target.board._link._process.pid, signal.SIGKILL))
    session = target.measure({"net": conv("net")}, LONG, "rank", once)
    assert is_whole(session, 250) and len(starts) == 1


# --- the board ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_agent_is_reported_and_its_job_started_again(target, conv, board, starts, caplog, number):
    once = Once(lambda: [process.send_signal(number) for process in board.running("job")])
    session = target.measure({"net": conv("net")}, LONG, "rank", once)
    assert is_whole(session, 250) and len(starts) == 2 and len(set(starts)) == 2
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'board' lost the measuring agent in the middle of a job; the job is started again." in warned


@pytest.mark.parametrize(
    ("word", "number", "text"),
    [
        ("worker", signal.SIGKILL,
         "the measuring process of 'net' was killed by signal 9, as a system does that runs out of memory."),
        ("drive", signal.SIGKILL, "the measuring agent ended by signal 9."),
    ],
)  # fmt: skip
def test_a_process_that_dies_on_the_board_is_named_as_on_this_machine(target, conv, board, word, number, text):
    once = Once(lambda: board.running(word)[0].send_signal(number))
    with pytest.raises(DeployError) as error:
        target.measure({"net": conv("net")}, LONG, "rank", once)
    assert error.value.message == text
    assert board.running("drive") == board.running("worker") == board.running("job") == []


@pytest.mark.slow
def test_a_killed_end_of_the_link_is_called_again(target, conv, board, starts):
    once = Once(lambda: [process.kill() for process in board.running("serve")])
    assert is_whole(target.measure({"net": conv("net")}, LONG, "rank", once), 250)
    assert len(starts) == 1


@pytest.mark.slow
def test_a_reboot_is_reported_and_the_job_started_again(target, conv, board, starts, caplog):
    once = Once(lambda: board.do("reboot"))
    session = target.measure({"net": conv("net")}, LONG, "rank", once)
    assert is_whole(session, 250) and len(starts) == 2
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'board' was started anew in the middle of a job; the job is started again." in warned


@pytest.mark.slow
def test_a_reboot_that_takes_a_while_is_waited_for(target, conv, board, starts):
    def crash() -> None:
        board.do("stop")
        later(4.0, lambda: board.do("start"))

    assert is_whole(target.measure({"net": conv("net")}, LONG, "rank", Once(crash)), 250)
    assert len(starts) == 2


@pytest.mark.slow
def test_a_board_that_reboots_every_time_is_given_up(target, conv, board, starts):
    def again(done: float) -> None:
        if len(seen) < len(starts):
            seen.append(done)
            board.do("reboot")

    seen: list[float] = []
    with pytest.raises(DeployError) as error:
        target.measure({"net": conv("net")}, LONG, "rank", again)
    assert error.value.message.startswith("the board 'board' was started anew 3 times in the middle of a job")
    assert len(starts) == 3


def test_an_inferring_process_that_dies_is_named_and_the_next_call_gets_a_new_one(target, conv, board):
    data = [np.ones((1, 3, 16, 16), np.float32)]
    target.infer(conv("net"), data)
    board.running("infer")[0].kill()
    with pytest.raises(DeployError) as error:
        target.infer(conv("net"), data)
    assert error.value.message.startswith(f"the inferring process of '{conv('net')}' on 'board' was killed by signal 9")
    assert target.infer(conv("net"), data)[0].shape == (1, 16)
    assert is_whole(target.measure({"net": conv("net")}, SHORT, "rank"), 8)
    assert board.running("infer") == []


# --- several clients ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_client_waits_and_is_told_for_whom(make, conv, board, monkeypatch, caplog):
    first, second = make(), make(options={"User": "ben"})
    patient = LONG.model_copy(update={"rank_rounds": 1000})  # longer than the second client takes to arrive
    got: list[Session] = []
    monkeypatch.setattr(lease, "owner", lambda: "eve@desk")
    began = threading.Event()
    thread = threading.Thread(
        target=lambda: got.append(first.measure({"net": conv("net")}, patient, "rank", Once(began.set)))
    )
    thread.start()
    assert began.wait(30)
    found = {c.name: c for c in second.doctor()}["lease"]
    assert not found.ok and found.value.startswith("held by eve@desk (process ")
    session = second.measure({"net": conv("net")}, SHORT, "rank")
    thread.join(120)
    assert is_whole(got[0], 1000) and is_whole(session, 8)
    assert session.started >= got[0].started
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1 and warned[0].startswith("waiting for the device 'board', in use by eve@desk (process ")


def test_who_waits_in_vain_is_told_who_holds_the_board(target, conv, board, monkeypatch):
    monkeypatch.setattr(transport, "WAIT_S", 1.0)
    hold = f'{PYTHON} -c \'import fcntl,time; f=open("/run/lock/edge-deploy-local.lock","w"); fcntl.flock(f,2); '
    hold += 'f.write(chr(123)+chr(34)+"owner"+chr(34)+":"+chr(34)+"bob@bench"+chr(34)+chr(125)); f.flush(); '
    hold += "print(1, flush=True); time.sleep(20)'"
    config = str(board.folder / "ssh_config")
    holder = subprocess.Popen(["ssh", "-F", config, "board", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "1\n"
        with pytest.raises(UndecidedError) as error:
            target.measure({"net": conv("net")}, SHORT, "rank")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        subprocess.run(["ssh", "-F", config, "board", "pkill -u ada -f edge-deploy-local.lock"], check=False)
    assert error.value.message == "the device 'board' is in use by bob@bench; waited 1 s."


def test_what_breaks_off_a_measurement_ends_it_on_the_board(target, conv, board):
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        target.measure({"net": conv("net")}, LONG, "rank", Once(interrupt))
    assert board.running("job") == board.running("drive") == board.running("worker") == []
    assert board.jobs() == []


@pytest.mark.slow
def test_two_boards_measure_at_once(target, conv, board, tmp_path):
    other = TestBoard()
    try:
        second = load_target(other.profile(), tmp_path / ".deploy")
        got: list[Session] = []
        begun: list[bool] = []
        thread = threading.Thread(target=lambda: got.append(target.measure({"net": conv("net")}, LONG, "rank")))
        thread.start()
        once = Once(lambda: begun.append(thread.is_alive() and bool(board.running("drive"))))
        session = second.measure({"net": conv("net")}, LONG, "rank", once)
        thread.join(60)
        second.board.close()
        assert is_whole(session, 250) and is_whole(got[0], 250) and begun == [True]
        assert other.quiet() and other.jobs() == []
    finally:
        other.down()


CLIENT = """
import sys
from pathlib import Path
from profiles.schema import MeasureSpec, load_profile
from targets.base import load_target
from targets.harness import transport
transport.PATIENCE_S = 2.0
target = load_target(load_profile(sys.argv[2]), Path(sys.argv[3]))
spec = MeasureSpec(rank_processes=1, rank_rounds=50000, warmup_s=0.1)
target.measure({"net": Path(sys.argv[1])}, spec, "rank", lambda done: print(done, flush=True))
"""


@pytest.mark.slow
def test_a_job_whose_client_is_gone_for_good_ends_by_itself(board, conv, tmp_path):
    command = [sys.executable, "-c", CLIENT, str(conv("net")), str(board.file("board")), str(tmp_path)]
    client = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert client.stdout is not None and client.stdout.readline()
    assert board.running("drive")
    client.kill()
    client.wait()
    client.stdout.close()
    assert board.quiet(10.0)
    (left,) = board.jobs()
    outcome = json.loads((board.cache / "jobs" / left / "outcome.json").read_text())
    assert (outcome["kind"], outcome["message"]) == ("absent", "nobody has followed the job for 2 s")
    for path in (board.cache / "jobs" / left).iterdir():
        path.unlink()
    (board.cache / "jobs" / left).rmdir()


# --- every Python that a board may have -----------------------------------------------------------------------------


def pythons() -> list[str]:
    """Interpreters that lie beside this one, oldest first, and this one."""
    beside = sorted(Path(sys.base_prefix).parent.glob("3.*/bin/python3"), key=lambda p: int(p.parts[-3].split(".")[1]))
    return [*map(str, beside)] or [sys.executable]


@pytest.mark.parametrize("python", pythons())
def test_the_agent_is_pushed_started_and_given_files_by_every_python(python, tmp_path):
    source = pack.packed()
    command = [python, "-c", transport.BOOT, hashlib.sha256(source).hexdigest(), str(len(source)), str(tmp_path / "e")]
    for pushed in (True, False):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert process.stdin is not None and process.stdout is not None
        peer = Peer(process.stdout.fileno(), process.stdin.fileno(), 20.0)
        first = json.loads(peer.line(20.0).decode().removeprefix(MARK))
        assert first["event"] == ("want" if pushed else "hello")
        if pushed:
            peer.write(source)
            assert json.loads(peer.line(20.0).decode().removeprefix(MARK))["folder"] == str(tmp_path / "e")
        digest, size = hashlib.sha256(b"content").hexdigest(), 7
        peer.send({"do": "have", "files": [[digest, size]]})
        assert peer.receive(20.0)["offsets"] == [0 if pushed else None]
        if pushed:
            peer.send({"do": "put", "files": [[digest, size, 0]]}, b"content")
            assert peer.receive(20.0)["event"] == "put"
        peer.send({"do": "dance"})
        assert peer.receive(20.0)["message"] == "unknown request 'dance'"
        process.stdin.close()
        assert process.wait(10) == 0
        process.stdout.close()


def test_a_python_that_is_too_old_says_so(tmp_path):
    told = transport.BOOT.replace("sys.version_info < (3, 6)", "sys.version_info < (9, 9)")
    done = subprocess.run(
        [sys.executable, "-c", told, "0", "0", str(tmp_path)], capture_output=True, text=True, check=True
    )
    event = json.loads(done.stdout.removeprefix(MARK))
    error = transport.refused(Place("robot-7", load_profile("ssh").ssh), event)
    assert error.message == f"'python3' on 'robot-7' is Python 3.{sys.version_info[1]}; 3.6 or later is needed."
    assert error.hint == "set ssh.python to a newer one; look for it: ssh robot-7 'ls /usr/bin/python3*'"


def test_a_lease_is_the_same_file_for_the_board_and_for_who_measures_on_it_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(board_lease, "lease_folder", lambda: str(tmp_path))
    monkeypatch.setattr(lease, "lease_folder", lambda: tmp_path)
    held = Lease(transport.DEVICE)
    held.take("ada@robot", 60.0, 1.0, lambda holder: None)
    told = lease.holder("local")
    assert told is not None and told.startswith(f"ada@robot (process {os.getpid()}, expected until ")
    with pytest.raises(UndecidedError), lease.lease("local", 1, wait_s=0.1):
        pass
    held.give_back()
    with lease.lease("local", 60):
        assert holder_of(transport.DEVICE) is not None
        with pytest.raises(AgentError) as error:
            Lease(transport.DEVICE).take("eve", 1.0, 0.1, lambda holder: None)
    assert error.value.kind == "busy" and str(os.getpid()) in error.value.message
