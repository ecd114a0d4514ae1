"""A tiny convolutional network that reads scikit-learn's digits: what the recovery tests train for real."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

BATCH = 50


@cache
def _all() -> tuple[Tensor, Tensor]:
    scans = load_digits()
    order = np.random.default_rng(0).permutation(len(scans.target))
    images = torch.from_numpy((scans.images[order, None] / 16).astype(np.float32))
    return images, torch.from_numpy(scans.target[order].astype(np.int64))


def train(epoch: int, seed: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """20 shuffled batches of 50."""
    images, labels = _all()
    for chosen in np.random.default_rng([seed, epoch]).permutation(1000).reshape(-1, BATCH):
        yield (images[chosen],), labels[chosen]


def accuracy(network: nn.Module) -> float:
    """Share of 797 other digits that are read right."""
    images, labels = _all()
    with torch.inference_mode():
        return float((network(images[1000:]).argmax(1) == labels[1000:]).float().mean())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(outputs, targets)


def fresh() -> nn.Module:
    """An untrained network with norms and dropout."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Dropout(0.1), nn.Linear(96, 10))


@cache
def _trained() -> dict[str, Tensor]:
    network = fresh().train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(4):
        for (images,), labels in train(epoch, 0):
            optimizer.zero_grad()
            loss(network(images), labels).backward()
            optimizer.step()
    return network.state_dict()


def dense() -> nn.Module:
    """The trained network, about 97 % right."""
    network = fresh()
    network.load_state_dict(_trained())
    return network.eval()


def damaged(amount: float = 1.0) -> nn.Module:
    """The trained network with noise on its weights."""
    network = dense()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.add_(amount * parameter.std() * torch.randn_like(parameter))
    return network
