"""A Jetson: what it says of itself in every JetPack, its power mode and clocks, and that they are always given back.

The boards are recordings (recordings/*/SOURCES.md); the commands that stand for theirs print what was recorded.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from boards import TestBoard
from conftest import jetson_board

from pipeline.latency.store import Store
from pipeline.latency.timing import PROTOCOL, Clock, key
from profiles.errors import DeployError, UndecidedError, UsageError
from profiles.schema import Budget, MeasureSpec, load_profile, profile_names
from targets.base import load_target
from targets.harness.agent.board import arrange, jetson
from targets.harness.agent.board.base import AgentError, read_number, read_text
from targets.harness.agent.board.worker import Watch
from targets.harness.measurement import Session, judge
from targets.jetson import Jetson, _board
from targets.runtimes.tensorrt import TensorRT

RECORDINGS = Path(__file__).parent / "recordings"
BOARDS = sorted(path.parent.parent.name for path in RECORDINGS.glob("jetpack-*/etc/nv_tegra_release"))
LINES = sorted(str(path.relative_to(RECORDINGS)) for path in RECORDINGS.glob("jetpack-*/tegrastats*.txt"))
GPUS = sorted(str(path.parent.relative_to(RECORDINGS)) for path in RECORDINGS.glob("**/devfreq/*/cur_freq"))
SHORT = MeasureSpec(
    rank_processes=1, rank_rounds=8, block_min_ms=1.0, warmup_s=0.1, warmup_inferences=10, warmup_max_s=0.5
)
LONG = SHORT.model_copy(update={"rank_rounds": 250, "block_min_ms": 8.0})
"""Takes about six seconds of measuring."""


# --- what it says of itself -------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    """Makes the agent read a recording's files, and its commands print the recording's texts."""

    def use(name: str) -> Path:
        place = RECORDINGS / name
        monkeypatch.setattr(jetson, "TREES", (str(place / "device-tree"),))
        monkeypatch.setattr(jetson, "RELEASE", str(place / "etc/nv_tegra_release"))
        monkeypatch.setattr(jetson, "MODES", str(place / "etc/nvpmodel.conf"))
        said = {("nvpmodel", "-q"): place / "nvpmodel-q.txt"}

        def run(words, as_root=False):
            path = said.get(tuple(words))
            return (0, path.read_text().strip()) if path is not None and path.is_file() else (127, "not found")

        monkeypatch.setattr(jetson, "run", run)
        return place

    return use


@pytest.mark.parametrize("folder", sorted(path.name for path in RECORDINGS.glob("jetpack-*")))
def test_a_recording_names_its_public_source_or_says_that_it_has_no_address(folder):
    said = (RECORDINGS / folder / "SOURCES.md").read_text()
    assert "https://" in said or "**no address**" in said
    for found in re.finditer("a public file", said):
        assert "no address" in said[max(0, found.start() - 80) : found.start()], "without an address, and not said so"


@dataclass(frozen=True)
class Known:
    """What a recording has to be read as."""

    l4t: str
    module: str
    chip: str
    mode: tuple[str, int | None]
    profile: str


KNOWN = {
    "jetpack-4.6-agx-xavier": Known("32.6.1", "p2888-0001", "tegra194", ("", None), "jetson-agx-xavier"),
    "jetpack-4.6-nano": Known("32.7.1", "p3448-0000", "tegra210", ("MAXN", 0), "jetson-nano"),
    "jetpack-5.1-agx-orin": Known("35.4.1", "p3701-0000", "tegra234", ("", None), "jetson-agx-orin"),
    "jetpack-5.1-orin-nx": Known("35.3.1", "", "", ("", None), ""),
    "jetpack-5.1-xavier-nx": Known("35.4.1", "p3668-0001", "tegra194", ("MODE_15W_6CORE", 2), "jetson-xavier-nx"),
    "jetpack-6.2-agx-orin": Known("36.4.3", "", "", ("MODE_30W", 2), ""),
    "jetpack-6.2-orin-nano": Known("36.4.3", "p3767-0005", "tegra234", ("25W", 1), "jetson-orin-nano"),
    "jetpack-6.2-orin-nx": Known("36.4.7", "p3767-0000", "tegra234", ("MAXN_SUPER", 0), "jetson-orin-nx"),
    "jetpack-7.0-thor": Known("38.2.0", "p3834-0008", "tegra264", ("120W", 1), "jetson-thor"),
    "jetpack-7.2-agx-orin": Known("39.2.0", "", "", ("MAXN", 0), ""),
    "jetpack-7.2-orin-nano": Known("39.2.1", "", "", ("25W", 1), ""),
    "jetpack-7.2-orin-nano-15w": Known("39.2.0", "", "", ("15W", 0), ""),
    "jetpack-7.2-thor": Known("39.2.0", "", "", ("", None), ""),
}
"""Where no device tree was recorded, the module is not known; where `nvpmodel -q` was not, the mode is not."""


@pytest.mark.parametrize("name", BOARDS)
def test_every_recorded_board_is_read_as_what_it_is(name, recorded):
    place, known = recorded(name), KNOWN[name]
    assert jetson.there()
    assert (jetson.release(), jetson.module(), jetson.chip()) == (known.l4t, known.module, known.chip)
    if (place / "nvpmodel-q.txt").is_file():
        assert jetson.power_mode() == known.mode
        modes = jetson.modes()
        assert not modes or modes[known.mode[0]] == known.mode[1]
    facts = jetson.facts()
    assert facts["board"] == f"{known.module} L4T {known.l4t}".strip()


@pytest.mark.parametrize("name", LINES)
def test_every_recorded_line_of_tegrastats_gives_memory_temperatures_and_its_rails(name):
    for line in (RECORDINGS / name).read_text().splitlines():
        read = jetson.parse_tegrastats(line)
        assert read["ram_mib"] > 0
        degrees = [value for key, value in read.items() if key.startswith("temperature_c ")]
        assert degrees and all(-10.0 < value < 110.0 for value in degrees)
        rails = {key.split()[1] for key in read if key.startswith("power_mw ")}
        assert rails == {word for word in line.split() if word.startswith(("VDD", "VIN", "POM"))} | (rails & OWN_RAILS)
        assert all(0.0 <= read[f"power_mw {rail}"] < 150_000.0 for rail in rails)


OWN_RAILS = {"CPU", "GPU", "SOC", "CV", "VDDRQ", "SYS5V"}
"""Rails of an AGX Xavier, whose names do not begin like the others'."""


@pytest.mark.parametrize("path", GPUS)
def test_the_clock_of_a_recorded_gpu_is_watched_where_it_is_held(path, recorded, tmp_path, monkeypatch):
    recorded(path.split("/")[0])
    place = shutil.copytree(RECORDINGS / path, tmp_path / Path(path).name)
    monkeypatch.setattr(jetson, "DEVFREQ", str(tmp_path))
    now = int((place / "cur_freq").read_text()) // 1000
    assert jetson.gpu_clocks()["cur"] == now > 10_000
    assert Watch().read()["gpu_khz"] == [], "a floating clock moves by itself"
    (place / "min_freq").write_text((place / "max_freq").read_text())
    watch = Watch()
    assert watch.read()["gpu_khz"] == [now]
    (place / "cur_freq").unlink()
    assert watch.read()["gpu_khz"] == []


def test_a_board_without_a_gpu_to_watch_is_no_error(recorded, tmp_path, monkeypatch):
    recorded("jetpack-6.2-orin-nano")
    monkeypatch.setattr(jetson, "DEVFREQ", str(tmp_path))
    assert Watch().read()["gpu_khz"] == []


def test_each_profile_takes_its_own_boards_and_no_others():
    own = {name: load_profile(name).jetson.modules for name in profile_names() if name.startswith("jetson-")}
    assert len(own) == 8 and all(own.values())
    for name, known in ((name, known) for name, known in KNOWN.items() if known.module):
        fitting = {p for p, modules in own.items() if any(f"{known.module}-".startswith(f"{m}-") for m in modules)}
        assert fitting == {known.profile}, name


ANSWERS = sorted(str(path.relative_to(RECORDINGS)) for path in RECORDINGS.glob("jetpack-*/nvpmodel-q*.txt"))
FAILED = {
    "jetpack-5.1-orin-nano/nvpmodel-m-failed.txt": "optMask is 1, no request for power mode",
    "jetpack-5.1-xavier-nx/nvpmodel-failed.txt": "optMask is 3, no request for power mode",
    "jetpack-6.2-agx-orin/nvpmodel-failed.txt": "optMask is 2, no request for power mode",
    "jetpack-6.2-agx-orin/nvpmodel-m-reboot-yes.txt": "takes a restart of the board",
    "jetpack-6.2-orin-nano/nvpmodel-m-reboot-declined.txt": "takes a restart of the board",
    "jetpack-7.0-thor/nvpmodel-m-reboot-no-stdin.txt": "takes a restart of the board",
    "jetpack-7.2-orin-nano-15w/nvpmodel-m-bad-mode.txt": "request for bad power mode 2",
}
"""What nvpmodel said where it did not set a mode -> what is told of it."""


@pytest.mark.parametrize("name", ANSWERS)
def test_every_recorded_answer_of_nvpmodel_is_read(name):
    """The mode's name is one of its kind, its number stands alone on the line behind."""
    text = (RECORDINGS / name).read_text()
    mode, number = jetson.parse_mode(text)
    assert re.fullmatch(r"(MODE_)?(\d+W\w*)|MAXN\w*", mode), mode
    assert f"NV Power Mode: {mode}\n{number}\n" in text + "\n"


@pytest.mark.parametrize(
    "name", sorted(str(path.relative_to(RECORDINGS)) for path in RECORDINGS.glob("jetpack-*/nvpmodel-*.txt"))
)
def test_every_recorded_word_of_nvpmodel_on_setting_a_mode_is_read(name, monkeypatch):
    text = (RECORDINGS / name).read_text()
    if name in ANSWERS or name.endswith("nvpmodel-p-verbose.txt"):
        return
    set_to: list[int] = []
    monkeypatch.setattr(jetson, "run", lambda words, as_root: (set_to.append(words[-1]), (0, text))[1])
    monkeypatch.setattr(jetson, "power_mode", lambda: ("", None if text else 2))
    if not text:
        jetson.set_mode(2, "15W")
        assert set_to == ["2"]
        return
    with pytest.raises(AgentError, match=FAILED[name]) as error:
        jetson.set_mode(2, "15W")
    assert error.value.kind == "mode" and ("reboot" in error.value.more) == ("restart" in FAILED[name])


def test_the_modes_that_a_recorded_nvpmodel_lists_are_those_of_its_file(recorded):
    """Its configuration was recorded with fewer of them; ids and names agree."""
    place = recorded("jetpack-5.1-xavier-nx")
    listed = re.findall(r"ID=(\d+) NAME=(\S+)", (place / "nvpmodel-p-verbose.txt").read_text())
    assert set(jetson.modes().items()) < {(name, int(number)) for number, name in listed}


def test_every_recorded_word_of_jetson_clocks_is_read(recorded, tmp_path, monkeypatch):
    """What it stored is compared with what is so now; what it refused is told in its own words."""
    place = RECORDINGS / "jetpack-4.6-nano"
    stored = place / "jetson_clocks-store.txt"
    now = dict(line.split(":") for line in stored.read_text().splitlines())
    monkeypatch.setattr(arrange, "read_text", lambda path: now.get(path) or read_text(path))
    assert arrange.differing(str(stored)) == ""
    held = place / "jetson_clocks-store-while-locked.txt"
    core = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq"
    assert arrange.differing(str(held)) == f"{core} is 102000, it was 1428000"
    (tmp_path / "arranged.json").write_text("{}")
    for name, kind in (
        ("jetpack-5.1-xavier-nx/jetson_clocks-restore-nothing-stored.txt", "mode"),
        ("jetpack-5.1-xavier-nx/jetson_clocks-store-exists.txt", "mode"),
        ("jetpack-7.2-agx-orin/jetson_clocks-show-not-root-stdout.txt", "root"),
        ("jetpack-7.2-thor/jetson_clocks-show-not-root-stdout.txt", "root"),
    ):
        text = (RECORDINGS / name).read_text().strip()
        monkeypatch.setattr(arrange, "run", lambda words, as_root, text=text: (1, text))
        monkeypatch.setattr(arrange, "TRIES", 1)
        for ask in (
            lambda: arrange.restore(str(tmp_path / "clocks.conf")),
            lambda: arrange.Arrangement(str(tmp_path), {}, print).store(("15W", 0)),
        ):
            with pytest.raises(AgentError, match=re.escape(f"ended with 1: {text}")) as error:
                ask()
            assert error.value.kind == kind
    said = (RECORDINGS / "jetpack-5.1-xavier-nx/jetson_clocks-store-output.txt").read_text()
    clocks = tmp_path / "clocks.conf"
    monkeypatch.setattr(arrange, "run", lambda words, as_root: (clocks.write_text(stored.read_text()), (0, said))[1])
    arrange.Arrangement(str(tmp_path), {}, print).store(("15W", 0))
    assert json.loads((tmp_path / "arranged.json").read_text())["mode"] == "15W"


# --- on a board -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A recorded board in its first mode, and another one of it. clocks: lowest and highest of the GPU in Hz, by mode.

    Where they were not recorded: the GPU of the Xavier NX is that of 4.6; the Thor's lowest is what it idles at.
    """

    recording: str
    profile: str
    board: str
    gpu: str
    modes: tuple[tuple[int, str], tuple[int, str]]
    clocks: tuple[tuple[str, str], tuple[str, str]]
    rail: str


ORIN = Sample(
    "jetpack-6.2-orin-nano", "jetson-orin-nano", "p3767-0005 L4T 36.4.3", "17000000.gpu", ((0, "15W"), (1, "25W")),
    (("306000000", "624750000"), ("306000000", "918000000")), "VDD_IN",
)  # fmt: skip
SAMPLES = (
    Sample(
        "jetpack-4.6-nano", "jetson-nano", "p3448-0000 L4T 32.7.1", "57000000.gpu", ((0, "MAXN"), (1, "5W")),
        (("76800000", "921600000"), ("76800000", "614400000")), "POM_5V_IN",
    ),
    Sample(
        "jetpack-5.1-xavier-nx", "jetson-xavier-nx", "p3668-0001 L4T 35.4.1", "17000000.gv11b",
        ((2, "MODE_15W_6CORE"), (8, "MODE_20W_6CORE")), (("114750000", "1109250000"),) * 2, "VDD_IN",
    ),
    ORIN,
    Sample(
        "jetpack-7.0-thor", "jetson-thor", "p3834-0008 L4T 38.2.0", "gpu-gpc-0", ((1, "120W"), (0, "MAXN")),
        (("315000000", "1575000000"),) * 2, "VIN_SYS_5V0",
    ),
)  # fmt: skip
"""A board of each JetPack."""


class Shown:
    """A board's own state, as this machine sees it. Of an Orin Nano mode 0 is 15W, 1 is 25W, 2 is MAXN_SUPER."""

    def __init__(self, board: TestBoard, sample: Sample = ORIN) -> None:
        self.board, self.sample, self.place = board, sample, board.folder / "jetson"
        self.gpu = self.place / "sys_class" / "devfreq" / sample.gpu
        self.floating = sample.clocks[0]

    def reset(self) -> None:
        """Its first mode, floating clocks, nothing done, nothing wrong."""
        modes = zip(self.sample.modes, self.sample.clocks, strict=True)
        clocks = {f"modes/{number}": " ".join(span) for (number, _), span in modes}
        for name, text in {"mode": str(self.sample.modes[0][0]), "done": "", **clocks}.items():
            (self.place / name).write_text(text and text + "\n")
            (self.place / name).chmod(0o666)
        for name in ("no_sudo", "restart_modes", "restarted", "slow", "idle_restores", "at_work"):
            (self.place / name).unlink(missing_ok=True)
        self.gpu.mkdir(parents=True, exist_ok=True)
        for name, value in zip(("min_freq", "max_freq", "cur_freq"), (*self.floating, self.floating[0]), strict=True):
            (self.gpu / name).write_text(value + "\n")
            (self.gpu / name).chmod(0o666)

    @property
    def mode(self) -> str:
        return (self.place / "mode").read_text().strip()

    @property
    def clocks(self) -> tuple[str, str]:
        return (self.gpu / "min_freq").read_text().strip(), (self.gpu / "max_freq").read_text().strip()

    @property
    def done(self) -> list[str]:
        """What was changed on it, in order."""
        return (self.place / "done").read_text().split("\n")[:-1]

    @property
    def sound(self) -> bool:
        """Whether it is as it was before."""
        first = str(self.sample.modes[0][0])
        return self.mode == first and self.clocks == self.floating and not (self.board.cache / "arranged.json").exists()

    def soon_sound(self, seconds: float = 40.0) -> bool:
        end = time.monotonic() + seconds
        while not self.sound and time.monotonic() < end:
            time.sleep(0.1)
        return self.sound


@pytest.fixture
def orin(whole_jetson) -> Iterator[Shown]:
    """The board as it was recorded; afterwards it is so again, and nothing of ours runs on it."""
    yield from in_order(whole_jetson, ORIN)


@pytest.fixture(params=SAMPLES, ids=lambda sample: sample.recording)
def shown(request, whole_jetson) -> Iterator[Shown]:
    """A board of each JetPack in turn, in the same way."""
    if request.param is ORIN:
        yield from in_order(whole_jetson, ORIN)
        return
    board = jetson_board(request.param.recording)
    try:
        yield from in_order(board, request.param)
    finally:
        board.down()


@contextmanager
def watched(board: Shown) -> Iterator[list[tuple[str, str]]]:
    """Clocks that the board is seen to have meanwhile, in order."""
    found, over = [board.clocks], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            found.append(board.clocks)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def in_order(whole: TestBoard, sample: Sample) -> Iterator[Shown]:
    board = Shown(whole, sample)
    board.reset()
    yield board
    whole.mend()
    assert whole.quiet() and whole.jobs() == []
    assert board.soon_sound()


@pytest.fixture
def make(orin, tmp_path):
    """Makes targets for it, with `[jetson]` as given, and hangs up in the end."""
    made: list[Jetson] = []
    (tmp_path / ".deploy").mkdir()

    def one(extends: str = "jetson-orin-nano", **keys) -> Jetson:
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
        file = orin.board.file("orin", 'runtime = "ort"', f"jetson = {{ {table} }}", extends=extends)
        made.append(load_target(load_profile(str(file)), tmp_path / ".deploy"))
        return made[-1]

    yield one
    for target in made:
        target.board.close()


def test_a_session_in_another_mode_with_locked_clocks_leaves_the_board_as_it_was(shown, conv, tmp_path):
    """On a board of each JetPack, whose commands say what was recorded of it."""
    sample, (first, second) = shown.sample, shown.sample.modes
    keys = f'jetson = {{ power_mode = "{second[1]}", clocks = "locked", telemetry_ms = 200 }}'
    file = shown.board.file("sample", 'runtime = "ort"', keys, extends=sample.profile)
    (tmp_path / ".deploy").mkdir()
    target = load_target(load_profile(str(file)), tmp_path / ".deploy")
    assert isinstance(target, Jetson)
    try:
        with watched(shown) as held:
            session = target.measure({"a": conv("net")}, SHORT, "rank")
        model = (RECORDINGS / sample.recording / "device-tree" / "model").read_text().rstrip("\0")
        fingerprint = session.fingerprint
        assert (fingerprint.board, fingerprint.power_mode, fingerprint.machine) == (sample.board, second[1], model)
        assert fingerprint == target.fingerprint() and session.telemetry[f"power_mw {sample.rail} mean"] > 0
        assert (sample.clocks[1][1],) * 2 in held, "held at the highest of the mode meanwhile"
    finally:
        target.board.close()
    restored = ["restore", f"nvpmodel {first[0]}", "restore"]
    assert shown.sound and shown.done == [f"nvpmodel {second[0]}", "lock", *restored] * 2


def test_nothing_is_changed_where_nothing_is_asked_for(make, orin, conv):
    session = make(telemetry_ms=0).measure({"a": conv("net")}, SHORT, "rank")
    assert session.fingerprint.power_mode == "15W" and orin.done == []
    assert not [name for name in session.telemetry if name.startswith("power_mw")]


def test_the_mode_that_it_is_in_already_is_not_set_again(make, orin, conv):
    make(power_mode="15W").measure({"a": conv("net")}, SHORT, "rank")
    assert orin.done == []


def test_what_is_asked_for_is_refused_before_anything_is_changed(make, orin, conv):
    path = conv("net")
    with pytest.raises(UsageError, match=r"'board' has no power mode '25 W'\. Did you mean '25W'\?") as error:
        make(power_mode="25 W").measure({"a": path}, SHORT, "rank")
    assert "MAXN_SUPER" in error.value.hint
    with pytest.raises(UsageError, match=r"with the module p3767-0005; 'orin' is for p3834"):
        make("jetson-thor").measure({"a": path}, SHORT, "rank")
    (orin.place / "no_sudo").write_text("")
    with pytest.raises(DeployError, match=r"does not let its state be set: .*a password is required"):
        make(power_mode="25W").measure({"a": path}, SHORT, "rank")
    doctor = {condition.name: condition for condition in make(power_mode="25W").doctor()}
    assert not doctor["root for nvpmodel"].ok and "sudoers" in doctor["root for nvpmodel"].mend
    assert orin.done == [] and orin.sound


def test_a_mode_that_takes_a_restart_is_not_restarted_into(make, orin, conv):
    (orin.place / "restart_modes").write_text("2\n")
    with pytest.raises(DeployError, match="power mode 'MAXN_SUPER' takes a restart") as error:
        make(power_mode="MAXN_SUPER").measure({"a": conv("net")}, SHORT, "rank")
    assert "sudo nvpmodel -m 2" in error.value.hint
    assert not (orin.place / "restarted").exists() and orin.sound


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("36.4.3", "(JetPack 6.1 or 6.2)"),
        ("32.5.1", "(not in this tool's table)"),
        ("38.9.0", "(not in this tool's table)"),
        ("39.4.0", "(newer than this tool's table)"),
        ("40.1", "(newer than this tool's table)"),
    ],
)
def test_a_release_that_the_table_lacks_is_called_newer_only_where_it_is(release, said):
    assert _board({"machine": "M", "board": f"p3767-0005 L4T {release}"}) == f"M, p3767-0005 L4T {release} {said}"


def test_a_board_that_does_not_say_its_release_is_named_without():
    assert _board({"machine": "M", "board": "p3767-0005"}) == "M, p3767-0005"


def test_the_doctor_says_who_it_is(make):
    doctor = {condition.name: condition for condition in make().doctor()}
    assert doctor["board"].ok and doctor["board"].value.endswith("p3767-0005 L4T 36.4.3 (JetPack 6.1 or 6.2)")
    assert doctor["power mode"].value.startswith("15W of ")
    assert not {condition.name: condition for condition in make("jetson-nano").doctor()}["board"].ok


@pytest.fixture
def with_dla(orin):
    """Gives the board two DLAs, of which one is switched off, as on the modules that have fewer."""
    base = orin.place / "firmware" / "devicetree" / "base"
    for number, status in enumerate(("okay", "disabled")):
        node = base / "bus@0" / f"nvdla{number}@15880000"
        node.mkdir(parents=True)
        (node / "status").write_text(status + "\0")
    yield
    shutil.rmtree(base / "bus@0")


def test_a_dla_core_that_the_board_lacks_is_refused_before_anything_is_built(make, orin, with_dla):
    target = make()
    assert {c.name: c.value for c in target.doctor()}["DLA cores"] == "1"
    facts = target._plain_facts()
    target.runtime = TensorRT("tensorrt")
    for core, told in ((0, ""), (1, "has 1 DLA cores, and tensorrt.dla_core = 1 was asked for")):
        spec = target.profile.tensorrt.model_copy(update={"dla_core": core})
        target.profile = target.profile.model_copy(update={"tensorrt": spec})
        assert target._lacking_dla(facts) == told
    with pytest.raises(UsageError, match=r"'board' has 1 DLA cores") as error:
        target._check(facts)
    assert "tensorrt.dla_core" in error.value.hint
    target._check({**facts, "dla_cores": None})


def test_a_zone_that_is_switched_off_is_left_out(monkeypatch):
    """cv0-thermal of an Orin gives EAGAIN, always."""
    real = os.read

    def read(file, count):
        if os.readlink(f"/proc/self/fd/{file}").endswith("/status"):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(file, count)

    monkeypatch.setattr(os, "read", read)
    assert read_text("/proc/self/status") == "" and read_number("/proc/self/status") is None
    assert read_text("/proc/self/comm")


def test_a_command_that_is_still_at_work_when_its_job_dies_does_not_have_the_last_word(make, orin, conv):
    """jetson_clocks goes on after the job was killed: what it sets is given back after it has ended."""
    target = make(power_mode="25W", clocks="locked", telemetry_ms=0)
    target._known = True
    (orin.place / "slow").write_text("3")
    (orin.place / "slow").chmod(0o666)
    done: list[Session] = []
    thread = threading.Thread(target=lambda: done.append(target.measure({"a": conv("net")}, SHORT, "rank")))
    thread.start()
    while not (orin.place / "at_work").exists() and thread.is_alive():
        time.sleep(0.05)
    for process in orin.board.running("job"):
        process.send_signal(signal.SIGKILL)
    (orin.place / "slow").unlink()
    thread.join(60.0)
    assert not thread.is_alive() and len(done) == 1
    assert orin.done[:5] == ["nvpmodel 1", "lock", "restore", "nvpmodel 0", "restore"]
    assert orin.soon_sound()


def test_a_restore_that_says_nothing_of_what_it_did_not_do_is_done_again(make, orin, conv):
    """The scripts end with 0 where a line failed. Here the first two do nothing at all."""
    (orin.place / "idle_restores").write_text("2")
    (orin.place / "idle_restores").chmod(0o666)
    make(power_mode="25W", clocks="locked", telemetry_ms=0).measure({"a": conv("net")}, SHORT, "rank")
    assert orin.sound


def test_clocks_that_were_held_by_hand_are_held_again_after_another_mode(make, orin, conv):
    (orin.gpu / "min_freq").write_text("624750000\n")
    make(power_mode="25W", telemetry_ms=0).measure({"a": conv("net")}, SHORT, "rank")
    assert orin.mode == "0" and orin.clocks == ("624750000", "624750000")
    (orin.gpu / "min_freq").write_text("306000000\n")


def test_a_gpu_that_leaves_its_held_clock_contaminates_a_session(make, orin, conv):
    target = make(clocks="locked", telemetry_ms=0)
    moved: list[float] = []

    def slow_down(done: float) -> None:
        if done > 0.6 and not moved:
            moved.append(done)
            (orin.gpu / "cur_freq").write_text("510000000\n")

    session = target.measure({"a": conv("net"), "b": conv("net")}, LONG, "rank", slow_down)
    assert moved and all(0.05 < m.flagged_share < 0.95 for m in session.measurements.values())
    assert session.contamination == "more than 20 % of the blocks of a network were disturbed"


@pytest.mark.parametrize("throttling", ["1", "0"])
def test_over_current_voids_a_session_whether_or_not_it_is_said_to_lower_the_clock(make, orin, conv, throttling):
    target = make(telemetry_ms=0)
    assert target.measure({"a": conv("net")}, SHORT, "rank").telemetry["overcurrent_events"] == 0.0
    counter = orin.place / "sys_class" / "hwmon" / "hwmon3" / "oc1_event_cnt"
    (counter.parent / "oc1_throt_en").write_text(throttling + "\n")
    moved: list[float] = []

    def overload(done: float) -> None:
        if not moved:
            moved.append(done)
            counter.write_text("3\n")

    session = target.measure({"a": conv("net"), "b": conv("net")}, LONG, "rank", overload)
    counter.write_text("0\n")
    (counter.parent / "oc1_throt_en").write_text("1\n")
    assert moved and session.telemetry["overcurrent_events"] == 3.0
    judged = judge(session, "b", "a", Budget(ratio=2.0))
    assert judged.verdict == "undecided" and "overloaded 3 times" in str(judged.reason)


def test_rows_under_over_current_are_no_result_and_nothing_of_them_is_kept(make, orin, conv, tmp_path):
    target = make(telemetry_ms=0)
    counter = orin.place / "sys_class" / "hwmon" / "hwmon3" / "oc3_event_cnt"
    over = threading.Event()

    def overload() -> None:
        for count in itertools.count(1):
            write_whole(counter, f"{count}\n")
            if over.wait(0.002):
                return

    models = {key(data): data for data in (conv(f"row{n}", layers=n).read_bytes() for n in (1, 2, 3))}
    thread = threading.Thread(target=overload)
    with Store(tmp_path / "latency.sqlite") as store:
        clock = Clock(target, store)
        thread.start()
        try:
            with pytest.raises(UndecidedError, match=r"power supply was overloaded \d+ times meanwhile, 3 times in a"):
                clock.ratios(models)
        finally:
            over.set()
            thread.join()
        assert store.rows(clock.device, PROTOCOL, list(models)) == {}
        assert set(clock.ratios(models)) == set(models)
    write_whole(counter, "0\n")


def write_whole(path: Path, text: str) -> None:
    """So that whoever reads it meanwhile never sees an empty file."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def test_a_temporary_folder_that_is_full_does_not_keep_the_clocks_from_being_given_back(make, orin, conv):
    target = make(power_mode="25W", clocks="locked", telemetry_ms=0)
    filled: list[Path] = []

    def fill(done: float) -> None:
        if filled:
            return
        sshd = next(pid for pid in orin.board.do("pids").split() if psutil.Process(int(pid)).name() == "sshd")
        filled.append(Path(f"/proc/{sshd}/root/tmp/filler"))
        for pipe in filled[0].parent.glob("edge-deploy-*"):
            pipe.unlink()
        disk = os.statvfs(filled[0].parent)
        with filled[0].open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize)
        assert os.statvfs(filled[0].parent).f_bavail == 0

    try:
        target.measure({"a": conv("net")}, LONG, "rank", fill)
        assert filled and orin.sound
    finally:
        for file in filled:
            file.unlink()


@pytest.mark.parametrize("guard", ["alive", "dead too"])
def test_a_job_that_is_killed_leaves_nothing_changed(make, orin, conv, guard):
    """Its guard gives it back; where that is dead as well, the job that is started again does."""
    target = make(power_mode="25W", clocks="locked", telemetry_ms=0)
    killed: list[int] = []

    def kill(done: float) -> None:
        if killed:
            return
        words = ["drive", "worker", "job"] if guard == "alive" else ["guard", "drive", "worker", "job"]
        for word in words:
            for process in orin.board.running(word):
                killed.append(process.pid)
                process.send_signal(signal.SIGKILL)

    session = target.measure({"a": conv("net")}, LONG, "rank", kill)
    assert len(killed) >= 2 and session.fingerprint.power_mode == "25W"
    assert orin.soon_sound()


@pytest.mark.parametrize("how", ["asked to end", "killed"])
def test_a_job_that_nobody_comes_back_for_is_given_back(make, orin, conv, how):
    """By itself when it is asked to end, by its guard when it is killed."""
    target = make(power_mode="25W", clocks="locked", telemetry_ms=0)

    def leave(done: float) -> None:
        if how == "killed":
            for word in ("drive", "job"):
                for process in orin.board.running(word):
                    process.send_signal(signal.SIGKILL)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        target.measure({"a": conv("net")}, LONG, "rank", leave)
    assert orin.soon_sound() and orin.done[-5:] == ["nvpmodel 1", "lock", "restore", "nvpmodel 0", "restore"]


def test_a_restart_in_the_middle_gives_the_mode_back_and_leaves_the_new_clocks_alone(make, orin, conv):
    target = make(power_mode="25W", clocks="locked", telemetry_ms=0)
    restarted: list[str] = []

    def restart(done: float) -> None:
        if not restarted:
            restarted.append(orin.mode)
            orin.board.do("reboot")

    session = target.measure({"a": conv("net")}, LONG, "rank", restart)
    assert restarted == ["1"] and session.fingerprint.power_mode == "25W"
    assert orin.mode == "0" and orin.soon_sound()
