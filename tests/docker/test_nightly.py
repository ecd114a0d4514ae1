"""nightly.sh, run for real: a stand-in for `deploy` gives the exit codes, what the script makes of them is tested."""

from __future__ import annotations

import itertools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docker" / "nightly.sh"

STAND_IN = r"""#!/bin/sh
# Does what the files under $FAKE say, and writes down how it was asked.
{ printf '%s\t' "$@"; echo; } >>"$FAKE/asked"
if [ "$1 $2" = "baseline show" ]; then
    cat "$FAKE/baselines.json"
    exit "$(cat "$FAKE/baselines.code")"
fi
while [ $# -gt 0 ]; do
    case $1 in
        --target) target=$2 ;;
        --junit) junit=$2 ;;
        --markdown) markdown=$2 ;;
        --html) html=$2 ;;
    esac
    shift
done
mkdir "$FAKE/running" || exit 99 # two checks at once
name=$(printf '%s' "$target" | tr / _)
plan="$FAKE/plans/of $name"
if [ -e "$plan/waits" ]; then
    trap 'echo INT >>"$FAKE/signals"; rmdir "$FAKE/running"; exit 130' INT
    [ ! -e "$plan/stubborn" ] || trap 'echo INT >>"$FAKE/signals"' INT
    echo "$$" >"$FAKE/pid"
    while :; do sleep 0.05; done
fi
[ ! -e "$plan/junit" ] || cat "$plan/junit" >"$junit"
[ ! -e "$plan/junit" ] || echo report | tee "$markdown" >"$html"
cat "$plan/stdout"
cat "$plan/stderr" >&2
rmdir "$FAKE/running"
exit "$(cat "$plan/code")"
"""

OUTCOMES = {0: "pass", 1: "", 2: "", 3: "fail", 4: "undecided"}
PASSED = '<testsuite name="deploy check"><testcase classname="deploy.check.board" name="a against b"/></testsuite>'


@dataclass
class Night:
    """A folder with baselines, and the stand-in in its own bin folder."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "state" / "runs" / "nightly"

    @property
    def deploy(self) -> Path:
        return self.folder / "bin" / "deploy"

    def prepare(self) -> Night:
        for part in ("bin", "fake/plans", "state"):
            (self.folder / part).mkdir(parents=True)
        self.deploy.write_text(STAND_IN)
        self.deploy.chmod(0o755)
        (self.folder / "bin" / "python3").symlink_to(sys.executable)
        return self.baselines()

    def baselines(self, *names: str, code: int = 0, text: str | None = None) -> Night:
        pins = [{"profile": name, "name": "net", "sha256": "0" * 64, "accepted": "2026-01-01"} for name in names]
        (self.folder / "fake" / "baselines.json").write_text(json.dumps({"baselines": pins}) if text is None else text)
        (self.folder / "fake" / "baselines.code").write_text(str(code))
        return self

    def plan(
        self, name: str, code: int = 0, outcome: str = "pass", stdout: str | None = None, reason: str = "1.001x",
        stderr: str = "", junit: str | None = PASSED, waits: bool = False, stubborn: bool = False,
    ) -> Night:  # fmt: skip
        plan = self.folder / "fake" / "plans" / f"of {name.replace(chr(47), chr(95))}"
        plan.mkdir()
        told = json.dumps({"outcome": outcome, "reason": reason, "exit_code": code}) + "\n"
        (plan / "stdout").write_text(told if stdout is None else stdout)
        (plan / "stderr").write_text(stderr)
        (plan / "code").write_text(str(code))
        for present, file, text in ((junit, "junit", junit), (waits, "waits", ""), (stubborn, "stubborn", "")):
            if present:
                (plan / file).write_text(text or "")
        return self

    def environment(self, **more: str) -> dict[str, str]:
        """As poor as cron's, but for the folder of the stand-in."""
        return {"PATH": f"{self.deploy.parent}:/usr/bin:/bin", "FAKE": str(self.folder / "fake"), **more}

    def arguments(self, *more: str) -> list[str]:
        return [str(SCRIPT), "--project", str(self.folder / "state"), *more]

    def start(self, *more: str, **env: str) -> subprocess.Popen[str]:
        """Begin it as cron does: no terminal, a session of its own."""
        return subprocess.Popen(
            self.arguments(*more), env=self.environment(**env), cwd=self.folder, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *more: str, **env: str) -> tuple[int, str, str]:
        """Run it to its end: exit code, stdout, stderr."""
        return self.finish(self.start(*more, **env))

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str, str]:
        try:
            out, err = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        return process.returncode, out, err

    def asked(self) -> list[list[str]]:
        """Arguments of every call of the stand-in, in order."""
        file = self.folder / "fake" / "asked"
        return [line.split("\t")[:-1] for line in file.read_text().splitlines()] if file.exists() else []

    def targets(self) -> list[str]:
        return [call[2] for call in self.asked() if call[0] == "check"]

    def reports(self) -> list[Path]:
        """The newest night's folder of each profile, by name."""
        night = max(self.out.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return sorted(path for path in night.iterdir() if path.is_dir())

    def running_check(self) -> int:
        """Wait for the stand-in to say that it waits, and give its process id."""
        file = self.folder / "fake" / "pid"
        for _ in range(400):
            if file.exists() and file.read_text().strip():
                return int(file.read_text())
            time.sleep(0.025)
        raise AssertionError("no check was begun")

    def signals(self) -> list[str]:
        file = self.folder / "fake" / "signals"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path / "a night").prepare()


def rows(out: str) -> dict[str, list[str]]:
    """Of the closing table, by profile without spaces: verdict and exit code."""
    lines = out.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("profile "))
    column = lines[head].index("verdict")
    table = itertools.takewhile(lambda line: "; reports in " not in line, lines[head + 1 :])
    cut = [(line[:column].strip(), line[column : column + 13].strip(), line[column + 13 :].split()) for line in table]
    return {name: [verdict, rest[0]] for name, verdict, rest in cut}


def result(file: Path) -> tuple[str, str, str]:
    """Profile, kind of result ("" for a pass) and message of a JUnit file with one case."""
    [case] = ElementTree.parse(file).getroot().iter("testcase")
    inner = list(case)
    name = case.attrib["classname"].removeprefix("deploy.check.")
    return (name, inner[0].tag, inner[0].attrib["message"]) if inner else (name, "", "")


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for any more counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# --- exit codes ------------------------------------------------------------------------------------------------------

SETS = [codes for size in range(1, 6) for codes in itertools.combinations(OUTCOMES, size)]


def expected(codes: Sequence[int]) -> int:
    """The worst, in the order in which the page on nightly checks gives them."""
    return next(code for code in (1, 2, 3, 4, 0) if code in codes)


@pytest.mark.parametrize("codes", SETS, ids=lambda codes: "".join(map(str, codes)))
def test_every_profile_is_checked_and_the_worst_code_is_the_exit_code(night: Night, codes: tuple[int, ...]):
    order = codes if len(codes) % 2 else codes[::-1]  # the worst comes first in half of them and last in the others
    night.baselines(*(f"board-{code}" for code in order))
    for code in order:
        night.plan(f"board-{code}", code, OUTCOMES[code])
    exit_code, out, err = night.run()
    assert (exit_code, err) == (expected(codes), "")
    assert night.targets() == [f"board-{code}" for code in order]
    words = {0: "pass", 1: "error", 2: "mistake", 3: "fail", 4: "undecided"}
    assert rows(out) == {f"board-{code}": [words[code], str(code)] for code in order}


@pytest.mark.parametrize("code", [99, 124, 127, 130, 137])
def test_any_other_code_is_a_broken_check(night: Night, code: int):
    night.baselines("one", "two").plan("one", code, "").plan("two", 3, "fail")
    exit_code, out, _ = night.run()
    assert exit_code == 1
    assert rows(out)["one"] == ["error", str(code)]


@pytest.mark.parametrize(
    ("outcome", "code"), [("pass", 0), ("warn", 0), ("improved", 0), ("fail", 3), ("undecided", 4), ("inconclusive", 4)]
)
def test_the_verdict_and_its_sentence_stand_in_the_closing_table_and_in_its_file(night: Night, outcome: str, code: int):
    night.baselines("board").plan("board", code, outcome, reason="p50 is 1.0213x, bounds 1.0201 to 1.0226")
    exit_code, out, _ = night.run()
    assert (exit_code, rows(out)["board"]) == (code, [outcome, str(code)])
    assert "p50 is 1.0213x, bounds 1.0201 to 1.0226" in out and f"1 profile: 1 {outcome}; reports in" in out
    [summary] = night.out.glob("*/summary.txt")
    assert summary.read_text() in out


@pytest.mark.parametrize(
    "stdout",
    ["", "{", "[]", "null", "{}", '{"outcome": "inconclusive"}', '{"outcome": 3}', '{"outcome": "fail"}', "\x00\xff"],
)
def test_a_zero_without_a_verdict_that_passes_is_not_measured_and_never_a_pass(night: Night, stdout: str):
    exit_code, out, _ = night.baselines("board").plan("board", 0, stdout=stdout).run()
    assert exit_code == 4
    assert rows(out)["board"] == ["not measured", "4"]
    [folder] = night.reports()
    name, kind, message = result(folder / "junit.xml")
    assert (name, kind) == ("board", "error") and "it ended with 0, but its verdict is" in message


def test_the_sentence_of_an_error_is_deploys_own(night: Night):
    told = json.dumps({"error": "the device 'orin' is in use by eve@lab.", "hint": "wait.", "exit_code": 4})
    _, out, _ = night.baselines("orin").plan("orin", 4, stdout=told).run()
    assert "the device 'orin' is in use by eve@lab." in out and rows(out)["orin"] == ["not measured", "4"]


def test_a_crash_is_told_by_the_last_line_that_deploy_wrote(night: Night):
    night.baselines("orin").plan("orin", 1, stdout="", stderr="Traceback\nZeroDivisionError: division\n", junit=None)
    exit_code, out, _ = night.run()
    assert exit_code == 1 and "ZeroDivisionError: division" in out
    [folder] = night.reports()
    assert (folder / "log").read_text() == "Traceback\nZeroDivisionError: division\n"
    assert result(folder / "junit.xml") == ("orin", "error", "ZeroDivisionError: division")


# --- what is written -------------------------------------------------------------------------------------------------


def test_reports_lie_in_a_folder_of_the_date_and_deploys_own_are_kept(night: Night):
    night.baselines("board").plan("board").run()
    [folder] = night.reports()
    assert folder.parent.parent == night.out and time.strptime(folder.parent.name, "%Y-%m-%d")
    assert sorted(file.name for file in folder.iterdir()) == [
        "check.json", "junit.xml", "log", "report.html", "report.md",
    ]  # fmt: skip
    assert (folder / "junit.xml").read_text() == PASSED
    assert json.loads((folder / "check.json").read_text())["outcome"] == "pass"


def test_a_second_run_of_a_day_leaves_the_first_alone(night: Night):
    night.baselines("board").plan("board")
    night.run()
    [before] = night.out.glob("*/board/check.json")
    written = before.stat().st_mtime_ns
    night.run()
    assert before.stat().st_mtime_ns == written
    assert sorted(path.name[10:] for path in night.out.iterdir()) == ["", "-2"]


@pytest.mark.parametrize("code", [0, 1, 3])
def test_a_check_without_a_junit_file_gets_one(night: Night, code: int):
    reason = 'a "quote" & <tag> | 5 % \t tab'
    night.baselines("board").plan("board", code, OUTCOMES[code], reason=reason, junit=None).run()
    [folder] = night.reports()
    name, kind, message = result(folder / "junit.xml")
    assert (name, kind) == ("board", {0: "", 1: "error", 3: "failure"}[code])
    assert message == ("" if code == 0 else 'a "quote" & <tag> | 5 % tab')


def test_names_with_spaces_and_signs_stay_whole_and_get_folders_of_their_own(night: Night):
    names = ["my board", "my_board", "lab/orin nano", "..", "-x", "$(touch oops)", "a'b\"c*", "Gerät 7", "<&|>"]
    night.baselines(*names)
    for name in names:
        night.plan(name, junit=None)
    exit_code, out, err = night.run()
    assert (exit_code, err) == (0, "")
    assert night.targets() == names
    assert sorted(result(folder / "junit.xml")[0] for folder in night.reports()) == sorted(names)
    assert all(name in out for name in names) and not list(night.folder.rglob("oops"))


def test_a_profile_with_several_pins_is_checked_once(night: Night):
    night.baselines("b", "a", "b").plan("a").plan("b").run()
    assert night.targets() == ["b", "a"]


def test_a_profile_of_the_users_own_is_given_as_its_file(night: Night):
    (night.folder / "boards").mkdir()
    file = night.folder / "boards" / "mine.toml"
    file.write_text('extends = "local"\n')
    night.baselines("mine", "local").plan(str(file)).plan("local")
    exit_code, out, _ = night.run("--profiles", "boards")
    assert (exit_code, night.targets()) == (0, [str(file), "local"])
    assert list(rows(out)) == ["mine", "local"]


def test_the_file_that_a_baseline_was_accepted_with_is_checked_where_it_still_is(night: Night):
    (night.folder / "boards").mkdir()
    own, other = (night.folder / "boards" / name for name in ("arm2.toml", "mine.toml"))
    for file in (own, other):
        file.write_text('extends = "local"\n')
    pins = {"my arm": str(own), "mine": str(own), "gone": "/nowhere/gone.toml", "local": None, "odd]$(oops)": "a\tb"}
    told = [{"profile": name, "file": file} for name, file in pins.items()]
    night.baselines(text=json.dumps({"baselines": told}))
    for target in (str(own), str(other), "gone", "local", "odd]$(oops)"):
        night.plan(target)
    code, out, err = night.run("--profiles", "boards")
    assert (code, err) == (0, "") and list(rows(out)) == list(pins)
    assert night.targets() == [str(own), str(other), "gone", "local", "odd]$(oops)"]


def test_on_github_what_does_not_pass_is_annotated_and_the_table_joins_the_summary(night: Night, tmp_path: Path):
    night.baselines("a", "b, c", "d")
    night.plan("a").plan("b, c", 3, "fail", reason="100 %").plan("d", 0, "warn", reason="x|y")
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    _, out, _ = night.run(GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(summary))
    notes = [line for line in out.splitlines() if line.startswith("::")]
    assert notes == [
        "::error title=nightly check of b%2C c::fail: 100 %25",
        "::warning title=nightly check of d::warn: x|y",
    ]
    text = summary.read_text()
    assert text.startswith("before\n") and "| b, c | fail | 3 |" in text and "x&#124;y" in text


# --- nothing to check, or no way to ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 4])
def test_no_baseline_at_all_is_not_a_pass(night: Night, code: int):
    exit_code, out, err = night.baselines(code=code).run()
    assert (exit_code, out) == (4, "")
    assert f"no profile has a baseline in '{night.folder}/state/.deploy', so nothing was checked." in err
    assert "deploy baseline accept RUN --target T" in err


@pytest.mark.parametrize(("code", "expected"), [(1, 1), (2, 2), (3, 1), (139, 1)])
def test_baselines_that_cannot_be_listed_are_broken(night: Night, code: int, expected: int):
    exit_code, _, err = night.baselines("a", code=code).run()
    assert exit_code == expected and "'deploy baseline show --json'" in err and night.targets() == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", *(json.dumps({"baselines": [pin]}) for pin in ({}, {"profile": 3}, {"profile": ""}))],
)
def test_a_list_that_cannot_be_read_is_broken_not_empty(night: Night, text: str):
    exit_code, _, err = night.baselines(text=text).run()
    assert exit_code == 1 and "lists no baselines that can be read" in err and "Traceback" not in err


def test_a_folder_that_cannot_be_written_stops_it_before_anything_is_measured(night: Night):
    (night.folder / "file").write_text("")
    exit_code, _, err = night.baselines("a").plan("a").run("--out", str(night.folder / "file" / "reports"))
    assert exit_code == 1 and f"cannot write reports into '{night.folder}/file/reports'; nothing was checked." in err
    assert night.asked() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_stops_it_too(night: Night):
    locked = night.folder / "locked"
    locked.mkdir(mode=0o555)
    exit_code, _, err = night.baselines("a").plan("a").run("--out", str(locked))
    assert exit_code == 1 and "cannot write reports" in err and night.asked() == []


def test_one_profile_whose_folder_cannot_be_made_does_not_stop_the_others(night: Night):
    long = "x" * 300  # longer than a file name may be
    exit_code, out, _ = night.baselines(long, "b").plan("b").run()
    assert exit_code == 1 and night.targets() == ["b"]
    assert rows(out)[long] == ["error", "1"] and rows(out)["b"] == ["pass", "0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fast"], "no option '--fast'."),
        (["--out"], "--out needs a value."),
        (["--limit", "soon"], "--limit soon is no whole number of seconds."),
        (["--limit", "0"], "--limit 0 is no whole number of seconds."),
        (["--project", "/nowhere at all"], "there is no folder '/nowhere at all'."),
        (["--profiles", "/nowhere"], "there is no folder '/nowhere'."),
    ],
)
def test_a_mistake_in_its_arguments_is_exit_2_with_a_sentence(night: Night, arguments: list[str], said: str):
    exit_code, out, err = night.run(*arguments)
    assert (exit_code, out) == (2, "") and f"Error: {said}" in err and night.asked() == []


def test_help_names_every_option_and_exit_code(night: Night):
    exit_code, out, err = night.run("--help")
    assert (exit_code, err) == (0, "")
    assert all(name in out for name in ("--project", "--out", "--profiles", "--limit", "Exit code"))


# --- cron ------------------------------------------------------------------------------------------------------------


def cron(night: Night, script: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script with cron's PATH and no more than what is given."""
    poor = {"PATH": "/usr/bin:/bin", "FAKE": str(night.folder / "fake"), **env}
    return subprocess.run(
        [script, "--project", night.folder / "state"], env=poor, cwd="/", stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_under_cron_deploy_is_named_or_found_in_the_environment_beside_the_script(night: Night):
    night.baselines("board").plan("board")
    assert cron(night, SCRIPT, DEPLOY=str(night.deploy)).returncode == 0
    tool = night.folder / "tool"
    (tool / "docker").mkdir(parents=True)
    (tool / ".venv").mkdir()
    shutil.copy(SCRIPT, tool / "docker")
    (tool / ".venv" / "bin").symlink_to(night.deploy.parent)
    done = cron(night, tool / "docker" / "nightly.sh")
    assert (done.returncode, done.stderr) == (0, "")
    assert night.targets() == ["board", "board"]


def test_without_deploy_it_says_so(night: Night):
    (night.folder / "docker").mkdir()
    script = Path(shutil.copy(SCRIPT, night.folder / "docker"))
    for env, name in (({}, "deploy"), ({"DEPLOY": "/nowhere/deploy"}, "/nowhere/deploy")):
        done = cron(night, script, **env)
        assert done.returncode == 1 and f"there is no program '{name}'." in done.stderr


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_running_check_politely_and_reports(night: Night, number: signal.Signals):
    night.baselines("done", "runs", "waits").plan("done").plan("runs", waits=True).plan("waits")
    process = night.start()
    pid = night.running_check()
    process.send_signal(number)
    exit_code, out, err = night.finish(process)
    assert (exit_code, err) == (128 + number, "")
    assert night.signals() == ["INT"] and gone(pid)
    assert night.targets() == ["done", "runs"]
    assert rows(out) == {"done": ["pass", "0"], "runs": ["interrupted", "130"], "waits": ["not run", "4"]}
    said = {name: (kind, message) for name, kind, message in (result(f / "junit.xml") for f in night.reports())}
    assert said["runs"] == ("error", f"ended by {number.name}.")
    assert said["waits"] == ("error", f"ended by {number.name} before it.")
    assert next(night.out.glob("*/summary.txt")).read_text() in out


def test_a_check_that_was_done_before_the_signal_keeps_its_verdict(night: Night):
    """The stand-in listens to the signal, and has its verdict all the same."""
    night.baselines("done", "later").plan("done", 3, "fail", waits=True).plan("later")
    listens = 'trap \'echo INT >>"$FAKE/signals"; rmdir "$FAKE/running"; exit 130\' INT'
    assert listens in STAND_IN
    ends = STAND_IN.replace(listens, "trap 'waits=no' INT").replace("while :;", 'while [ -z "$waits" ];')
    night.deploy.write_text(ends)
    process = night.start()
    night.running_check()
    process.send_signal(signal.SIGTERM)
    exit_code, out, _ = night.finish(process)
    assert exit_code == 143 and rows(out) == {"done": ["fail", "3"], "later": ["not run", "4"]}


def test_a_signal_before_the_first_check_begins_none(night: Night):
    night.baselines("board").plan("board")
    quick = '    cat "$FAKE/baselines.json"\n'
    night.deploy.write_text(STAND_IN.replace(quick, f'    touch "$FAKE/listing"; sleep 0.5\n{quick}'))
    process = night.start()
    while not (night.folder / "fake" / "listing").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    exit_code, _, _ = night.finish(process)
    assert exit_code == 143 and night.targets() == []


def test_a_second_signal_ends_a_check_that_does_not_listen(night: Night):
    night.baselines("deaf").plan("deaf", waits=True, stubborn=True)
    process = night.start()
    pid = night.running_check()
    process.send_signal(signal.SIGTERM)
    while not night.signals():
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    exit_code, out, err = night.finish(process)
    assert time.monotonic() - begun < 10, "it waited for the grace"
    assert (exit_code, err) == (143, "") and gone(pid) and rows(out)["deaf"][0] == "interrupted"


def test_ctrl_c_at_a_terminal_reaches_the_check_once(night: Night):
    night.baselines("runs", "later").plan("runs", waits=True).plan("later")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(night.folder)
        os.execve(SCRIPT, night.arguments(), night.environment())
    pid = night.running_check()
    os.write(terminal, b"\x03")
    text = b""
    try:
        while part := os.read(terminal, 4096):
            text += part
    except OSError:  # a terminal whose other side is closed
        pass
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert night.signals() == ["INT"] and gone(pid) and night.targets() == ["runs"]
    assert b"interrupted" in text and b"not run" in text


def test_a_check_over_the_limit_is_ended_and_the_next_one_runs(night: Night):
    night.baselines("hangs", "fine").plan("hangs", waits=True).plan("fine")
    exit_code, out, err = night.run("--limit", "1")
    assert (exit_code, err) == (1, "") and night.signals() == ["INT"]
    assert rows(out) == {"hangs": ["error", "124"], "fine": ["pass", "0"]}
    assert "it was ended after the limit of 1 s." in out


# --- the real deploy -------------------------------------------------------------------------------------------------


def test_what_it_asks_of_deploy_is_what_deploy_knows(night: Night):
    import click

    from pipeline.cli import app

    night.baselines("board").plan("board").run()
    listed, checked = night.asked()
    commands = {name: app.get_command(click.Context(app), name) for name in ("baseline", "check")}
    show = commands["baseline"]
    assert isinstance(show, click.Group) and listed[1] in show.commands
    for call, command in ((listed[2:], show.commands[listed[1]]), (checked[1:], commands["check"])):
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in call if word.startswith("--")} <= known


def test_a_profile_of_the_users_own_is_found_by_its_baseline_alone(night: Night):
    boards = night.folder / "boards"
    boards.mkdir()
    (boards / "arm2.toml").write_text('extends = "simulated"\nname = "my arm"\n')
    night.deploy.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline.cli "$@"\n')
    model = write_net(night.folder / "a.onnx")
    env = night.environment(PYTHONPATH=str(ROOT), HOME=str(night.folder))
    words = [str(night.deploy), "baseline", "accept", str(model), "--target", "../boards/arm2.toml"]
    subprocess.run(words, cwd=night.folder / "state", env=env, check=True, capture_output=True)
    code, out, err = night.run(PYTHONPATH=str(ROOT), HOME=str(night.folder))
    assert (code, err) == (0, "") and rows(out) == {"my arm": ["pass", "0"]}
    (folder,) = night.reports()
    assert json.loads((folder / "check.json").read_text())["profile"] == "my arm"


def write_net(path: Path) -> Path:
    """One convolution."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "w")
    ports = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 8, 8]) for name in "xy")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)
    graph = helper.make_graph([node], "net", [next(ports)], [next(ports)], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
