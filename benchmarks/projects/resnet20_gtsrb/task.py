"""Traffic signs: calibrate and train on the training tracks, validate on held-out ones, judge on the test images."""

from collections.abc import Iterator

import data


def calibration() -> Iterator[tuple[data.Floats, data.Labels]]:
    """Training images of all classes in a fixed random order, as they are."""
    images, labels = data.gtsrb("train")
    for chosen in data.sampled(len(images), 4096, 256):
        yield data.signs(images[chosen]), labels[chosen]


def train(epoch: int, seed: int) -> data.Epoch:
    """Moved by up to two pixels, never mirrored: a mirrored sign is another sign."""
    return data.Epoch(*data.gtsrb("train"), (epoch, seed), data.signs)


def validate(predict: data.Predict) -> float:
    """Accuracy on 3,900 images of held-out tracks."""
    images, labels = data.gtsrb("validate")
    return data.accuracy(predict, data.signs(images), labels)


def evaluate(predict: data.Predict) -> float:
    """Accuracy on the 12,630 test images."""
    images, labels = data.gtsrb("test")
    return data.accuracy(predict, data.signs(images), labels)
