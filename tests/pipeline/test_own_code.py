"""Projects with code of their own that nobody looks into: the example of docs/operators.md, and branches on data."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console
from tiny_project import problems, replace, request, write_project

from pipeline import cli
from pipeline.flow import build
from pipeline.project import load_project, predict_torch
from profiles.errors import DeployError
from profiles.schema import load_profile
from targets.base import load_target

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
DOCS = (Path(__file__).parents[2] / "docs" / "operators.md").read_text(encoding="utf-8")
SHORT = {"prune": {"value_widths": 1}}


def example(folder: Path) -> Path:
    """The project that docs/operators.md shows: every block is a file that its first line names."""
    folder.mkdir()
    for text in re.findall(r"```(?:python|toml)\n(.*?)```", DOCS, flags=re.S):
        name = text.splitlines()[0].removeprefix("# ")
        (folder / name).write_text(text)
    assert {path.name for path in folder.iterdir()} == {"nets.py", "my_rules.py", "deploy.toml"}
    return folder


def groups(capsys: pytest.CaptureFixture[str], project: Path) -> dict[str, dict]:
    with pytest.raises(SystemExit) as left:
        cli.main(["groups", "--project", str(project), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert not left.value.code, told
    return {group["name"]: group for group in told["groups"]}


def test_the_example_of_the_docs_offers_what_its_rule_couples(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    project = example(tmp_path / "own")
    with_rule = groups(capsys, project)["first"]
    assert with_rule["state"] == "proved" and with_rule["units"] == 24
    assert "step[0]" in with_rule["members"] and "second.weight[1]" in with_rule["members"]
    replace(project / "deploy.toml", 'rules = "my_rules"', "#")
    without = groups(capsys, project)["first"]
    assert without["state"] == "frozen" and without["reason"].startswith("there is no rule for nets.Quantise")


def test_a_wrong_rule_in_the_example_is_refuted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    project = example(tmp_path / "own")
    replace(project / "my_rules.py", "space.along(op, 1, 0))", "space.along(op, 1, 0)[::-1])")
    found = groups(capsys, project)["first"]
    assert found["state"] == "refuted" and found["reason"].startswith("masking and cutting it differ by ")


def test_the_example_of_the_docs_is_built(tmp_path: Path):
    project = example(tmp_path / "own")
    result = build(request(project, tmp_path / "root", overrides=SHORT, budget="0.8x"))
    assert result.exit_code == 0 and result.bundle is not None and problems(result.bundle) == []
    model = onnx.load(str(result.bundle / "model.onnx"))
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    width = shapes["first.weight"][0]
    assert width < 24 and shapes["step"] == [width] and shapes["second.weight"][1] == width
    assert "Round" in {node.op_type for node in model.graph.node}


SHUFFLED = '''

class Fold(nn.Module):
    """Knows its channels by their number, where nothing can rewrite it."""

    def forward(self, x):
        n, c, h, w = x.shape
        return x.reshape(n, c, h * w).sin().reshape(n, c, h, w)

'''


def test_an_operator_whose_onnx_cannot_be_narrowed_is_an_error_before_anything_is_measured(tmp_path: Path):
    project = example(tmp_path / "own")
    replace(project / "nets.py", "\n\nclass Net(", SHUFFLED + "\nclass Net(")
    replace(project / "nets.py", "self.head = ", "self.fold = Fold()\n        self.head = ")
    replace(project / "nets.py", "self.head(torch.relu(self.second(y))", "self.head(self.fold(self.second(y))")
    replace(project / "my_rules.py", '("nets.Quantise",)', '("nets.Quantise", "nets.Fold")')
    replace(project / "my_rules.py", "    space.tie(", "    if op.kind == 'nets.Quantise':\n        space.tie(")
    with pytest.raises(DeployError) as caught:
        build(request(project, tmp_path / "root", overrides=SHORT))
    assert caught.value.message.startswith("the ONNX file cannot be cut through 'nets.Quantise' and 'nets.Fold': ")
    assert caught.value.hint == "let its forward count channels by its parameters or by -1, or drop its rule."
    assert not (tmp_path / "root" / "runs").exists()


BRANCH = """

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        if x.mean() > 1.0:
            return self.conv(x) + x
        return x

"""


def test_a_network_that_decides_by_its_data_is_built_with_both_branches(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    toml = (project / "deploy.toml").read_text()
    (project / "deploy.toml").write_text(toml.split("[data]")[0].replace('weights = "tiny.safetensors"\n', ""))
    replace(project / "tinynet.py", "\n\nclass Net(", BRANCH + "\nclass Net(")
    replace(project / "tinynet.py", "self.head = ", "self.odd = Odd()\n        self.head = ")
    replace(project / "tinynet.py", "y = self.blocks(self.stem(x))", "y = self.odd(self.blocks(self.stem(x)))")
    console = Console(file=io.StringIO(), width=200)
    given = {"prune": {**SHORT["prune"], "drop_blocks": False}}
    result = build(request(project, tmp_path / "root", console=console, overrides=given, budget="0.8x"))
    assert result.bundle is not None and problems(result.bundle) == []
    said = console.file.getvalue()  # type: ignore[attr-defined]
    note = next(line for line in said.splitlines() if "'odd'" in line)
    why = r"cannot be captured: tinynet\.py:\d+: control flow on data \(if, while, and, or\)"
    assert re.fullmatch(rf"note: 'odd' is left whole, {why}\.", note)
    run = Path(result.summary["run"])
    for place in (run / "log", run / "report.html"):
        assert note.removeprefix("note: ").split(" (if")[0] in place.read_text().replace("&#39;", "'"), place
    model = result.bundle / "model.onnx"
    assert "If" in {node.op_type for node in onnx.load(str(model)).graph.node}
    loaded = load_project(project)
    dense, target = predict_torch(loaded.model()), load_target(load_profile("simulated"), result.bundle.parent)
    for scale in (0.1, 1.0, 30.0):  # both branches of the dense network
        x = np.random.default_rng(1).standard_normal((1, 1, 8, 8)).astype(np.float32) * scale
        (found,) = target.infer(result.bundle / "dense.onnx", [x])
        assert np.allclose(found, dense(x), rtol=1e-3, atol=1e-4)


def test_a_network_with_outputs_by_name_is_built(tmp_path: Path):
    project = example(tmp_path / "own")
    named = "return {'logits': self.head(torch.relu(self.second(y)).mean((2, 3))), 'map': x.mean(1, keepdim=True)}"
    replace(project / "nets.py", "return self.head(torch.relu(self.second(y)).mean((2, 3)))", named)
    loaded = load_project(project)
    logits, shown = predict_torch(loaded.model())(np.zeros((2, 3, 16, 16), np.float32))
    assert logits.shape == (2, 10) and shown.shape == (2, 1, 16, 16)
    result = build(request(project, tmp_path / "root", overrides=SHORT, budget="0.8x"))
    assert result.bundle is not None and problems(result.bundle) == []
    assert [info.name for info in onnx.load(str(result.bundle / "model.onnx")).graph.output] == ["output_0", "output_1"]
