"""Traffic signs through a network of random weights: agreement with the dense outputs."""

from functools import cache

import data
import nets


def evaluate(predict: data.Predict) -> float:
    """R² of the logits against the dense network's on 1,000 test images."""
    return data.explained(predict, *_judged())


@cache
def _judged() -> tuple[data.Floats, data.Floats]:
    inputs = data.signs(data.gtsrb("test")[0][:1000])
    return inputs, data.outputs(nets.efficientnet(), inputs)
