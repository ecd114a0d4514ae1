"""1,797 scans of handwritten digits (scikit-learn's, offline), split once: 1,000 train, 297 validate, 500 test."""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Predict = Callable[[Images], NDArray[np.float32]]

TRAIN, VALIDATE = 1000, 297


@cache
def _all() -> tuple[Images, Labels]:
    """Images (1797, 1, 16, 16) from 0 to 1, each pixel of the 8x8 scan doubled, in one fixed random order."""
    scans = load_digits()
    order = np.random.default_rng(0).permutation(len(scans.target))
    images = (scans.images / 16.0).astype(np.float32).repeat(2, axis=1).repeat(2, axis=2)
    return images[order, None], scans.target[order].astype(np.int64)


def _part(start: int, stop: int | None) -> tuple[Images, Labels]:
    images, labels = _all()
    return images[start:stop], labels[start:stop]


def calibration() -> Iterator[tuple[Images, Labels]]:
    """Training images as they are, in batches of 100."""
    images, labels = _part(0, TRAIN)
    for start in range(0, TRAIN, 100):
        yield images[start : start + 100], labels[start : start + 100]


class Epoch:
    """One pass over the training images in batches of 50, each image moved by up to two pixels."""

    def __init__(self, epoch: int, seed: int) -> None:
        self.random = np.random.default_rng([seed, epoch])

    def __len__(self) -> int:
        return TRAIN // 50

    def __iter__(self) -> Iterator[tuple[Images, Labels]]:
        images, labels = _part(0, TRAIN)
        padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
        for chosen in self.random.permutation(TRAIN).reshape(-1, 50):
            moves = self.random.integers(0, 5, (50, 2))
            batch = [padded[i, :, y : y + 16, x : x + 16] for i, (y, x) in zip(chosen, moves, strict=True)]
            yield np.stack(batch), labels[chosen]


def train(epoch: int, seed: int) -> Epoch:
    """What the recovery learns from."""
    return Epoch(epoch, seed)


def validate(predict: Predict) -> float:
    """Accuracy on images that neither the training nor the gate uses; what early stopping looks at."""
    return _accuracy(predict, *_part(TRAIN, TRAIN + VALIDATE))


def evaluate(predict: Predict) -> float:
    """Accuracy on the 500 test images; what the gate asks."""
    return _accuracy(predict, *_part(TRAIN + VALIDATE, None))


def _accuracy(predict: Predict, images: Images, labels: Labels) -> float:
    return float((predict(images).argmax(1) == labels).mean())
