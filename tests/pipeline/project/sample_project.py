"""The texts of a small project, for the tests to vary."""

TOML = """
version = 1
[model]
factory = "nets:net"
input = { shape = [1, 3, 8, 8] }
[data]
calibration = "data:calibration"
evaluate = "data:evaluate"
"""
NETS = """
from torch import nn

def net():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)
"""
DATA = """
import numpy as np

def calibration():
    for batch in range(3):
        yield np.full((10, 3, 8, 8), batch, np.float32), np.arange(10)

def evaluate(predict):
    return float(predict(np.ones((7, 3, 8, 8), np.float32)).shape[1])
"""
