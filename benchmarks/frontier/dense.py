"""The dense networks: trained where the data brings no weights, judged once."""

from __future__ import annotations

import os
import time
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.builds import ROOT
from benchmarks.frontier.arena import Arena, Pace
from benchmarks.lines import Row

EPOCHS = {"resnet20_gtsrb": 6, "resnet56_cifar10_jpeg": 202, "mobilenetv2_gtsrb": 6, "inception_gtsrb": 6}
"""Epochs that the dense weights were trained for (the two in the data: their NOTES.md; published 200 plus 2)."""
TRAINED_HERE = ("mobilenetv2_gtsrb", "inception_gtsrb")
LEARNING_RATE = 0.1


def trained(folder: Path) -> Path:
    """Where weights that are trained here lie; deploy.toml of their projects reads the same variable."""
    path = Path(os.environ.get("EDGE_TRAINED") or folder).resolve()
    os.environ["EDGE_TRAINED"] = str(path)
    return path


def ensure(net: str, pace: Pace, folder: Path, weights: Path) -> dict[str, float]:
    """Train a dense network from labels, unless its weights are there or come with the data; seconds of it."""
    file = weights / f"{net}.safetensors"
    if net not in TRAINED_HERE or file.is_file():
        return {}
    begun = time.monotonic()
    arena = Arena(net, pace, folder, trained=False)
    epochs = min(EPOCHS[net], pace.most_epochs)
    print(f"   training {net} for {epochs} epochs", flush=True)
    done = arena.recovered(arena.model, distilled=False, epochs=epochs, learning_rate=LEARNING_RATE)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    save_file({name: value.contiguous() for name, value in done.module.state_dict().items()}, fresh)
    fresh.replace(file)
    return {"training": time.monotonic() - begun}


def judge(arena: Arena) -> Row:
    """The dense network's accuracies, of the file that all others are compared with."""
    validate, accuracy = arena.judged(arena.onnx)
    return {
        "validate": validate, "accuracy": accuracy, "images": arena.images, "onnx": str(arena.onnx.relative_to(ROOT)),
        "held out": arena.held_out, **arena.size(arena.model), **arena.mistakes(arena.onnx),
    }  # fmt: skip
