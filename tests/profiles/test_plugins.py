"""The folder is the registry."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from profiles import plugins
from profiles.errors import UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A plug-in package of this test's own, with two plug-ins, the contract and a private file."""
    folder = tmp_path / "shelf" / "solvers"
    folder.mkdir(parents=True)
    (tmp_path / "shelf" / "__init__.py").write_text("")
    files = {"__init__": "", "base": "", "_part": "", "exact": '"""Proves it."""\nNAME = "exact"\n'}
    files["by_trial"] = '"""Tries it.\n\nMore."""\nraise RuntimeError("imported")\n'
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "shelf.solvers"
    for name in [name for name in sys.modules if name.partition(".")[0] == "shelf"]:
        del sys.modules[name]


def test_names_are_file_names_with_dashes_without_the_contract_and_private_files(package):
    assert plugins.names(package) == ["by-trial", "exact"]


def test_listing_and_summarising_import_no_plug_in(package):
    assert plugins.summary(package, "by-trial") == "Tries it."
    assert plugins.names(package) and f"{package}.by_trial" not in sys.modules


def test_a_plug_in_is_imported_when_it_is_loaded(package):
    assert plugins.load(package, "exact").NAME == "exact"


def test_an_unknown_plug_in_names_its_near_miss_and_the_listing(package):
    with pytest.raises(UsageError) as error:
        plugins.load(package, "exat")
    assert str(error.value) == "no solver named 'exat'. Did you mean 'exact'?\ndeploy list solvers"


def test_an_unknown_plug_in_that_is_near_to_none_lists_them(package):
    with pytest.raises(UsageError) as error:
        plugins.load(package, "zzz")
    assert str(error.value) == "no solver named 'zzz'. Known: by-trial, exact.\ndeploy list solvers"


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(UsageError) as error:
        plugins.names("profiles.nothing")
    assert str(error.value) == "no plug-in package named 'profiles.nothing'."


def test_listing_the_targets_imports_neither_numpy_nor_a_runtime():
    code = "import sys; from profiles import plugins; plugins.names('targets'); plugins.names('targets.runtimes')\n"
    code += "print(sorted({'numpy', 'onnx', 'onnxruntime', 'torch'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
