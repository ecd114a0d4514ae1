"""Rewrites of the exported network are asked of the device at the end of a build, and taken where it is faster."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import onnx
import pytest
import torch
from rich.console import Console
from tiny_project import request, write_project

from pipeline.flow import BuildResult, build
from pipeline.graph.verify import compare_outputs, seeded_inputs
from pipeline.release.verify import verify
from pipeline.run import read_state
from profiles.errors import UsageError
from profiles.schema import load_profile
from targets.base import load_target
from targets.harness.measurement import Session
from targets.simulated import Truth, roofline_ms

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
NAME = "uneven-depthwise"
ASKED = {"graph": {"candidates": [NAME]}, "prune": {"rounds": 1, "value_widths": 1, "repair": "none"}}
NETS = '''
import torch
from torch import nn


def repeated(conv, kinds):
    """Every input channel has so many kernels, up to sign."""
    own = 0.2 * torch.randn(kinds, *conv.weight.shape[1:])
    which = torch.arange(conv.out_channels) % kinds
    signs = torch.where(torch.rand(conv.weight.shape[:2]) < 0.5, -1.0, 1.0)
    conv.weight.data = own[which] * signs[:, :, None, None]
    return conv


class Net(nn.Module):
    """Images (N, 1, 16, 16) -> logits (N, 10). `large` repeats its kernels on large maps, `small` on small ones."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.large = repeated(nn.Conv2d(32, 32, 3, padding=1), 1)
        self.plain = nn.Conv2d(32, 16, 3, padding=1)
        self.small = repeated(nn.Conv2d(16, 16, 3, padding=1), 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        y = torch.relu(self.large(torch.relu(self.stem(x))))
        y = torch.relu(self.plain(nn.functional.max_pool2d(y, 8)))
        return self.head(torch.relu(self.small(y)).mean((2, 3)))


def net():
    return Net()
'''
PROJECT = """
version = 1
[model]
factory = "tinynet:net"
input = { shape = [1, 1, 16, 16] }
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildResult, BuildResult]:
    """A network that repeats its kernels, built without and with the candidate."""
    folder = tmp_path_factory.mktemp("repeats")
    torch.set_num_threads(1)
    project = folder / "net"
    project.mkdir()
    (project / "tinynet.py").write_text(NETS)
    (project / "deploy.toml").write_text(PROJECT)
    plain = {"prune": ASKED["prune"]}
    found = [build(request(project, folder / "root", budget="0.8x", overrides=given)) for given in (plain, ASKED)]
    return found[0], found[1]


def kept(result: BuildResult) -> Path:
    assert result.bundle is not None
    return result.bundle


def test_a_rewrite_that_the_device_measures_faster_ships_and_computes_the_same(
    built: tuple[BuildResult, BuildResult],
):
    plain, asked = (kept(result) / "model.onnx" for result in built)
    before, after = (onnx.load(str(path)) for path in (plain, asked))
    assert compare_outputs(before, after, seeded_inputs(before, 9)).max_rel < 1e-5
    gone = {n.name for n in before.graph.node} - {n.name for n in after.graph.node}
    assert gone == {"/large/Conv"}
    truth = [roofline_ms(path, Truth()) for path in (plain, asked)]
    assert truth[1] < 0.9 * truth[0]
    assert built[1].summary["latency_ratio"] < 0.9 * built[0].summary["latency_ratio"]
    assert verify(asked.parent, load_target(load_profile("simulated"), asked.parent).infer) == []


def test_both_times_of_every_rewrite_are_reported_taken_or_not(built: tuple[BuildResult, BuildResult]):
    _, result = built
    assert result.report is not None
    rows = {row.node: row for row in result.report.candidates}
    assert set(rows) == {"/large/Conv", "/small/Conv"}
    large, small = rows["/large/Conv"], rows["/small/Conv"]
    assert large.taken and large.interval[1] < 1 and large.after_ms < large.before_ms
    assert not small.taken and small.interval[1] >= 1 and small.after_ms > small.before_ms
    [asked] = [row for row in result.report.passes if row.name == f"{NAME} (candidate)"]
    [plain] = [why for why in asked.refused if why.startswith("/plain/Conv: ")]
    assert asked.changed == 1 and "kernels are distinct" in plain
    page = (kept(result) / "report.html").read_text()
    assert "Rewrites that the device judged" in page and "/small/Conv" in page
    log = json.loads((kept(result) / "passes.json").read_text())["pruned"]["candidates"]
    assert [row["taken"] for row in log["tried"]] == [row.taken for row in result.report.candidates]
    assert log["tried"][0]["before_ms"] == result.report.candidates[0].before_ms


def test_each_is_measured_once_in_the_journal_and_told_in_one_line(built: tuple[BuildResult, BuildResult]):
    run = Path(built[1].summary["run"])
    lines = [json.loads(line) for line in (run / "journal").read_text().splitlines()]
    [session] = [Session.from_json(line["value"]) for line in lines if line["name"] == "session candidates 1"]
    assert set(session.measurements) == {"pruned", "pruned-again", "candidate-1", "candidate-2"}
    detail = read_state(run)["stages"]["candidates"]["detail"]
    assert detail == "2 measured, 1 taken, 2 refused"


def test_without_being_asked_no_candidate_is_tried(built: tuple[BuildResult, BuildResult]):
    result, _ = built
    assert result.report is not None and result.report.candidates == ()
    assert "candidates" not in read_state(Path(result.summary["run"]))["stages"]
    assert "candidates" not in json.loads((kept(result) / "passes.json").read_text())["pruned"]


def test_a_network_whose_kernels_are_all_distinct_stays_as_it_is(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    toml = (project / "deploy.toml").read_text()
    (project / "deploy.toml").write_text(toml.split("[data]")[0])
    result = build(request(project, tmp_path / "root", overrides=ASKED))
    assert result.report is not None and result.report.candidates == ()
    [row] = [row for row in result.report.passes if row.name == f"{NAME} (candidate)"]
    assert row.changed == 0 and len(row.refused) >= 3
    exported = read_state(Path(result.summary["run"]))["stages"]["export"]["outputs"]["onnx"]
    assert hashlib.sha256((kept(result) / "model.onnx").read_bytes()).hexdigest() == exported


def test_weights_that_nearly_repeat_are_hashed_where_that_was_asked_for_and_the_report_says_so(tmp_path: Path):
    project = tmp_path / "net"
    project.mkdir()
    near = ", None, None] + 1e-4 * torch.randn(conv.weight.shape)"
    (project / "tinynet.py").write_text(NETS.replace(", None, None]", near))
    (project / "deploy.toml").write_text(PROJECT)
    given = {**ASKED, "graph": {**ASKED["graph"], "hash_error": 0.02}}
    result = build(request(project, tmp_path / "root", budget="0.8x", overrides=given))
    assert result.report is not None
    [taken] = [row for row in result.report.candidates if row.taken]
    assert taken.node == "/large/Conv"
    [note] = [note for note in result.report.notes if "hashed" in note]
    assert note == (
        "the weights of /large/Conv were hashed for the rewrite, with a relative error of up to 0.02; "
        "pruned.safetensors has them as they were."
    )
    assert verify(kept(result), load_target(load_profile("simulated"), tmp_path).infer) == []


def test_an_unknown_candidate_is_named_before_any_work(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    given = {"graph": {"candidates": ["uneven"]}}
    with pytest.raises(UsageError) as caught:
        build(request(project, tmp_path / "root", overrides=given, console=Console(file=io.StringIO())))
    assert caught.value.message == "no candidate named 'uneven'. Known: uneven-depthwise."
    assert not (tmp_path / "root" / "runs").exists()
