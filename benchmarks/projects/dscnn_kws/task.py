"""Keywords: one half of the test set calibrates, the other half judges; there is no training set."""

import data
import numpy as np


def _half(half: slice) -> tuple[data.Floats, data.Labels]:
    features, labels = data.keywords()
    chosen = np.random.RandomState(0).permutation(len(features))[half]
    return features[chosen], labels[chosen]


def calibration() -> list[tuple[data.Floats, data.Labels]]:
    """500 keywords with their labels."""
    return [_half(slice(None, 500))]


def evaluate(predict: data.Predict) -> float:
    """Accuracy on the other 500."""
    return data.accuracy(predict, *_half(slice(500, None)))
