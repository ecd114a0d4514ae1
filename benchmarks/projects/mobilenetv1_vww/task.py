"""Visual wake words without its images: agreement with the dense outputs on traffic signs enlarged to 96x96."""

from collections.abc import Iterator
from functools import cache

import data
import nets
import torch

JUDGED = 1000
WEIGHTS = data.EDGE_DATA / "mlperf_tiny" / "vww_mobilenetv1_025.pt"


def calibration() -> Iterator[data.Floats]:
    """Training images in a fixed random order, without labels."""
    images, _ = data.gtsrb("train")
    for chosen in data.sampled(len(images), 2048, 128):
        yield data.enlarge(images[chosen], 96)


def evaluate(predict: data.Predict) -> float:
    """R² of the logits against the dense network's on 1,000 test images."""
    return data.explained(predict, *_judged())


@cache
def _judged() -> tuple[data.Floats, data.Floats]:
    network = nets.mobilenetv1().eval()
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    inputs = data.enlarge(data.gtsrb("test")[0][:JUDGED], 96)
    return inputs, data.outputs(network, inputs)
