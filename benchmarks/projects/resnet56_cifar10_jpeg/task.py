"""JPEG-re-encoded CIFAR-10. The network has seen all training images: half of the test split validates, half judges."""

from collections.abc import Iterator

import data


def _form(images: data.Bytes) -> data.Floats:
    return data.normalise(images, data.CIFAR_MEAN, data.CIFAR_STD)


def calibration() -> Iterator[tuple[data.Floats, data.Labels]]:
    """Training images in a fixed random order, as they are."""
    images, labels = data.cifar10_jpeg("train")
    for chosen in data.sampled(len(images), 4096, 256):
        yield _form(images[chosen]), labels[chosen]


def train(epoch: int, seed: int) -> data.Epoch:
    """Moved by up to two pixels, half of them mirrored."""
    return data.Epoch(*data.cifar10_jpeg("train"), (epoch, seed), _form, mirror=True)


def validate(predict: data.Predict) -> float:
    """Accuracy on one half of the test split."""
    return _half(predict, 0)


def evaluate(predict: data.Predict) -> float:
    """Accuracy on the other half."""
    return _half(predict, 1)


def _half(predict: data.Predict, half: int) -> float:
    images, labels = data.cifar10_jpeg_half(half)
    return data.accuracy(predict, _form(images), labels)
