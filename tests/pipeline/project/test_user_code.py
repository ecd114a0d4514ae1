"""The user's modules: found, kept apart, and blamed by file and line."""

import importlib
import sys

import pytest
from sample_project import DATA, NETS, TOML

from pipeline.project import load_project, predict_torch
from profiles.errors import DeployError, UsageError


def usage(folder):
    with pytest.raises(UsageError) as caught:
        load_project(folder)
    return caught.value


def test_the_projects_folder_stands_at_the_end_of_the_path(world):
    folder = world()
    load_project(folder)
    assert sys.path[-1] == str(folder)


def test_nothing_is_written_into_the_users_folder(world):
    folder = world()
    before = sorted(path.name for path in folder.iterdir())
    load_project(folder).model()
    assert sorted(path.name for path in folder.iterdir()) == before


def test_two_projects_do_not_mix_their_modules(world):
    lazy = NETS + "\ndef size():\n    import extra\n    return extra.SIZE\n"
    data = DATA.replace("return float(", "import nets\n    return nets.size() + 0 * float(")
    one = load_project(world(nets=lazy, data=data, folder="one", extra="SIZE = 1"))
    two = load_project(world(nets=lazy, data=data, folder="two", extra="SIZE = 2"))
    networks = [one.model(), two.model()]
    scores = [p.evaluate(predict_torch(n)) for p, n in zip([one, two, one, two], networks * 2, strict=True)]
    assert scores == [1, 2, 1, 2]


def test_an_edited_module_is_read_again_by_the_next_load(world):
    folder = world()
    assert load_project(folder).model()[0].out_channels == 4
    (folder / "nets.py").write_text(NETS.replace("4", "6"))
    assert load_project(folder).model()[0].out_channels == 6


def test_modules_of_another_folder_are_found_through_path_and_counted_in_the_digest(world, tmp_path):
    shared = tmp_path / "shared_code"
    shared.mkdir()
    (shared / "zoo.py").write_text(NETS)
    toml = TOML.replace("nets:net", "zoo:net").replace("version = 1", 'version = 1\npath = ["../shared_code"]')
    folder = world(toml)
    project = load_project(folder)
    assert project.model()[0].out_channels == 4
    first = project.digest()
    (shared / "zoo.py").write_text(NETS + "\n# another\n")
    assert load_project(folder).digest() != first


@pytest.mark.parametrize("name", ["profiles", "targets", "pipeline"])
def test_a_module_that_our_name_hides_is_refused_wherever_it_is_imported(world, name):
    error = usage(world(nets=f"import {name}\n" + NETS, **{name: "X = 1"}))
    assert error.message.endswith(f"project/{name}.py is hidden by the module '{name}' of edge-deploy.")
    assert error.hint == "rename yours."
    error = usage(world(TOML.replace("nets:net", f"{name}:net"), **{name: NETS}))
    assert error.message.endswith(f"project/{name}.py is hidden by the module '{name}' of edge-deploy.")


def test_a_file_with_our_name_that_nobody_imports_does_no_harm(world):
    load_project(world(targets="X = 1")).model()


def test_a_module_that_an_installed_one_hides_is_refused(world):
    import json

    error = usage(world(TOML.replace("nets:net", "json:net"), json=NETS))
    assert error.message.endswith(f"project/json.py is hidden by the module 'json' at {json.__file__}.")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nets.net", "deploy.toml: model.factory is 'nets.net', which is not 'module:function'."),
        ("nets:ned", "deploy.toml: model.factory is 'nets:ned', and nets has no 'ned'. Did you mean 'net'?"),
        ("nets:SIZE", "deploy.toml: model.factory is 'nets:SIZE', which is int and cannot be called."),
    ],
)
def test_a_name_that_does_not_lead_to_a_function_is_explained(world, text, sentence):
    assert usage(world(TOML.replace("nets:net", text), nets=NETS + "SIZE = 3\n")).message == sentence


def test_a_module_that_is_not_there_is_named_with_its_near_miss(world):
    folder = world(TOML.replace("nets:net", "netz:net"))
    expected = f"deploy.toml: model.factory is 'netz:net', and there is no module 'netz' in {folder}."
    assert usage(folder).message == f"{expected} Did you mean 'nets'?"


def test_a_module_that_fails_to_import_is_blamed_with_its_line(world):
    with pytest.raises(DeployError) as caught:
        load_project(world(nets="A = 1\nB = A / 0\n"))
    expected = "importing the module 'nets' failed (nets.py, line 2): ZeroDivisionError: division by zero"
    assert caught.value.message == expected
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_module_that_does_not_parse_is_blamed_with_its_line(world):
    with pytest.raises(DeployError, match=r"importing the module 'nets' failed \(nets.py, line 2\): SyntaxError: "):
        load_project(world(nets="A = 1\ndef (:\n"))


def test_a_package_that_is_not_installed_is_named_in_the_hint(world):
    with pytest.raises(DeployError) as caught:
        load_project(world(nets="import nowhere_to_be_found\n"))
    assert caught.value.message.endswith("ModuleNotFoundError: No module named 'nowhere_to_be_found'")
    assert caught.value.hint == "install 'nowhere_to_be_found' beside edge-deploy."


def test_a_factory_that_raises_is_blamed_with_its_line(world):
    project = load_project(world(nets="def net():\n    x = {}\n    return x['width']\n"))
    with pytest.raises(DeployError) as caught:
        project.model()
    assert caught.value.message == "the factory nets:net failed (nets.py, line 3): KeyError: 'width'"
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_factory_that_gives_no_module_is_refused(world):
    project = load_project(world(nets="def net():\n    return {}\n"))
    with pytest.raises(DeployError) as caught:
        project.model()
    assert caught.value.message == "the factory nets:net (nets.py, line 1) gave a dict, not a torch.nn.Module."


def test_a_factory_with_random_weights_gives_the_same_network_every_time(world):
    import torch

    project = load_project(world())
    one, two = project.model().state_dict(), project.model().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_loading_and_calling_leave_the_global_random_states_alone(world):
    import numpy as np
    import torch

    torch.manual_seed(3)
    np.random.seed(3)
    expected = (torch.rand(1), np.random.rand())
    torch.manual_seed(3)
    np.random.seed(3)
    project = load_project(world())
    project.model()
    project.calibration(5)
    assert (torch.rand(1), np.random.rand()) == expected


def test_an_environment_inside_the_projects_folder_is_not_the_users_code(world):
    """A `.venv` beside deploy.toml is usual: what is imported from it belongs to the process, not to one project."""
    folder = world()
    site = folder / ".venv" / "lib" / "site-packages"
    site.mkdir(parents=True)
    (site / "library_of_the_environment.py").write_text("VALUE = 1\n")
    sys.path.append(str(site))
    try:
        (folder / "nets.py").write_text(NETS + "\nimport library_of_the_environment\n")
        load_project(folder)
        loaded = sys.modules["library_of_the_environment"]
        load_project(world(folder="other"))
        assert sys.modules["library_of_the_environment"] is loaded
    finally:
        sys.path.remove(str(site))
        sys.modules.pop("library_of_the_environment", None)


def test_a_module_that_has_its_name_from_elsewhere_stays_when_the_project_leaves(world):
    """A folder in `path` may be a part of a package that the process uses already, or hold the script that runs."""
    folder = world()
    (folder / "part.py").write_text("VALUE = 1\n")
    sys.path.append(str(folder.parent))
    sys.modules["a_script"] = script = type(sys)("a_script")
    script.__file__ = str(folder / "script.py")
    try:
        part = importlib.import_module(f"{folder.name}.part")
        load_project(folder)
        nets = sys.modules["nets"]
        load_project(world(folder="other"))
        assert sys.modules[f"{folder.name}.part"] is part and sys.modules["a_script"] is script
        assert sys.modules["nets"] is not nets
    finally:
        sys.path.remove(str(folder.parent))
        for name in ("a_script", folder.name, f"{folder.name}.part"):
            sys.modules.pop(name, None)
