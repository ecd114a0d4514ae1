"""`deploy groups`: what goes together, what stays and why, as a table, as JSON, and as a picture in one file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import browser
import pytest
from test_check_report import sealed
from tiny_project import NETS, PROJECT, replace, write_project

from pipeline import cli
from pipeline.nouns import Box, Line
from pipeline.report.groups import GroupEntry, GroupsData, groups_json, shorten
from pipeline.report.groups_html import groups_page
from pipeline.report.network_layout import DOWN, HEIGHT, WIDTH, lay_out

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny project without weights and without data."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tinynet.py").write_text(NETS)
    (folder / "deploy.toml").write_text(PROJECT.split("[data]")[0].replace('weights = "tiny.safetensors"\n', ""))
    return folder


def deploy(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    told = capsys.readouterr()
    return int(left.value.code or 0), told.out, told.err


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    code, out, err = deploy(capsys, "groups", *words, "--json")
    assert code == 0 and out.count("\n") == 1, err
    return json.loads(out)


BRANCH = """

class Odd(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return x * 2

"""


def with_a_branch(project: Path) -> None:
    """A module that decides by its data between the blocks and the head."""
    replace(project / "tinynet.py", "\n\nclass Net(", BRANCH + "\nclass Net(")
    replace(project / "tinynet.py", "self.head = ", "self.odd = Odd()\n        self.head = ")
    replace(project / "tinynet.py", "y = self.blocks(self.stem(x))", "y = self.odd(self.blocks(self.stem(x)))")


def test_json_has_stable_keys_and_says_what_goes_with_what(capsys: pytest.CaptureFixture[str], project: Path):
    found = told(capsys, "--project", str(project))
    assert list(found) == [
        "network", "project", "inputs", "parameters", "macs", "prunable_parameters_share", "prunable_macs_share",
        "groups", "blocks", "leaves", "notes", "counts",
    ]  # fmt: skip
    assert found["counts"] == {"proved": 3, "refuted": 0, "frozen": 2} and found["inputs"] == {"input": [1, 1, 8, 8]}
    groups = {group["name"]: group for group in found["groups"]}
    assert set(next(iter(groups.values()))) == {
        "number", "id", "name", "state", "reason", "units", "channels", "made_by", "layers", "members",
        "parameters_share", "macs_share", "block",
    }  # fmt: skip
    inside = groups["blocks.0.conv1"]
    assert (inside["units"], inside["channels"], inside["state"], inside["block"]) == (24, 24, "proved", "blocks.0")
    assert inside["made_by"] == ["blocks.0.conv1"]
    assert inside["layers"] == ["blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2"]
    weights = 2 * 24 * 16 * 9
    assert found["parameters"] == 9 * 16 + 2 * weights + 640
    assert inside["parameters_share"] == pytest.approx(weights / found["parameters"])
    assert groups["head"]["reason"] == "it is an output of the network" and groups["head"]["state"] == "frozen"
    assert [block["name"] for block in found["blocks"]] == ["blocks.0", "blocks.1"]
    assert found["prunable_macs_share"] > 0.99 and found["leaves"] == found["notes"] == []


def test_the_same_project_says_the_same_again(capsys: pytest.CaptureFixture[str], project: Path):
    assert told(capsys, "--project", str(project)) == told(capsys, "--project", str(project))


def test_the_table_has_a_line_for_every_group_and_block(capsys: pytest.CaptureFixture[str], project: Path):
    code, out, _ = deploy(capsys, "groups", "--project", str(project))
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "2 blocks.0.conv1 24 24 blocks.0.conv1, .bn1, .conv2 47.3 % 49.4 % proved" in lines
    assert any(line.startswith("4 head 10 10 head ") and line.endswith("frozen it is an output of the network")
               for line in lines)  # fmt: skip
    assert "5 groups: 3 proved, 2 frozen; 2 of 2 residual blocks can go whole." in lines
    share = re.compile(r"at most 99\.\d % of 14\.6 k weights and 99\.\d % of 895 k MACs can go, ")
    assert any(share.match(line) for line in lines)


def test_what_the_profile_freezes_stays_with_that_reason(capsys: pytest.CaptureFixture[str], project: Path):
    found = told(capsys, "--project", str(project), "--set", 'prune.freeze=["blocks.1"]')
    groups = {group["name"]: group for group in found["groups"]}
    assert groups["blocks.1.conv1"]["state"] == "frozen"
    assert groups["blocks.1.conv1"]["reason"] == "prune.freeze names 'blocks.1'"
    (project / "board.toml").write_text('extends = "local"\n[prune]\nfreeze = ["blocks.0"]\n')
    found = told(capsys, "--project", str(project), "--target", str(project / "board.toml"))
    assert {g["name"]: g["state"] for g in found["groups"]}["blocks.0.conv1"] == "frozen"


def test_a_module_that_was_left_whole_is_named_with_line_reason_and_kind(
    capsys: pytest.CaptureFixture[str], project: Path
):
    with_a_branch(project)
    found = told(capsys, "--project", str(project))
    (leaf,) = found["leaves"]
    line = (project / "tinynet.py").read_text().splitlines().index("        if x.sum() > 0:") + 1
    assert leaf == {
        "module": "odd", "kind": "tinynet.Odd",
        "reason": f"cannot be captured: tinynet.py:{line}: control flow on data (if, while, and, or)",
    }  # fmt: skip
    assert found["notes"] == [f"'odd' is left whole, {leaf['reason']}."]
    assert {g["name"]: g["reason"] for g in found["groups"]}["stem.0"] == leaf["reason"]
    _, out, _ = deploy(capsys, "groups", "--project", str(project))
    assert f"note: {found['notes'][0]}" in out


def test_a_rule_that_names_nothing_is_told(capsys: pytest.CaptureFixture[str], project: Path):
    replace(project / "deploy.toml", "[model]", '[model]\nrules = "my_rules"')
    (project / "my_rules.py").write_text("KINDS = ('tinynet.Blok',)\n\ndef apply(op, space): ...\n")
    assert told(capsys, "--project", str(project))["notes"] == [
        "my_rules names 'tinynet.Blok', which the network does not have. Did you mean 'tinynet.Block'?"
    ]


# --- the page ------------------------------------------------------------------------------------------------------


def page_of(capsys: pytest.CaptureFixture[str], project: Path) -> str:
    code, _, err = deploy(capsys, "groups", "--project", str(project), "--html", "page.html")
    assert code == 0, err
    return Path("page.html").read_text(encoding="utf-8")


def test_the_page_is_one_file_that_runs_nothing_and_draws_every_layer(
    capsys: pytest.CaptureFixture[str], project: Path
):
    with_a_branch(project)
    html = page_of(capsys, project)
    sealed(html)
    boxes = re.findall(r'<g class="part box ([^"]*)" id="(box-\d+)"', html)
    titles = re.findall(r'<text class="name"[^>]*>([^<]*)<', html)
    assert titles == ["x", "stem.0", "blocks.0.conv1", "blocks.0.conv2", "add", "blocks.1.conv1", "blocks.1.conv2",
                      "add", "odd", "head", "output"]  # fmt: skip
    assert len(boxes) == len(titles)
    classes = dict(zip(titles, (set(names.split()) for names, _ in boxes), strict=True))
    assert "g2" in classes["blocks.0.conv1"] & classes["blocks.0.conv2"], "both go with group 2"
    assert "whole" in classes["odd"] and "stays" in classes["odd"] and "stays" not in classes["blocks.0.conv1"]
    told = re.search(r"<title>(odd\n[^<]*)</title>", html)
    assert told is not None and "left whole: cannot be captured: tinynet.py:" in told[1]
    assert len(re.findall(r'<path class="part line', html)) == 12


def test_the_same_project_gives_the_same_page(capsys: pytest.CaptureFixture[str], project: Path):
    assert page_of(capsys, project) == page_of(capsys, project)


@browser.needed
@pytest.mark.slow
def test_the_page_fits_a_phone_and_a_desktop(capsys: pytest.CaptureFixture[str], project: Path, tmp_path: Path):
    html = page_of(capsys, project)
    for width in (390, 1280):
        inner, whole = browser.widths(tmp_path, html, width)
        assert whole <= inner, f"{whole} px wide in a window of {inner}"


def entry(number: int, **changes: object) -> GroupEntry:
    given = {
        "number": number, "id": f"id{number}", "name": f"layer{number}", "state": "proved", "reason": "", "units": 4,
        "channels": 4, "made_by": (), "layers": (f"layer{number}",), "members": (),
        "parameters_share": 0.1, "macs_share": 0.1,
    }  # fmt: skip
    return GroupEntry(**given | changes)  # type: ignore[arg-type]


def test_names_of_the_users_are_text_everywhere():
    bad = "<script>alert(1)</script>\x1b[31m"
    box = Box("a", bad, bad, bad, (bad,), (), (("id1", 4),), bad)
    group = entry(1, name=bad, layers=(bad,), state="refuted", reason=bad)
    data = GroupsData(bad, bad, {bad: (1,)}, 1, 1, 0.5, 0.5, (group,), boxes=(box,), notes=(bad,))
    html = groups_page(data)
    sealed(html)
    assert "\x1b" not in html and html.count("&lt;script&gt;") > 6
    json.dumps(groups_json(data))


def test_boxes_of_a_row_and_of_a_column_never_overlap():
    chain = [Box("0", "0", "", "", (), (), ())]
    for number in range(1, 30):
        lines = [Line(str(number - 1), (("id1", 4),))]
        lines += [Line(str(number - back), ()) for back in (2, 5) if number >= back]
        chain.append(Box(str(number), str(number), "", "", (), tuple(lines), ()))
    fan = [Box(f"f{i}", "", "", "", (), (Line("29", ()),), ()) for i in range(4)]
    layout = lay_out([*chain, *fan])
    corners = [(placed.x, placed.y) for placed in layout.placed]
    for index, (x, y) in enumerate(corners):
        assert 0 <= x <= layout.width - WIDTH and 0 <= y <= layout.height - HEIGHT
        for other_x, other_y in corners[:index]:
            assert abs(x - other_x) >= WIDTH or abs(y - other_y) >= HEIGHT
    assert [y for _, y in corners[:30]] == [corners[0][1] + row * (HEIGHT + DOWN) for row in range(30)]
    assert len({y for _, y in corners[30:]}) == 1 and len(layout.routes) == 29 + 28 + 25 + 4


def test_who_gives_to_a_distant_row_lies_at_the_right_and_others_below_what_they_read():
    boxes = [Box("in", "", "", "", (), (), ())]
    boxes += [Box(f"skip{i}", "", "", "", (), (Line("in", ()),), ()) for i in range(2)]
    boxes += [Box(f"{side}1", "", "", "", (), (Line("in", ()),), ()) for side in "ab"]
    boxes += [Box(f"{side}2", "", "", "", (), (Line(f"{side}1", ()),), ()) for side in "ba"]
    ends = [Line(id, ()) for id in ("skip0", "skip1", "a2", "b2")]
    at = {p.box.id: p.x for p in lay_out([*boxes, Box("add", "", "", "", (), tuple(ends), ())]).placed}
    assert at["a1"] < at["b1"] < at["skip0"] < at["skip1"] and at["a2"] < at["b2"]


def test_a_page_does_not_depend_on_the_seed_of_hashes(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["groups", "--project", str(project), "--json", "--html"]
    assert deploy(capsys, *words, "here.html")[0] == 0
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    given = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "pipeline.cli", *words, "there.html"]
    subprocess.run(command, check=True, env=given, capture_output=True, timeout=120)
    assert (tmp_path / "here.html").read_text() == (tmp_path / "there.html").read_text()


def test_lines_that_pass_rows_have_channels_of_their_own():
    boxes = [Box(str(i), "", "", "", (), (Line(str(i - 1), ()),) if i else (), ()) for i in range(6)]
    boxes[3] = Box("3", "", "", "", (), (Line("2", ()), Line("0", ())), ())
    boxes[5] = Box("5", "", "", "", (), (Line("4", ()), Line("1", ())), ())
    layout = lay_out(boxes)
    aside = [re.search(r"V[^Q]*Q([\d.]+) ", route.path) for route in layout.routes if "V" in route.path]
    channels = [float(found[1]) for found in aside if found]
    assert len(channels) == 2 and len(set(channels)) == 2 and min(channels) > layout.placed[0].x + WIDTH


def test_many_layers_are_named_in_short():
    assert shorten(["a.conv", "a.bn", "b.conv", "c", "d"], 4) == "a.conv, .bn, b.conv, c and 1 more"
    assert shorten(["a", "b"], 4) == "a, b"


# --- errors --------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_project_file_is_named(capsys: pytest.CaptureFixture[str], project: Path):
    code, out, err = deploy(capsys, "groups", "--project", "nowhere")
    assert code == 2 and out == ""
    assert err == "Error: there is no project file 'nowhere/deploy.toml'.\ndeploy groups --project DIR\n"


def test_an_unknown_target_or_key_is_named_before_any_work(capsys: pytest.CaptureFixture[str], project: Path):
    replace(project / "tinynet.py", "def net():\n", "def net():\n    1 / 0\n")
    code, _, err = deploy(capsys, "groups", "--project", str(project), "--target", "locl")
    assert code == 2 and "'locl'" in err and "Did you mean 'local'?" in err
    code, _, err = deploy(capsys, "groups", "--project", str(project), "--set", "prune.freez=[]")
    assert code == 2 and "Did you mean 'freeze'?" in err
    code, _, err = deploy(capsys, "groups", "--project", str(project), "--html", ".")
    assert code == 2 and "'.'" in err


def test_a_network_that_cannot_be_captured_is_told_as_json_too(capsys: pytest.CaptureFixture[str], project: Path):
    decides = "        if x.sum() > 0:\n            x = -x\n        y = self.blocks"
    replace(project / "tinynet.py", "        y = self.blocks", decides)
    code, out, _ = deploy(capsys, "groups", "--project", str(project), "--json")
    assert code == 1
    assert json.loads(out)["error"].startswith("the network cannot be captured: Net.forward, tinynet.py:")


def test_it_works_on_a_whole_project_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    found = told(capsys, "--project", str(write_project(tmp_path / "whole")))
    assert found["counts"]["proved"] == 3 and not (tmp_path / "runs").exists() and not (tmp_path / ".deploy").exists()
