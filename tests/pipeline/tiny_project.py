"""A whole project that builds in seconds: a residual network of some thousand weights, ten classes drawn by a seed."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load, save, save_file

from pipeline.flow import BuildResult
from pipeline.release.verify import verify
from pipeline.run import BuildRequest, read_state
from profiles.schema import load_profile
from targets.base import load_target

NETS = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, inside):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inside, 3, 1, 1, bias=False), nn.BatchNorm2d(inside)
        self.conv2, self.bn2 = nn.Conv2d(inside, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


class Net(nn.Module):
    """Images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 24), Block(16, 24))
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x):
        y = self.blocks(self.stem(x))
        return self.head(nn.functional.adaptive_avg_pool2d(y, 2).flatten(1))


def net():
    return Net()
'''

DATA = '''
import numpy as np


def drawn(seed, count):
    """Ten fixed patterns under noise: images (count, 1, 8, 8) and their classes."""
    patterns = np.random.default_rng(7).normal(size=(10, 1, 8, 8))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    return (patterns[labels] + rng.normal(0, 0.7, (count, 1, 8, 8))).astype(np.float32), labels


def calibration():
    images, labels = drawn(1, 128)
    for start in range(0, 128, 32):
        yield images[start : start + 32], labels[start : start + 32]


def train(epoch, seed):
    images, labels = drawn([2, epoch, seed], 256)
    return [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 256, 32)]


def accuracy(predict, seed):
    images, labels = drawn(seed, 400)
    return float((predict(images).argmax(1) == labels).mean())


def validate(predict):
    return accuracy(predict, 3)


def evaluate(predict):
    return accuracy(predict, 4)
'''

PROJECT = """
version = 1
[model]
factory = "tinynet:net"
weights = "tiny.safetensors"
input = { shape = [1, 1, 8, 8] }
[data]
calibration = "tinydata:calibration"
train = "tinydata:train"
validate = "tinydata:validate"
evaluate = "tinydata:evaluate"
files = []
[accuracy]
max_drop = 0.05
[recover]
epochs = 2
"""

GRID = 8
"""The true grid of the simulated device."""


def load_module(name: str, text: str) -> ModuleType:
    """Text as a module that no other test can meet."""
    module = ModuleType(name)
    exec(text, vars(module))
    return module


@functools.cache
def trained() -> bytes:
    """The weights after a few seeded epochs, as the bytes of a safetensors file."""
    nets, data = load_module("tiny_nets", NETS), load_module("tiny_data", DATA)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nets.net()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        for epoch in range(6):
            for images, labels in data.train(epoch, 100):
                loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(labels))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return save(network.eval().state_dict())


def write_project(folder: Path) -> Path:
    """The whole project in a new folder."""
    folder.mkdir(parents=True)
    (folder / "tinynet.py").write_text(NETS)
    (folder / "tinydata.py").write_text(DATA)
    (folder / "deploy.toml").write_text(PROJECT)
    save_file(load(trained()), folder / "tiny.safetensors")
    return folder


def replace(path: Path, old: str, new: str) -> None:
    """Change a text that is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def request(project: Path, root: Path, **changes: Any) -> BuildRequest:
    """A build at 0.6x on the simulated device, in a folder of its own."""
    root.mkdir(exist_ok=True)
    given: dict[str, Any] = {
        "project": project, "target": "simulated", "budget": "0.6x", "root": root,
        "console": Console(file=io.StringIO(), width=200),
    }  # fmt: skip
    return BuildRequest(**given | changes)


def run_of(result: BuildResult) -> Path:
    """The folder of a run."""
    return Path(result.summary["run"])


def stages(result: BuildResult) -> dict[str, Any]:
    """What the stages of a run left, by name."""
    return dict(read_state(run_of(result))["stages"])


def problems(bundle: Path, name: str = "simulated") -> list[str]:
    """What is wrong with a bundle, its sample run by the device of a profile."""
    return verify(bundle, load_target(load_profile(name), bundle.parent).infer)
