"""The example that `make demo` builds: its data, its network, its training script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.project import load_project, predict_torch, usercode
from profiles.errors import UsageError

FOLDER = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture
def example(tmp_path):
    """A copy of the example without weights."""
    folder = tmp_path / "digits"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    yield folder
    if usercode._active is not None:
        usercode._active.leave()


def test_without_its_weights_the_example_says_which_script_makes_them(example):
    with pytest.raises(UsageError) as caught:
        load_project(example)
    assert caught.value.message == f"there is no weights file '{example / 'digits.safetensors'}'."
    assert caught.value.hint == f"make it: python {example / 'train.py'}"


@pytest.mark.slow
def test_the_script_makes_weights_that_read_98_of_100_digits(example):
    command = [sys.executable, str(example / "train.py")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].endswith(f"wrote {example / 'digits.safetensors'}")
    project = load_project(example)
    assert project.evaluate(predict_torch(project.model())) >= 0.98


def test_the_splits_of_the_example_share_no_image(example):
    sys.path.insert(0, str(example))
    try:
        import data
    finally:
        sys.path.remove(str(example))
        del sys.modules["data"]
    seen: list[np.ndarray] = []

    def predict(images):
        seen.append(images)
        return np.zeros((len(images), 10), np.float32)

    data.validate(predict)
    data.evaluate(predict)
    seen.append(np.concatenate([images for images, _ in data.calibration()]))
    parts = [{image.tobytes() for image in images} for images in seen]
    assert [len(images) for images in seen] == [297, 500, 1000]
    assert all(one.isdisjoint(two) for i, one in enumerate(parts) for two in parts[i + 1 :])


def test_an_epoch_of_the_example_is_a_function_of_epoch_and_seed(example):
    (example / "digits.safetensors").write_bytes(b"")
    train = load_project(example).train

    def first(epoch, seed):
        return next(iter(train(epoch, seed)))[0][0]

    assert len(train(0, 0)) == 20
    assert torch.equal(first(1, 2), first(1, 2))
    assert not torch.equal(first(1, 2), first(2, 2))
    assert not torch.equal(first(1, 2), first(1, 3))
