"""What is asked for and cannot be done is told before any work, not after the search that it would have followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_project import replace, request, write_project

from pipeline import demands
from pipeline.flow import build
from pipeline.project import load_project
from pipeline.prune.evidence import Samples
from pipeline.work import captured
from profiles.errors import DeployError, UsageError
from profiles.schema import load_profile

pytestmark = pytest.mark.usefixtures("leave_no_project_behind")
UNTRAINED = 'train = "tinydata:train"\n'


def refused(project: Path, root: Path, **tables: dict[str, Any]) -> UsageError:
    """The error of a build that measured and ranked nothing."""
    with pytest.raises(UsageError) as caught:
        build(request(project, root, overrides=tables))
    assert not (root / ".deploy" / "keys").exists(), "no step was worked"
    return caught.value


@pytest.mark.parametrize(
    ("table", "key", "name", "near"),
    [
        ("prune", "criterion", "fischer", "fisher"),
        ("prune", "solver", "exakt", "exact"),
        ("recover", "hooks", "psh", "push"),
    ],
)
def test_a_misspelt_name_in_the_project_file_is_told_first(tmp_path: Path, table: str, key: str, name: str, near: str):
    project = write_project(tmp_path / "tiny")
    value = f'["{name}"]' if key == "hooks" else f'"{name}"'
    text = (project / "deploy.toml").read_text()
    added = f"[{table}]\n{key} = {value}\n"
    (project / "deploy.toml").write_text(
        text.replace("[recover]\n", added) if table == "recover" else f"{text}\n{added}"
    )
    replace(project / "tinynet.py", "def net():\n", "def net():\n    1 / 0\n")
    error = refused(project, tmp_path / "root")
    assert f"'{name}'" in error.message and near in error.message and not (tmp_path / "root" / "runs").exists()


@pytest.mark.parametrize(
    ("epochs", "train", "said"),
    [
        (0, True, "recover.hooks (push) needs training, and recover.epochs is 0."),
        (1, False, "recover.hooks (push) needs training data, and the project has no data.train."),
    ],
)
def test_a_hook_that_would_never_run_is_refused(tmp_path: Path, epochs: int, train: bool, said: str):
    project = write_project(tmp_path / "tiny")
    if not train:
        replace(project / "deploy.toml", UNTRAINED, "")
    error = refused(project, tmp_path / "root", recover={"hooks": ["push"], "epochs": epochs})
    assert error.message == said and not (tmp_path / "root" / "runs").exists()


@pytest.mark.parametrize("table", ["prepare", "recover"])
def test_a_strength_of_a_hook_that_is_not_asked_for_is_refused(tmp_path: Path, table: str):
    asked = {table: {"hooks": ["push"], "strengths": {"push": 2.0, "ccm": 0.05}, "epochs": 1}}
    error = refused(write_project(tmp_path / "tiny"), tmp_path / "root", **asked)
    assert error.message == f"{table}.strengths names 'ccm', and {table}.hooks does not."
    assert error.hint == f"--set '{table}.hooks=[\"ccm\"]'" and not (tmp_path / "root" / "runs").exists()


@pytest.mark.parametrize("strength", [0, -0.1, float("inf"), float("nan"), "much"])
def test_a_strength_that_is_no_positive_number_is_refused(tmp_path: Path, strength: object):
    asked = {"hooks": ["ccm"], "strengths": {"ccm": strength}}
    error = refused(write_project(tmp_path / "tiny"), tmp_path / "root", recover=asked)
    assert "recover.strengths.ccm" in error.message


@pytest.mark.parametrize("table", ["prepare", "recover"])
def test_a_hook_that_the_network_does_not_bear_is_refused(tmp_path: Path, table: str):
    project = write_project(tmp_path / "tiny")
    replace(project / "tinynet.py", "ReLU", "SiLU")
    replace(project / "tinynet.py", "torch.relu", "nn.functional.silu")
    error = refused(project, tmp_path / "root", **{table: {"hooks": ["ccm"], "epochs": 1}})
    assert error.message.startswith(f"{table}.hooks: ") and "ReLU" in error.message


def test_a_hook_that_the_targets_do_not_fit_is_refused(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    replace(project / "tinydata.py", "labels[i : i + 32]) for", "images[i : i + 32, 0, :, 0]) for")
    error = refused(project, tmp_path / "root", recover={"hooks": ["push"], "epochs": 1})
    assert error.message.startswith("recover.hooks: ")


def test_a_loss_that_the_calibration_labels_do_not_fit_is_told_to_a_criterion_of_gradients(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    replace(project / "tinydata.py", "yield images[start : start + 32], labels[start : start + 32]",
            "yield images[start : start + 32], labels[start : start + 32].astype(np.float32)")  # fmt: skip
    error = refused(project, tmp_path / "root", prune={"criterion": "taylor"})
    assert error.message.startswith("the criterion 'taylor' needs the gradient of the loss, which fails: ")


@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        ("", {"recover": {"epochs": 1}}),
        ('validate = "tinydata:validate"\n', {"recover": {"epochs": 1, "alpha": 1.0}}),
        ("", {"prune": {"solver": "netadapt"}, "recover": {"epochs": 0}}),
    ],
    ids=["learnt from", "judged by without data.validate", "judged by in short recoveries"],
)
def test_a_loss_that_the_training_targets_do_not_fit_is_told_before_the_search(tmp_path: Path, line, overrides):
    project = write_project(tmp_path / "tiny")
    replace(project / "tinydata.py", "labels[i : i + 32]) for", "images[i : i + 32, 0, :, 0]) for")
    replace(project / "deploy.toml", line, "")
    error = refused(project, tmp_path / "root", **overrides)
    assert error.message.startswith("the loss fails on the first training batch: ")


@pytest.mark.parametrize("criterion", ["obs", "taylor"])
def test_cross_entropy_of_one_score_a_sample_is_refused(tmp_path: Path, criterion: str):
    project = write_project(tmp_path / "tiny")
    replace(project / "tinynet.py", "flatten(1))\n", "flatten(1))[:, :1]\n")
    with pytest.raises(DeployError, match="have one class, of which it is zero") as caught:
        build(request(project, tmp_path / "root", overrides={"prune": {"criterion": criterion}}))
    assert not (tmp_path / "root" / ".deploy" / "keys").exists()
    assert caught.value.hint == "name data.loss in deploy.toml."


def test_a_gradient_that_is_zero_everywhere_is_told(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    replace(project / "deploy.toml", 'train = "tinydata:train"', 'loss = "tinydata:nothing"')
    with (project / "tinydata.py").open("a") as file:
        file.write("\n\ndef nothing(outputs, targets):\n    return outputs.sum() * 0\n")
    error = refused(project, tmp_path / "root", prune={"criterion": "taylor"}, recover={"epochs": 0})
    assert error.message == "the criterion 'taylor' needs the gradient of the loss, which is zero for every unit."


YIELDED = "yield images[start : start + 32], labels[start : start + 32]"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("np.zeros(32, np.int64)", "needs two classes at least, all 128 targets are 0."),
        ("np.ones((32, 10), np.float32)", "needs a class a sample, and targets are float32 (N, 10)."),
    ],
)
def test_labels_that_a_criterion_of_classes_cannot_use_are_told_before_any_training(
    tmp_path: Path, targets: str, said: str
):
    project = write_project(tmp_path / "tiny")
    replace(project / "tinydata.py", YIELDED, f"yield images[start : start + 32], {targets}")
    replace(project / "tinydata.py", "def train(epoch, seed):\n", "def train(epoch, seed):\n    1 / 0\n")
    error = refused(project, tmp_path / "root", prune={"criterion": "lda-deconv"}, recover={"epochs": 0})
    assert error.message == f"the criterion 'lda-deconv' {said}"


def test_a_network_that_gives_choices_in_place_of_scores_is_refused(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    text = (project / "tinynet.py").read_text()
    assert text.count("return self.head(") == 1
    (project / "tinynet.py").write_text(
        "\n".join(f"{line}.argmax(1)" if "return self.head(" in line else line for line in text.splitlines())
    )
    with pytest.raises(DeployError, match="gives no scores of its samples") as caught:
        build(request(project, tmp_path / "root"))
    assert not (tmp_path / "root" / ".deploy" / "keys").exists()
    assert caught.value.hint == "let it return what it chooses by, not what it chose."


@pytest.mark.parametrize(
    ("tables", "note"),
    [
        ({"prune": {"normalise": "ms"}}, "prune.normalise is 'ms', which the solver 'exact' does not read."),
        ({"prune": {"normalise": "ms", "solver": "threshold"}}, None),
        ({"graph": {"hash_error": 0.1}}, "graph.hash_error is 0.1, and graph.candidates is empty: nothing is hashed."),
        ({"graph": {"hash_error": 0.1, "candidates": ["uneven-depthwise"]}}, None),
    ],
)
def test_a_setting_that_nothing_reads_is_told(tmp_path: Path, tables: dict[str, Any], note: str | None):
    project = load_project(write_project(tmp_path / "tiny"))
    _, notes = demands.kept(project, load_profile("local", tables))
    assert notes == (() if note is None else (note,))


def test_a_rehearsal_changes_neither_the_network_nor_what_is_drawn_at_random(tmp_path: Path):
    import torch

    project = load_project(write_project(tmp_path / "tiny"))
    profile = load_profile("local", {"recover": {"hooks": ["push", "ccm"]}, "prune": {"criterion": "fisher"}})
    network = captured(project, project.model(), profile.prune).network
    before = {name: value.clone() for name, value in network.graph.state_dict().items()}
    state = torch.get_rng_state()
    demands.rehearse(project, profile, network, demands.samples(project, profile.prune))
    assert torch.equal(state, torch.get_rng_state()) and not network.graph.training
    assert all(torch.equal(before[name], value) for name, value in network.graph.state_dict().items())
    assert all(parameter.grad is None for parameter in network.graph.parameters())


def test_a_rehearsal_of_several_hooks_and_the_loss_reads_the_training_data_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project = load_project(write_project(tmp_path / "tiny"))
    profile = load_profile("local", {"recover": {"hooks": ["push", "ccm"]}})
    network, samples = captured(project, project.model(), profile.prune).network, Samples([])
    read, train = [], project.train

    def counted(epoch: int, seed: int) -> Any:
        read.append((epoch, seed))
        return train(epoch, seed)

    monkeypatch.setattr(type(project), "train", property(lambda _: counted))
    demands.rehearse(project, profile, network, samples)
    assert read == [(0, 0)]


def test_a_solver_that_trains_says_what_it_does_without_training_data(tmp_path: Path):
    project = write_project(tmp_path / "tiny")
    replace(project / "deploy.toml", UNTRAINED, "")
    _, notes = demands.kept(load_project(project), load_profile("local", {"prune": {"solver": "netadapt"}}))
    assert "nor in the solver 'netadapt', which then judges what is repaired alone" in notes[0]
