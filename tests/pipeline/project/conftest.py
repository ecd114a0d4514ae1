"""A user's project folder in one line: `world(toml=…, nets=…, data=…)`."""

import os
import sys
from pathlib import Path

import pytest
import torch
from sample_project import DATA, NETS, TOML

from pipeline.project import usercode


@pytest.fixture(autouse=True)
def one_thread_and_a_clean_path():
    if usercode._active is not None:  # of a test of another folder
        usercode._active.leave()
    threads, path = torch.get_num_threads(), list(sys.path)
    torch.set_num_threads(1)
    yield
    if usercode._active is not None:
        usercode._active.leave()
    torch.set_num_threads(threads)
    assert sys.path == path


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Write a project and give its folder; `files` are further files by name."""

    def write(toml: str = TOML, nets: str = NETS, data: str = DATA, folder: str = "project", **files: str) -> Path:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for name, text in {"nets": nets, "data": data, **files}.items():
            (root / f"{name}.py").write_text(text)
        (root / "deploy.toml").write_text(toml)
        return root

    os.environ.pop("EDGE_TEST_FOLDER", None)
    return write
