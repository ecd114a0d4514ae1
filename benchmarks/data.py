"""Reads the real data sets of the benchmarks: numpy arrays in, preprocessed float32 batches out.

They lie outside the repository, in the folder that the environment variable EDGE_DATA names (default: shared/data
beside the checkout); where it is missing, benchmarks and tests say so and do nothing. EDGE_DATA_LIMIT=1024 leaves only
that many images of each split, picked by seed: to see whether a benchmark runs, never for a figure.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Predict = Callable[[Floats], Floats]

EDGE_DATA = Path(os.environ.get("EDGE_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

GTSRB_MEAN, GTSRB_STD = (0.3398, 0.3117, 0.3210), (0.2755, 0.2647, 0.2712)
CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LIMIT = int(os.environ.get("EDGE_DATA_LIMIT") or 0)
"""Images of each split that are left, 0: all."""
SHEET = 40
"""Images in a row of a GTSRB sheet."""


def missing(folder: str) -> str | None:
    """Why a data set cannot be used, or None where it is there."""
    path = EDGE_DATA / folder
    return None if path.is_dir() else f"no data in {path}; set EDGE_DATA to the folder that holds {folder}"


# --- reading --------------------------------------------------------------------------------------------------------


@cache
def gtsrb(split: str) -> tuple[Bytes, Labels]:
    """Traffic signs of "train", "validate" or "test": images (N, 32, 32, 3) and 43 classes.

    Training images come in tracks of about 30 frames of one physical sign, so validation is one tenth of the tracks.
    """
    labels = np.load(EDGE_DATA / "gtsrb32" / "labels.npz")
    if split == "test":
        classes = labels["y_test"].astype(np.int64)
        chosen = _some(np.arange(len(classes)))
        return _sheets("test", len(classes))[chosen], classes[chosen]
    classes = labels["y_train"].astype(np.int64)
    chosen = _some(np.flatnonzero(held_out(classes, labels["track_train"]) == (split == "validate")))
    return _sheets("train", len(classes))[chosen], classes[chosen]


def tracks() -> Labels:
    """The sign of each image of `gtsrb("validate")`: class and track in one number."""
    labels = np.load(EDGE_DATA / "gtsrb32" / "labels.npz")
    classes, track = labels["y_train"].astype(np.int64), labels["track_train"].astype(np.int64)
    found: Labels = (classes * 1000 + track)[_some(np.flatnonzero(held_out(classes, track)))]
    return found


def _some(indices: Labels) -> Labels:
    """LIMIT of the indices, in their order; all of them without a limit."""
    if not LIMIT or len(indices) <= LIMIT:
        return indices
    return np.sort(np.random.RandomState(0).permutation(indices)[:LIMIT])


def held_out(classes: Labels, tracks: NDArray[Any]) -> NDArray[np.bool_]:
    """Which training images validate: all those of one tenth of the (class, track) pairs."""
    keys = classes * 1000 + tracks.astype(np.int64)
    signs = np.unique(keys)
    return np.isin(keys, np.random.RandomState(0).choice(signs, len(signs) // 10, replace=False))


@cache
def _sheets(split: str, count: int) -> Bytes:
    """Lossless sheets of up to 1,000 images, 40 in a row -> (count, 32, 32, 3)."""
    parts = []
    for path in sorted((EDGE_DATA / "gtsrb32" / split).glob("*.webp")):
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
        rows = sheet.reshape(sheet.shape[0] // 32, 32, SHEET, 32, 3)
        parts.append(rows.swapaxes(1, 2).reshape(-1, 32, 32, 3))
    return np.concatenate(parts)[:count]


@cache
def cifar10_jpeg(split: str) -> tuple[Bytes, Labels]:
    """JPEG-re-encoded CIFAR-10, "train" or "test": images (N, 32, 32, 3) and 10 classes."""
    folder = EDGE_DATA / "cifar10_jpeg"
    index = np.load(folder / "index.npz")
    starts, data = index[f"off_{split}"], (folder / f"{split}.jpgs").read_bytes()
    pieces = list(pairwise(starts))
    chosen = _some(np.arange(len(pieces)))
    images = [np.asarray(Image.open(io.BytesIO(data[slice(*pieces[i])])).convert("RGB")) for i in chosen]
    return np.stack(images), index[f"y_{split}"].astype(np.int64)[chosen]


def cifar10_jpeg_half(half: int) -> tuple[Bytes, Labels]:
    """Half of the test images: 0 validates, 1 judges, since the network has seen all training images."""
    images, labels = cifar10_jpeg("test")
    chosen = np.split(np.random.RandomState(0).permutation(len(images)), 2)[half]
    return images[chosen], labels[chosen]


@cache
def keywords() -> tuple[Floats, Labels]:
    """The keyword test set: 1,000 MFCC (N, 1, 49, 10) and 12 words."""
    stored = np.load(EDGE_DATA / "mlperf_tiny" / "kws01.npz")
    values = (stored["x"].astype(np.float32) - np.float32(stored["zero_point"])) * np.float32(stored["scale"])
    return values[:, None], stored["y"].astype(np.int64)


# --- from bytes to what a network reads -----------------------------------------------------------------------------


def normalise(images: Bytes, mean: tuple[float, ...], std: tuple[float, ...]) -> Floats:
    """(N, H, W, 3) bytes -> (N, 3, H, W) floats: (x / 255 - mean) / std."""
    scale = 1 / (255 * np.asarray(std, np.float32))
    shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
    return np.ascontiguousarray((images * scale - shift).transpose(0, 3, 1, 2), dtype=np.float32)


def signs(images: Bytes) -> Floats:
    """Traffic signs as the networks trained on them read them."""
    return normalise(images, GTSRB_MEAN, GTSRB_STD)


def enlarge(images: Bytes, size: int) -> Floats:
    """(N, H, W, 3) bytes -> (N, 3, size, size) floats from 0 to 1, bilinear."""
    large = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    return np.ascontiguousarray(np.stack(large).transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def sampled(total: int, count: int, batch: int) -> NDArray[np.int64]:
    """Indices of the first `count` of `total` samples in one fixed random order, a row a batch."""
    return np.random.default_rng(0).permutation(total)[:count].reshape(-1, batch)


def unlabelled_signs() -> Iterator[Floats]:
    """2,048 training images without labels: what a network without training data is calibrated on."""
    images, _ = gtsrb("train")
    return (signs(images[chosen]) for chosen in sampled(len(images), 2048, 256))


class Epoch:
    """One pass over a training set in shuffled batches, each image moved a little; a function of (epoch, seed).

    move: largest shift in pixels, edges repeated. mirror: whether half of the images are mirrored (never for signs).
    """

    def __init__(
        self,
        images: Bytes,
        labels: Labels,
        seeds: tuple[int, int],
        form: Callable[[Bytes], Floats],
        *,
        batch: int = 128,
        move: int = 2,
        mirror: bool = False,
    ) -> None:
        self.images, self.labels, self.seeds, self.form = images, labels, seeds, form
        self.batch, self.move, self.mirror = batch, move, mirror

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[Floats, Labels]]:
        epoch, seed = self.seeds
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(self.images))
        for start in range(0, len(self) * self.batch, self.batch):
            chosen = order[start : start + self.batch]
            yield self.form(self._moved(self.images[chosen], random)), self.labels[chosen]

    def _moved(self, images: Bytes, random: np.random.Generator) -> Bytes:
        height, width = images.shape[1:3]
        ys, xs = random.integers(-self.move, self.move + 1, (2, len(images), 1))
        rows = np.clip(np.arange(height) + ys, 0, height - 1)
        columns = np.clip(np.arange(width) + xs, 0, width - 1)
        if self.mirror:
            columns = np.where(random.random((len(images), 1)) < 0.5, columns[:, ::-1], columns)
        return images[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


# --- metrics --------------------------------------------------------------------------------------------------------


def accuracy(predict: Predict, inputs: Floats, labels: Labels) -> float:
    """Share of samples whose largest output is the label's."""
    return float((predict(inputs).argmax(1) == labels).mean())


def explained(predict: Predict, inputs: Floats, dense: Floats) -> float:
    """Agreement with the dense outputs: the share of their variance that is met, 1 where they are equal (R²)."""
    missed = np.square(predict(inputs).astype(np.float64) - dense).sum()
    return float(1 - missed / np.square(dense - dense.mean(0)).sum())


def outputs(network: nn.Module, inputs: Floats, batch: int = 250) -> Floats:
    """Outputs of a dense torch network: what `explained` compares with."""
    with torch.inference_mode():
        parts = [network(torch.from_numpy(inputs[at : at + batch])).numpy() for at in range(0, len(inputs), batch)]
    return np.concatenate(parts)
