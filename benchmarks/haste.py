"""HASTE as published, decided anew for every tile of every image: its accuracy, its operations and its eager time.

    python -m benchmarks.haste [--images 300] [--bits 8,12,16] [--tile 4]

The reference for the static criterion `haste` (pipeline/prune/criteria/haste.py), whose hash it shares. A convolution's
output is cut into tiles; the patch of each input channel that a tile reads is centred and hashed by the signs of its
products with sparse ternary hyperplanes; channels of equal code are averaged, their filter slices summed, and the tile
is convolved at the depth that is left. Counted are the convolution and all that it takes to shorten it, an addition as
half a multiply-accumulate. The widths depend on the data, so that no engine can run this: there is no latency to claim.

Meiner et al., Data-free dynamic compression of CNNs for tractable efficiency (HASTE), arXiv 2309.17211. Sizes of tiles
and codes are ours: on ResNet-56 tiles of 4 x 4 keep more accuracy at a count than tiles of 8 x 8.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.repair import prepare
from pipeline.latency.operations import Operations
from pipeline.prune.criteria.haste import TILE, hashed, hyperplanes

NARROWEST = 16
"""Input channels from which on a convolution is replaced: fewer have little to merge."""


def main() -> None:
    """Print a row for each length of the codes, and the dense network's."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--bits", default="8,12,16")
    parser.add_argument("--tile", type=int, default=4)
    asked = parser.parse_args()
    network, samples, judge = prepare(asked.images, 8)
    dense, one = Operations(network.topology).macs(), samples.joined()[0][:1]
    print("   bits  accuracy  million MACs  of it overhead  depth kept  ms eager")
    print(f"  dense {judge(network.graph):9.3f} {dense / 1e6:13.1f} {eager_ms(network.graph, one):37.1f}", flush=True)
    for bits in map(int, asked.bits.split(",")):
        model = copy.deepcopy(network.graph)
        layers = replace(model, bits, asked.tile)
        accuracy = judge(model)
        spent = sum((layer.spent for layer in layers), Spent())
        macs = dense + (spent.convolution + spent.overhead - spent.dense) / asked.images
        counts = (
            f"{macs / 1e6:13.1f} {spent.overhead / asked.images / 1e6:15.1f} {spent.convolution / spent.dense:11.2f}"
        )
        print(f"{bits:7} {accuracy:9.3f} {counts} {eager_ms(model, one):9.1f}", flush=True)


def replace(model: nn.Module, bits: int, tile: int = TILE, seed: int = 0) -> list[HasteConv]:
    """Put the module in the place of every wide enough convolution that is not grouped."""
    found = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels >= NARROWEST:
            path, _, leaf = name.rpartition(".")
            found.append(HasteConv(layer, bits, tile=tile, seed=seed))
            setattr(model.get_submodule(path), leaf, found[-1])
    return found


@torch.inference_mode()
def eager_ms(model: nn.Module, x: Tensor, turns: int = 9) -> float:
    """Median time of a forward pass of eager PyTorch, after one to warm up."""
    times = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        model(x)
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times[1:])[turns // 2]


@dataclass(frozen=True)
class Spent:
    """Multiply-accumulates, an addition as half of one: dense, at the depth that is left, and what shortening took."""

    dense: float = 0.0
    convolution: float = 0.0
    overhead: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.dense + other.dense, self.convolution + other.convolution, self.overhead + other.overhead)


class HasteConv(nn.Module):
    """A convolution that merges the input channels of each tile: (N, C, H, W) -> (N, outputs, H', W').

    bits: length of the codes. tile: height and width of an output tile. spent: counted over all calls.
    """

    def __init__(self, layer: nn.Conv2d, bits: int, *, tile: int = TILE, seed: int = 0) -> None:
        super().__init__()
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise ValueError("only convolutions in one group with zero padding can be merged")
        self.layer, self.bits, self.tile, self.seed = layer, bits, tile, seed
        self.spent = Spent()

    def forward(self, x: Tensor) -> Tensor:
        patches, down, across, size = self._patches(x)
        count, flat = len(patches), patches.flatten(2)
        planes = hyperplanes(flat.shape[2], self.bits, self.seed)
        bucket = _buckets(hashed(flat, planes)[0])
        depth = int(bucket.max()) + 1
        members = torch.zeros(count, depth).scatter_add_(1, bucket, torch.ones(bucket.shape))
        slot = (bucket + depth * torch.arange(count)[:, None]).flatten()
        merged = torch.zeros(count * depth, flat.shape[2]).index_add_(0, slot, flat.flatten(0, 1))
        merged = merged / members.clamp_min(1).flatten()[:, None]
        slices = self.layer.weight.transpose(0, 1).flatten(1)  # (C, outputs · taps)
        filters = torch.zeros(count * depth, slices.shape[1]).index_add_(0, slot, slices.repeat(count, 1))
        y = self._convolved(merged.reshape(count, depth, *patches.shape[2:]), filters.reshape(count, depth, -1))
        self._count(count, int((members > 0).sum()), int((members > 1).sum()), planes, size)
        high, wide = self._out(x, 0), self._out(x, 1)
        self.spent = self.spent + Spent(dense=len(x) * high * wide * self.layer.weight.numel())
        return self._joined(y, len(x), down, across, size)[:, :, :high, :wide]

    def _out(self, x: Tensor, axis: int) -> int:
        layer = self.layer
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        return (x.shape[2 + axis] + 2 * int(layer.padding[axis]) - reach) // layer.stride[axis] + 1

    def _patches(self, x: Tensor) -> tuple[Tensor, int, int, tuple[int, int]]:
        """What each tile reads, (tiles, C, height, width); tiles down and across; height and width of a tile."""
        layer, shape, counts, sides = self.layer, [], [], []
        for axis in (0, 1):
            out = self._out(x, axis)
            tile = min(self.tile, out)
            tiles = -(-out // tile)
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
            whole = (tiles * tile - 1) * layer.stride[axis] + reach
            before = int(layer.padding[axis])
            sides.append((before, max(0, whole - before - x.shape[2 + axis])))
            shape.append((tile, (tile - 1) * layer.stride[axis] + reach, tile * layer.stride[axis]))
            counts.append(tiles)
        padded = F.pad(x, (*sides[1], *sides[0]))
        (tile_h, read_h, step_h), (tile_w, read_w, step_w) = shape
        windows = padded.unfold(2, read_h, step_h).unfold(3, read_w, step_w)[:, :, : counts[0], : counts[1]]
        tiles_first = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], read_h, read_w)
        return tiles_first, counts[0], counts[1], (tile_h, tile_w)

    def _convolved(self, merged: Tensor, filters: Tensor) -> Tensor:
        """Each tile (tiles, depth, h, w) by filters of its own (tiles, depth, outputs · taps): (tiles, outputs, ·)."""
        layer, (count, depth) = self.layer, merged.shape[:2]
        columns = F.unfold(merged, layer.kernel_size, layer.dilation, 0, layer.stride)
        own = filters.reshape(count, depth, layer.out_channels, -1).transpose(1, 2).flatten(2)
        y = own @ columns
        return y if layer.bias is None else y + layer.bias[:, None]

    def _joined(self, y: Tensor, samples: int, down: int, across: int, size: tuple[int, int]) -> Tensor:
        tiles = y.reshape(samples, down, across, -1, *size)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(samples, -1, down * size[0], across * size[1])

    def _count(self, tiles: int, buckets: int, shared: int, planes: Tensor, size: tuple[int, int]) -> None:
        layer = self.layer
        positions, taps = len(planes), math.prod(layer.kernel_size)
        channels, each = tiles * layer.in_channels, layer.out_channels * taps * math.prod(size)
        hashing = channels * (2 * positions + int(planes.count_nonzero()))  # additions: mean, centring, products
        merging = (channels - buckets) * (positions + layer.out_channels * taps)  # additions of maps and of slices
        overhead = (hashing + merging) / 2 + shared * positions
        self.spent = self.spent + Spent(convolution=buckets * each, overhead=overhead)


def _buckets(codes: Tensor) -> Tensor:
    """Codes (tiles, channels) -> numbers from 0 for each tile, equal where the codes are."""
    ordered, order = codes.sort(1)
    steps = (ordered[:, 1:] != ordered[:, :-1]).long().cumsum(1)
    return torch.zeros_like(codes).scatter_(1, order, F.pad(steps, (1, 0)))


if __name__ == "__main__":
    main()
