"""A check and its history as text, JSON, Markdown, JUnit and pages: what was not measured never reads as a pass."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import made_checks as made
import pytest
from rich.console import Console

from pipeline.nouns import Change, CheckRecord, LayerMove, Ledger
from pipeline.report import check, check_rows, history, numbers
from pipeline.report.check_html import check_page
from pipeline.report.escape import markdown, printable
from profiles.schema import CheckSpec
from targets.harness.compare import BASELINE, EXIT_CODES, Tail, noticed
from targets.harness.measurement import Interval, Session

OUTCOMES = tuple(EXIT_CODES)
BAD = "<script>alert(1)</script>|`x`\x1b[31m\u202e$a$ @b"


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return [made.arms(0.03, seed=1), made.arms(0.03, processes=16, seed=2)]


@pytest.fixture(scope="module")
def failed(sessions: list[Session]) -> CheckRecord:
    return made.record("fail", [made.stage(own, number) for number, own in enumerate(sessions, start=1)])


@pytest.fixture(scope="module")
def page(failed: CheckRecord, sessions: list[Session]) -> str:
    return check_page(failed, sessions)


def spoilt(sessions: list[Session]) -> CheckRecord:
    reason = "the baseline scatters by 2.1% between processes, beyond 1.5%"
    lost = replace(made.stage(sessions[0], 1, reason), detectable=math.inf)
    return made.record("inconclusive", [lost])


def shown(record: CheckRecord, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    check.show(record, console)
    return console.file.getvalue()


# --- text ------------------------------------------------------------------------------------------------------------


def test_the_first_line_is_the_verdict_with_its_reason(failed: CheckRecord):
    assert shown(failed, width=60).splitlines()[0] == f"fail: {failed.verdict.reason}"


def test_a_fail_shows_its_stages_arms_environment_layers_and_ledger(failed: CheckRecord):
    lines = [" ".join(line.split()) for line in shown(failed).splitlines()]
    first, second = failed.verdict.stages
    assert f"latency ratio {numbers.interval(first.ratio)} {numbers.interval(second.ratio)}" in lines
    assert f"control {numbers.interval(first.control)} {numbers.interval(second.control)}" in lines
    assert "tail: p99 1.3600 [1.2800, 1.4500] risen 1.3600 [1.2800, 1.4500] risen" in lines
    assert "smallest slowdown 1.1 % 1.1 %" in lines and "processes 8 16" in lines
    assert "candidate 0.837 ms 0.870 ms too few samples" in lines
    assert "runtime version 1.31.1 1.32.0" in lines
    assert "/layer1/1/Conv Conv 0.0180 ms 0.0394 ms +0.0214 ms 90 %" in lines
    assert "The smallest slowdown this run could have seen is 1.1 %." in lines
    assert any(line.startswith("5 of 412 controls") and "1.2 %" in line and "1.25x" in line for line in lines)
    assert any(line.startswith("Advisory: baseline p50 moved from 0.811 ms to 0.905 ms (+11.6 %)") for line in lines)
    assert "Not in order: load is 1.90 on 2 cores." in lines


def test_the_table_of_stages_fits_a_terminal_of_eighty_columns(failed: CheckRecord):
    lines = shown(failed, width=80).splitlines()
    assert any(line.startswith("latency ratio") and line.count("]") == 2 for line in lines)


def test_the_layers_are_the_eight_that_moved_most_and_tell_how_much_they_hold():
    steps = {3: -0.05, 9: 0.02, 30: 0.2, **{i: 0.001 * i for i in range(10, 20)}}
    record = made.record("fail", layers=made.layers(41, steps))
    grid = check_rows.layers(record)
    assert grid is not None and len(grid.rows) == 8
    moved = [layer.candidate_ms - layer.baseline_ms for layer in check_rows.moved(record)]
    assert moved == sorted(moved, key=lambda step: -abs(step)) and moved[0] == pytest.approx(0.2)
    whole = sum(layer.candidate_ms - layer.baseline_ms for layer in record.layers)
    assert grid.note == (
        f"8 of 41 layers hold {numbers.signed_ms(sum(moved))} of {numbers.signed_ms(whole)} "
        f"({100 * sum(moved) / whole:.0f} % of the whole change)."
    )


def test_layers_that_did_not_move_are_not_listed():
    record = made.record("fail", layers=(*made.layers(20, {}), LayerMove("new", "Conv", 0.0, 0.4)))
    assert [layer.name for layer in check_rows.moved(record)] == ["new"]


def test_layers_that_cancel_out_have_no_share_of_a_change():
    pair = (LayerMove("a", "Conv", 0.5, 0.75), LayerMove("b", "Conv", 0.75, 0.5))
    grid = check_rows.layers(made.record("fail", layers=pair))
    assert grid is not None and [row[-1] for row in grid.rows] == ["–", "–"] and "%" not in grid.note


def test_a_spoilt_stage_could_not_have_seen_anything(sessions: list[Session]):
    record = spoilt(sessions)
    assert check_rows.detectable(record) is None
    told = shown(record)
    assert "This run could not have seen a slowdown of any size: the baseline scatters" in told
    assert "The smallest slowdown this run could have seen" not in told


def test_a_check_that_never_measured_is_told_without_numbers():
    told = shown(made.record("inconclusive", absolute={}, changed={}, ledger=Ledger(0, 0, 1.0)))
    assert told.startswith("inconclusive: ")
    assert "could not have seen a slowdown of any size: it was not measured" in told
    assert "No control was kept before this check" in told and "stage 1" not in told


@pytest.mark.parametrize("slowdown", [0.00748, 0.0099, 0.01, 0.0113, 0.2])
def test_what_would_have_been_noticed_has_the_digits_that_the_table_has(slowdown):
    share = noticed(slowdown).removeprefix("a slowdown of ").partition(" %")[0]
    assert float(share) == float(numbers.share(slowdown).removesuffix(" %"))


def test_deadline_misses_are_told_as_two_ratios_and_a_p_value():
    tail = Tail("deadline misses", Interval(0.0042, 0.0004, 0.00031, 0.0, 8), True)
    assert check_rows.tail_cell(tail) == "0.04 % → 0.42 %, p = 0.0003 risen"


def test_a_budget_that_the_baseline_misses_too_is_told_beside_its_numbers(failed: CheckRecord):
    tail = Tail("budget 8ms@p99", Interval(1.1, 1.05, 1.2, 0.0, 8), False, True)
    assert check_rows.tail_cell(tail) == "1.1000 [1.0500, 1.2000] over, as is the baseline"
    stage = replace(failed.verdict.stages[0], tails=(tail,))
    (told,) = check.to_json(made.record("warn", [stage]))["stages"][0]["tails"]
    assert told["shared"] is True and told["risen"] is False


def test_a_candidate_alone_over_its_budget_is_told_beside_its_numbers():
    tail = Tail("budget 8ms@p99", Interval(1.1, 1.05, 1.2, 0.0, 8), False)
    assert check_rows.tail_cell(tail) == "1.1000 [1.0500, 1.2000] over"
    stage = replace(made.stage(made.arms(0.0), 1), tails=(tail,))
    (told,) = check.to_json(made.record("warn", [stage]))["stages"][0]["tails"]
    assert told["over"] is True and told["shared"] is False


def test_two_engines_are_said_to_be_one_build_each(failed: CheckRecord):
    said = check_rows.ONE_BUILD
    for runtime, told in (("tensorrt", True), ("tensorrt-rtx", True), ("onnxruntime", False)):
        own = replace(failed, baseline=replace(failed.baseline, fingerprint={"runtime": runtime}))
        assert (said in check_rows.sentences(own)) == (said in check_page(own, [])) == told
        same = replace(own, candidate=replace(own.candidate, sha256=own.baseline.sha256))
        assert said not in check_rows.sentences(same), "one engine is compared with itself"


def test_one_artifact_on_both_sides_is_called_a_check_of_the_environment(failed: CheckRecord):
    same = replace(failed, candidate=replace(failed.candidate, sha256=failed.baseline.sha256))
    said = f"fail: (the same file: a check of the environment) {failed.verdict.reason}"
    assert shown(same, width=60).splitlines()[0] == said
    assert check.to_json(same)["reason"] == said.removeprefix("fail: ")
    assert said.removeprefix("fail: ") in check.to_markdown(same).splitlines()[0].replace("\\", "")
    (case,) = junit([same]).iter("testcase")
    assert str(case[0].get("message")).startswith(said.rstrip("."))
    assert [row[2] for row in history.nights([same, failed]).rows] == [
        "resnet20-tonight (the same file)", "resnet20-tonight",
    ]  # fmt: skip
    console = Console(file=io.StringIO(), width=140)
    history.show_history([same], console)
    assert "the same file: a check of the environment" in console.file.getvalue()
    assert "the same file" not in shown(failed)


def test_the_smallest_slowdown_is_said_once(failed: CheckRecord, sessions: list[Session]):
    reason = f"slower: latency +3.02 %; {noticed(failed.verdict.stages[-1].detectable)}."
    record = replace(failed, verdict=replace(failed.verdict, reason=reason))
    (case,) = junit([record]).iter("testcase")
    forms = (shown(record), check.to_markdown(record), str(case[0].get("message")), check_page(record, sessions))
    for form in forms:
        assert form.count("would have been noticed") == 1 and "could have seen" not in form


def test_a_simulated_check_says_so_in_every_form(failed: CheckRecord):
    simulated = replace(failed, simulated=True)
    for record, says in ((simulated, True), (failed, False)):
        forms = (shown(record), check.to_markdown(record), check.to_junit([record]), check_page(record, []))
        assert [("simulated device" in form) for form in forms] == [says] * 4
        assert check.to_json(record)["simulated"] is says


def test_a_check_that_broke_off_after_a_stage_could_not_have_seen_anything(failed: CheckRecord):
    broken = made.record("inconclusive", failed.verdict.stages[:1])
    assert check_rows.detectable(broken) is None
    assert "This run could not have seen a slowdown of any size: it broke off." in shown(broken)


def test_what_the_device_was_when_the_baseline_was_accepted_is_compared_or_not_known(failed: CheckRecord):
    assert "The device has changed since the baseline was accepted: runtime version, power." in shown(failed)
    still = replace(failed, changed={})
    assert "so what changed since is not known" in shown(still)
    told = replace(still, baseline=replace(still.baseline, fingerprint=made.PRINT.to_table()))
    assert "Nothing that the device tells of itself has changed" in shown(told)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_is_strict_and_holds_the_verdict_with_its_numbers(failed: CheckRecord, sessions: list[Session]):
    for record in (failed, spoilt(sessions), made.record("undecided")):
        told = json.loads(json.dumps(check.to_json(record), allow_nan=False))
        assert told["outcome"] == record.verdict.outcome and told["exit_code"] == EXIT_CODES[record.verdict.outcome]
    told = check.to_json(failed)
    assert told["detectable"] == 0.0113 and told["ledger"] == {"controls": 412, "alarms": 5, "widened": 1.25,
                                                               "rate": 5 / 412}  # fmt: skip
    ratio = failed.verdict.stages[0].ratio
    assert told["stages"][0]["ratio"]["bounds"] == [ratio.low, ratio.high]
    assert told["absolute_ms"]["candidate"]["p99"] is None and told["tolerances"]["fail"] == 0.02
    assert told["layers"][7]["change_ms"] == pytest.approx(0.0214)
    assert told["changed"]["runtime_version"] == {"then": "1.31.1", "now": "1.32.0"}


def test_a_bound_that_does_not_exist_is_null_in_json(sessions: list[Session]):
    lost = replace(made.stage(sessions[0], 1), ratio=Interval(1.1, 0.0, math.inf, 0.0, 1), detectable=math.inf)
    told = check.to_json(made.record("inconclusive", [lost]))
    assert told["stages"][0]["ratio"]["bounds"] == [None, None]
    assert told["stages"][0]["detectable"] is None and told["detectable"] is None


# --- Markdown --------------------------------------------------------------------------------------------------------


def test_markdown_has_the_verdict_as_heading_and_whole_tables(failed: CheckRecord):
    told = check.to_markdown(failed)
    assert told.startswith("### ✗ fail: latency +3.02 %")
    assert "The smallest slowdown this run could have seen is 1.1 %." in told
    tables = re.findall(r"(?:^\|.*\|\n)+", told, flags=re.M)
    assert len(tables) == 4
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table


def test_markdown_takes_names_for_text(failed: CheckRecord):
    bad = replace(failed, candidate=replace(failed.candidate, name=BAD), conditions=(BAD + "\n# big",),
                  layers=(LayerMove(BAD, "Conv", 0.1, 0.2),))  # fmt: skip
    told = check.to_markdown(bad)
    assert "<script" not in told and "\x1b" not in told and "\u202e" not in told
    assert r"\|\`x\`" in told and "\n# big" not in told
    assert markdown("see https://evil.example www.evil.example [a](b) *b* @me") == (
        r"see https:&#47;&#47;evil.example www&#46;evil.example \[a\](b) \*b\* &#64;me"
    )


def test_what_cannot_be_shown_is_spelt_out():
    assert printable("a\x1b[31mb\n\u202ec\ud800é 模") == r"a\x1b[31mb\x0a\u202ec\ud800é 模"


# --- JUnit -----------------------------------------------------------------------------------------------------------


def junit(records: list[CheckRecord]) -> ET.Element:
    return ET.fromstring(check.to_junit(records).encode())


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_only_what_was_measured_and_did_not_fail_passes(outcome: str, sessions: list[Session]):
    stages = [spoilt(sessions).verdict.stages[0] if outcome == "inconclusive" else made.stage(sessions[0], 1)]
    root = junit([made.record(outcome, stages)])
    (case,) = root.iter("testcase")
    tags = [child.tag for child in case]
    wanted = {"fail": ["failure"], "undecided": ["error"], "inconclusive": ["error"]}.get(outcome, ["system-out"])
    assert tags == wanted
    told = (case[0].get("message") or "") + (case[0].text or "")
    assert "this run could" in told.lower() and f"{outcome}: " in told


def test_junit_has_the_structure_that_readers_expect(failed: CheckRecord, sessions: list[Session]):
    records = [failed, spoilt(sessions), made.record("undecided"), made.record("pass"), made.record("warn")]
    text = check.to_junit(records)
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>')
    root = junit(records)
    assert root.tag == "testsuites" and [child.tag for child in root] == ["testsuite"]
    suite = root[0]
    for part in (root, suite):
        assert (part.get("tests"), part.get("failures"), part.get("errors")) == ("5", "1", "2")
    assert suite.get("skipped") == "0" and float(str(suite.get("time"))) == pytest.approx(5 * 81.4)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", str(suite.get("timestamp")))
    assert [child.tag for child in suite] == ["testcase"] * 5
    for case in suite:
        assert set(case.attrib) == {"classname", "name", "time"} and len(case) == 1
        assert case[0].tag in ("failure", "error", "system-out")
        assert set(case[0].attrib) == (set() if case[0].tag == "system-out" else {"type", "message"})


def test_junit_escapes_control_characters_and_markup(failed: CheckRecord):
    verdict = replace(failed.verdict, reason=BAD + "\x00\ufffe\ud800")
    bad = replace(failed, candidate=replace(failed.candidate, name=BAD), profile=BAD, verdict=verdict)
    (case,) = junit([bad]).iter("testcase")
    assert r"\x1b[31m" in str(case.get("name")) and "<script>" in str(case.get("name"))
    assert r"\x00\ufffe\ud800" in str(case[0].get("message"))


def test_no_checks_make_an_empty_suite():
    root = junit([])
    assert root[0].get("tests") == "0" and len(root[0]) == 0


def test_a_check_that_could_not_be_made_is_an_error_and_says_why():
    message = "the device does not answer: <ssh>\x00 timed out."
    (case,) = ET.fromstring(check.junit_error(BAD, message).encode()).iter("testcase")
    assert [child.tag for child in case] == ["error"] and case[0].get("type") == "not measured"
    assert str(case[0].get("message")) == (
        r"the device does not answer: <ssh>\x00 timed out. "
        "There is no verdict, so no slowdown of any size could have been seen."
    )
    told = check.markdown_error(BAD, message)
    assert told.startswith("### ? not measured: ") and "&lt;ssh&gt;" in told and "<script" not in told
    assert "no slowdown of any size could have been seen" in told


# --- pages -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, ids and every address that the page names; tags have to close in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        self.addresses += [str(v) for name, v in attrs if name in ("src", "href", "xlink:href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "link", "br", "img", "input", "use", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("use", "path"):
            assert self.open.pop() == tag


def sealed(html: str) -> Page:
    """The page, after making sure that it is one well-formed file that fetches and runs nothing."""
    page = Page(html)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "img", "image", "foreignobject"}
    assert all(address.startswith("#") for address in page.addresses)
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    return page


def test_the_page_of_a_check_is_one_file_with_every_part(page: str, failed: CheckRecord):
    sealed(page)
    assert page.count("<svg") == 4
    for part in ("✗ fail", "/layer1/1/Conv", "runtime version", "5 of 412", "baseline p50 moved", "1.1 %",
                 "1.90 on 2 cores", "inferences timed", "9600", numbers.interval(failed.verdict.stages[1].control),
                 "Linux 6.1", "process 16", "stage 2", "fails beyond 2.0 %"):  # fmt: skip
        assert part in page, part


def test_the_forest_has_a_row_for_every_process_and_stage_of_both_arms(page: str):
    figures = re.findall(r"<figure>.*?</figure>", page, flags=re.S)
    for figure in figures[:2]:
        assert len(re.findall(r">process \d+<", figure)) == 24 and len(re.findall(r">stage \d<", figure)) == 2
    assert ">warn<" in figures[0] and ">fail<" in figures[0] and ">control<" in figures[1]


def test_the_same_check_gives_the_same_page(page: str, failed: CheckRecord, sessions: list[Session]):
    assert check_page(failed, sessions) == page


def test_a_check_without_sessions_or_stages_still_has_a_page():
    html = check_page(made.record("inconclusive", absolute={}, changed={}, conditions=(), changes=()), [])
    sealed(html)
    assert "<svg" not in html and "? inconclusive" in html and "it was not measured" in html


def test_a_spoilt_retry_more_than_the_stages_is_shown_as_a_session(sessions: list[Session]):
    html = check_page(made.record("pass", [made.stage(sessions[0], 1)]), sessions)
    sealed(html)
    assert "session 2" in html


def test_a_simulated_check_says_so(page: str, failed: CheckRecord, sessions: list[Session]):
    simulated = replace(sessions[0], fingerprint=replace(sessions[0].fingerprint, simulated=True))
    html = check_page(failed, [simulated, sessions[1]])
    assert "simulated device" in html and "simulated device" not in page


def test_a_large_slowdown_does_not_shrink_the_control_to_a_line():
    own = made.arms(0.6, processes=4, rounds=20)
    html = check_page(made.record("fail", [made.stage(own, 1)]), [own])
    control = re.findall(r"<figure>.*?</figure>", html, flags=re.S)[1]
    ticks = [float(tick.replace("−", "-")) for tick in re.findall(r">(−?\d+(?:\.\d+)?)</text>", control)]
    assert ticks and max(ticks) < 20


def test_a_single_process_and_few_rounds_do_not_break_the_pictures():
    one = made.arms(0.0, processes=1, rounds=3, timed=2)
    lost = replace(made.stage(one, 1, "1 process of an arm was measured"), detectable=math.inf)
    html = check_page(made.record("inconclusive", [lost]), [one])
    sealed(html)
    assert "no bound" in html


def test_names_on_the_page_are_text(failed: CheckRecord, sessions: list[Session]):
    verdict = replace(failed.verdict, reason=BAD)
    bad = replace(failed, candidate=replace(failed.candidate, name=BAD, source=BAD), profile=BAD, verdict=verdict,
                  conditions=(BAD,), changed={BAD: (BAD, BAD)}, layers=(LayerMove(BAD, BAD, 0.1, 0.2),),
                  changes=(Change(BAD, BAD, 1.0, 2.0, 0.001),), protocol=BAD)  # fmt: skip
    html = check_page(bad, sessions)
    sealed(html)
    assert "&lt;script&gt;" in html and "\x1b" not in html and "\u202e" not in html


@browser.needed
@pytest.mark.parametrize("width", [380, 1100])
def test_a_real_browser_shows_the_page_without_sideways_scrolling(tmp_path: Path, page: str, width: int):
    inner, scrolled = browser.widths(tmp_path, page, width)
    assert inner == width and scrolled <= inner


# --- history ---------------------------------------------------------------------------------------------------------


def night(day: int, outcome: str, change: float | None, p50: float | None = 0.81) -> CheckRecord:
    """A night of November; change None: nothing was measured."""
    stages = []
    if change is not None:
        ratio = Interval(1 + change, 0.996 + change, 1.004 + change, 0.004, 8)
        stages = [made.Stage(1, ratio, ratio, Interval(1.001, 0.998, 1.004, 0.003, 8), (), 0.0113, "", 27.0)]
    absolute = {} if p50 is None else {BASELINE: {"p50": p50, "p99": 1.3 * p50}}
    return made.record(outcome, stages, started=f"2026-11-{day:02d}T03:00:00+00:00", absolute=absolute)


NIGHTS = [night(1, "pass", 0.0), night(2, "warn", 0.011), night(3, "inconclusive", None, None),
          night(4, "fail", 0.034, 0.9), night(5, "improved", -0.02, 0.91)]  # fmt: skip
STEP = Change("2026-11-04T03:00:00+00:00", "baseline p50", 0.81, 0.905, 1e-5)


def test_the_history_is_one_line_a_night():
    console = Console(file=io.StringIO(), width=120)
    history.show_history(NIGHTS, console)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines[1] == (
        "1 2026-11-01 03:00 resnet20-tonight pass 1.0000 [0.9960, 1.0040] 1.0010 [0.9980, 1.0040] 1.1 %"
    )
    assert lines[3] == "3 2026-11-03 03:00 resnet20-tonight inconclusive – – –"
    assert len(lines) == 6


def test_the_history_says_its_change_points():
    console = Console(file=io.StringIO(), width=160)
    history.show_history(NIGHTS, console, [STEP])
    last = console.file.getvalue().splitlines()[-1]
    assert last.startswith("Advisory: baseline p50 moved from 0.810 ms to 0.905 ms (+11.7 %) at 2026-11-04")
    assert history.history_json(NIGHTS, [STEP])["changes"][0]["after_ms"] == 0.905
    early = replace(STEP, at="2026-10-01T03:00:00+00:00")
    html = history.history_page(NIGHTS, [early])
    assert ">+11.7 %<" not in html and "moved from 0.810 ms" in html, "before the first night shown: told, not drawn"


def test_an_empty_history_says_so():
    console = Console(file=io.StringIO(), width=120)
    history.show_history([], console)
    assert console.file.getvalue() == "no check has been made yet.\n"
    sealed(history.history_page([], []))
    empty = {"version": 1, "outcomes": {}, "checks": [], "changes": [], "device_changes": []}
    assert history.history_json([]) == empty


def test_the_history_as_json_numbers_its_checks():
    told = json.loads(json.dumps(history.history_json(NIGHTS), allow_nan=False))
    assert [each["number"] for each in told["checks"]] == [1, 2, 3, 4, 5]
    assert told["outcomes"] == {"pass": 1, "warn": 1, "inconclusive": 1, "fail": 1, "improved": 1}


def test_a_history_keeps_the_numbers_that_it_is_given():
    last = dict(zip((41, 44), NIGHTS, strict=False))
    assert [row[0] for row in history.nights(last).rows] == ["41", "44"]
    assert [each["number"] for each in history.history_json(last)["checks"]] == [41, 44]
    assert ">44<" in history.history_page(last, [])


def test_the_page_of_the_history_plots_ratios_times_and_change_points():
    html = history.history_page(NIGHTS, [STEP])
    sealed(html)
    ratios, times = re.findall(r"<figure>.*?</figure>", html, flags=re.S)
    for outcome in ("pass", "warn", "fail", "improved", "not measured"):
        assert f">{outcome}<" in ratios, outcome
    assert times.count(">+11.7 %<") == 1, "the step is marked in p50 alone"
    assert "baseline p50 moved from 0.810 ms to 0.905 ms" in html
    assert ">+11.7 %<" not in history.history_page(NIGHTS, [])


def test_every_target_has_its_own_plots_and_a_new_baseline_breaks_the_line():
    other = [replace(each, profile="board") for each in NIGHTS]
    other[3] = replace(other[3], baseline=replace(other[3].baseline, sha256="9" * 64))
    step = replace(STEP, series="p50 of 999999999999 on board")
    html = history.history_page([*NIGHTS, *other], [step])
    sealed(html)
    figures = re.findall(r"<figure>.*?</figure>", html, flags=re.S)
    assert len(figures) == 4 and [figure.count(">+11.7 %<") for figure in figures] == [0, 0, 0, 1]
    assert [">new baseline<" in figure for figure in figures] == [False, False, False, True]
    console = Console(file=io.StringIO(), width=160)
    history.show_history([*NIGHTS, *other], console)
    assert console.file.getvalue().splitlines()[-1].split()[-1] == "board"


def test_a_history_of_nights_that_measured_nothing_has_a_page():
    html = history.history_page([night(1, "inconclusive", None, None), night(2, "inconclusive", None, None)], [])
    sealed(html)
    assert "2 inconclusive" in html


def test_bounds_that_do_not_exist_do_not_break_the_plot():
    open_ended = replace(NIGHTS[0].verdict.stages[0], ratio=Interval(1.01, 0.0, math.inf, 0.0, 1))
    lost = made.record("inconclusive", [open_ended], spec=CheckSpec(fail=0.03))
    sealed(history.history_page([*NIGHTS, lost], [STEP]))
