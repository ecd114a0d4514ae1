"""deploy.toml: what it may say, and the sentence that answers what it may not."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sample_project import TOML

from pipeline.project import load_project
from profiles.errors import UsageError
from profiles.schema import load_profile


def refusal(folder: Path) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_project(folder)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_project_gives_its_inputs_and_its_allowed_drop(world):
    project = load_project(world(TOML + "[accuracy]\nmax_drop = 0.02\n"))
    assert [(spec.name, spec.shape, spec.dtype) for spec in project.inputs] == [("input", (1, 3, 8, 8), "float32")]
    assert project.max_drop == 0.02
    assert project.train is None
    assert not project.validates


def test_prune_and_recover_tables_override_the_profile_key_by_key(world):
    project = load_project(world(TOML + '[prune]\nmin_width = 4\n[recover]\nepochs = 7\nhooks = ["l2-start"]\n'))
    profile = load_profile("local", project.overrides)
    assert (profile.prune.min_width, profile.prune.rounds) == (4, load_profile("local").prune.rounds)
    assert (profile.recover.epochs, profile.recover.hooks) == (7, ("l2-start",))


def test_a_missing_folder_is_named(tmp_path):
    error = refusal(tmp_path / "nowhere")
    assert error.message == f"there is no project folder '{tmp_path / 'nowhere'}'."
    assert error.hint == "deploy build --project DIR"


def test_a_folder_without_deploy_toml_is_named(tmp_path):
    error = refusal(tmp_path)
    assert error.message == f"there is no deploy.toml in '{tmp_path}'."
    assert error.hint == "write one; examples/digits/deploy.toml shows how."


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("factory =", "factry = 'a:b'\nfactory =", "no key named 'model.factry'. Did you mean 'factory'?"),
        ("evaluate =", "validat = 'a:b'\nevaluate =", "no key named 'data.validat'. Did you mean 'validate'?"),
        ("shape =", "shap = 1, shape =", "no key named 'model.input.shap'. Did you mean 'shape'?"),
        ("[model]", "[acuracy]\n[model]", "no key named 'acuracy'. Did you mean 'accuracy'?"),
        ("[model]", "[recover]\nepoch = 3\n[model]", "no key named 'recover.epoch'. Did you mean 'epochs'?"),
        (
            "[model]",
            "[prune]\nmin_width = 0\n[model]",
            "prune.min_width is 0, a value; input should be greater than or equal to 1.",
        ),
        ("version = 1", "version = 2", "version is 2, a value; input should be 1."),
        ("[1, 3, 8, 8]", "[1, 0, 8, 8]", "input 'input' has the shape [1, 0, 8, 8]; every size must be 1 or more."),
    ],
)
def test_a_key_that_makes_no_sense_is_answered_with_its_near_miss(world, old, new, sentence):
    folder = world(TOML.replace(old, new, 1))
    assert refusal(folder).message == f"{folder / 'deploy.toml'}: {sentence}"


def test_a_missing_key_is_named_with_what_to_add(world):
    folder = world(TOML.replace('factory = "nets:net"', ""))
    error = refusal(folder)
    assert error.message == f"{folder / 'deploy.toml'}: the key 'model.factory' is missing."
    assert error.hint == f"add 'factory = …' to {folder / 'deploy.toml'}."


def test_data_may_be_left_out_whole_or_in_part_and_what_is_lacking_is_named(world):
    bare, part = TOML.split("[data]")[0], TOML.replace('evaluate = "data:evaluate"', "")
    told = {
        toml: [load_project(world(toml)).lacks(key) for key in ("calibration", "evaluate")]
        for toml in (TOML, part, bare)
    }
    assert told[TOML] == ["", ""]
    assert told[part] == ["", "the project has no data.evaluate"]
    assert told[bare] == ["the project has no [data]"] * 2
    project = load_project(world(bare))
    assert project.calibration(8).inputs == [] and project.train is None
    assert project.evaluate(lambda x: x) is project.validate(lambda x: x) is None


def test_noise_has_the_shapes_and_kinds_of_the_inputs_and_is_the_same_every_time(world):
    inputs = '[[model.inputs]]\nname = "a"\nshape = [1, 3]\n'
    inputs += '[[model.inputs]]\nname = "b"\nshape = [4, 2]\ndtype = "int64"\n'
    project = load_project(world(TOML.replace("input = { shape = [1, 3, 8, 8] }", "").split("[data]")[0] + inputs))
    first, again = (project.noise(100).inputs for _ in range(2))
    assert [[list(x.shape) for x in batch] for batch in first] == [[[64, 3], [64, 2]], [[36, 3], [36, 2]]]
    floats, whole = (torch.cat(column) for column in zip(*first, strict=True))
    assert abs(floats.mean()) < 0.2 and 0.8 < floats.std() < 1.2
    assert whole.dtype == torch.int64 and set(whole.flatten().tolist()) == {0, 1}
    assert all(torch.equal(x, y) for one, two in zip(first, again, strict=True) for x, y in zip(one, two, strict=True))


def test_noise_on_maps_has_neighbours_that_are_alike_as_in_images(world):
    project = load_project(world(TOML.split("[data]")[0]))
    (noise,) = (torch.cat(column) for column in zip(*project.noise(128).inputs, strict=True))
    assert noise.shape == (128, 3, 8, 8) and abs(noise.mean()) < 1e-4 and abs(noise.std() - 1) < 1e-4

    def alike(one, other):
        return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])

    beside, below = alike(noise[..., 1:], noise[..., :-1]), alike(noise[..., 1:, :], noise[..., :-1, :])
    assert beside > 0.4 and below > 0.4 and alike(noise[..., 4:], noise[..., :4]) < beside
    assert abs(alike(noise[:, 0], noise[:, 1])) < 0.1 and abs(alike(noise[1:], noise[:-1])) < 0.1


def test_a_network_without_declared_input_is_refused(world):
    folder = world(TOML.replace("input = { shape = [1, 3, 8, 8] }", ""))
    error = refusal(folder)
    assert error.message == f"{folder / 'deploy.toml'}: the key 'model.input' is missing."
    assert error.hint == "add 'input = { shape = [1, 3, 32, 32] }' to [model]."


def test_an_unknown_key_of_one_of_several_inputs_is_answered_with_its_near_miss(world):
    inputs = '[[model.inputs]]\nname = "a"\nshape = [1, 2]\n[[model.inputs]]\nname = "b"\nshap = [1, 2]\n'
    folder = world(TOML.replace("input = { shape = [1, 3, 8, 8] }", "") + inputs)
    assert refusal(folder).message.endswith("no key named 'model.inputs.1.shap'. Did you mean 'shape'?")
    (folder / "deploy.toml").write_text((folder / "deploy.toml").read_text().replace("shap = [1, 2]\n", ""))
    assert refusal(folder).message.endswith("the key 'model.inputs.1.shape' is missing.")


def test_two_inputs_of_one_name_are_refused(world):
    inputs = '[[model.inputs]]\nname = "a"\nshape = [1, 2]\n' * 2
    folder = world(TOML.replace("input = { shape = [1, 3, 8, 8] }", "") + inputs)
    assert refusal(folder).message == f"{folder / 'deploy.toml'}: two inputs are named 'a'."


def test_input_and_inputs_together_are_refused(world):
    folder = world(TOML + '[[model.inputs]]\nname = "a"\nshape = [1, 2]\n')
    assert refusal(folder).message == f"{folder / 'deploy.toml'}: [model] has both 'input' and [[model.inputs]]."


def test_a_missing_weights_file_is_named_with_the_script_that_makes_it(world):
    folder = world(TOML.replace('"nets:net"', '"nets:net"\nweights = "net.safetensors"'))
    error = refusal(folder)
    assert error.message == f"there is no weights file '{folder / 'net.safetensors'}'."
    assert error.hint == "set model.weights in deploy.toml to where it is."
    (folder / "train.py").write_text("")
    assert refusal(folder).hint == f"make it: python {folder / 'train.py'}"


def test_a_variable_in_a_path_is_read_from_the_environment_or_has_a_default(world, tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        save_file({"w": torch.zeros(1)}, tmp_path / place / "net.safetensors")
    toml = TOML.replace('"nets:net"', '"nets:net"\nweights = "${EDGE_TEST_FOLDER:-../one}/net.safetensors"')
    folder = world(toml)
    assert load_project(folder).weights.resolve() == (tmp_path / "one/net.safetensors").resolve()
    monkeypatch.setenv("EDGE_TEST_FOLDER", str(tmp_path / "two"))
    assert load_project(folder).weights.resolve() == (tmp_path / "two/net.safetensors").resolve()


def test_a_variable_that_is_not_set_is_named(world):
    error = refusal(world(TOML.replace('"nets:net"', '"nets:net"\nweights = "${EDGE_TEST_FOLDER}/net.pt"')))
    assert error.message == "deploy.toml: model.weights names the variable EDGE_TEST_FOLDER, which is not set."
    assert error.hint == "export EDGE_TEST_FOLDER=…"


def test_a_folder_of_path_that_does_not_exist_is_named(world):
    folder = world(TOML.replace("version = 1", 'version = 1\npath = ["../none"]'))
    expected = f"deploy.toml: path names '../none', and there is no folder '{folder.parent / 'none'}'."
    assert refusal(folder).message == expected


def test_the_digest_follows_the_file_the_weights_and_every_python_file_and_nothing_else(world, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "net.safetensors")
    folder = world(TOML.replace('"nets:net"', '"nets:net"\nweights = "../net.safetensors"'), more="A = 1\n")
    first = load_project(folder).digest()
    assert len(bytes.fromhex(first)) == hashlib.sha256().digest_size
    (folder / "notes.txt").write_text("not part of it")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "other.py").write_text("B = 1")
    assert load_project(folder).digest() == first
    seen = {first}
    (folder / "more.py").write_text("A = 2\n")
    seen.add(load_project(folder).digest())
    (folder / "deploy.toml").write_text((folder / "deploy.toml").read_text() + "[accuracy]\nmax_drop = 0.5\n")
    seen.add(load_project(folder).digest())
    save_file({"w": torch.ones(1)}, tmp_path / "net.safetensors")
    seen.add(load_project(folder).digest())
    assert len(seen) == 4


def test_the_digest_does_not_depend_on_where_the_project_lies(world):
    assert load_project(world(folder="here")).digest() == load_project(world(folder="there")).digest()
