"""HASTE, static: channels whose patches hash alike on calibration images are merged for good.

Meiner et al., Data-free dynamic compression of CNNs for tractable efficiency (HASTE), 2023: at inference each
channel's patch is centred and hashed by the signs of its products with random sparse ternary hyperplanes; channels of
equal code are averaged and their filter slices summed (benchmarks/haste.py is that module). An engine has fixed widths,
so here the hashes are taken once, over patches of the calibration maps:

    agreement of i and j = patches in which their codes are equal / patches in which at least one of them is not flat

The pair of highest agreement goes first, and of the two the one that the other explains better; a channel that is flat
everywhere goes before all. Pairs that agree in HOLDS of the patches are twins: the repair `merge` keeps one of them and
reads it with its gain, since codes see no scale. Below that a unit goes without a twin. marginal_loss = 1 - agreement,
plus less than half a patch by which equal ones are told apart. Sizes are ours: codes of BITS bits agree in half of the
patches where maps have a cosine of about 0.97. Trained networks need not have such channels: on ResNet-56 (CIFAR-10)
the best partners agree in 3 % of the patches, and nothing is merged.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from pipeline.nouns import ChannelGroup, Ranking
from pipeline.prune.criteria._similarity import lines, paired
from pipeline.prune.evidence import Evidence

NEEDS: tuple[str, ...] = ("inputs",)
DUPLICATES_FIRST = True
STAND_INS = True

BITS = 8
TILE = 8
HOLDS = 0.5
PATCHES = 1024
PAIRS = 1 << 30
"""Comparisons of two codes that one reader may cost; patches are left out above it."""


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by the share of patches in which no other one hashes like them."""
    return [_rank(group, evidence.maps[group.id], evidence.seed) for group in evidence.topology.offered]


def _rank(group: ChannelGroup, maps: tuple[Tensor, ...], seed: int) -> Ranking:
    equal, alive = torch.zeros(group.size, group.size), torch.zeros(group.size, group.size)
    worse = torch.zeros(group.size, group.size)
    for shown in maps:
        same, seen = agreements(patches(shown, group.size, seed), seed)
        equal, alive = equal + same, alive + seen
        line = lines(shown)
        level = line.variance / line.variance.mean().clamp_min(1e-12)
        worse = worse + level[:, None] * (1 - line.explained)
    loss = 1 - torch.where(alive > 0, equal / alive.clamp_min(1), 1.0)
    nearly = worse / (len(maps) + worse) / (2 * alive.max().clamp_min(1))
    least = torch.where(alive.diagonal()[:, None] > 0, loss, 0.0) + nearly
    found = paired(group, np.ones(group.size), least.double().numpy(), np.zeros(least.shape))
    pairs = zip(found.removal_order, found.twin or (), strict=True)
    twins = tuple(twin if twin >= 0 and float(loss[unit, twin]) <= 1 - HOLDS else -1 for unit, twin in pairs)
    return dataclasses.replace(found, twin=twins)


def patches(maps: Tensor, units: int, seed: int = 0) -> Tensor:
    """Square tiles of about TILE x TILE of maps (samples, units, height, width): (patches, units, positions).

    Where there are too many, some are drawn. Maps of one position have no tiles: their samples are taken TILE x TILE at
    a time.
    """
    samples, _, height, width = maps.shape
    if height * width == 1:
        size = min(samples, TILE * TILE)
        tiles = maps.flatten(1).T.unfold(1, size, size).transpose(0, 1)
    else:
        down, across = (max(1, size // max(1, size // TILE)) for size in (height, width))
        tiles = maps.unfold(2, down, down).unfold(3, across, across).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(2)
    limit = max(16, min(PATCHES, PAIRS // units**2))
    if len(tiles) <= limit:
        return tiles
    return tiles[torch.randperm(len(tiles), generator=torch.Generator().manual_seed(seed))[:limit]]


def agreements(tiles: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """In how many patches two units have one code, not counting those in which both are flat, and how many these are.

    tiles: (patches, units, positions). Both results: (units, units).
    """
    count, units, positions = tiles.shape
    codes, flat = hashed(tiles, hyperplanes(positions, BITS, seed))
    dark = flat.float()
    both = dark.T @ dark
    same = torch.stack([(codes == codes[:, unit : unit + 1]).sum(0) for unit in range(units)]).float()
    return same - both, count - both


def hyperplanes(positions: int, bits: int, seed: int) -> Tensor:
    """Random sparse ternary hyperplanes, (positions, bits): -1, 0, 1 with probabilities 1/6, 2/3, 1/6 (Achlioptas)."""
    drawn = torch.randint(6, (positions, bits), generator=torch.Generator().manual_seed(seed))
    return (drawn == 0).float() - (drawn == 1).float()


def hashed(tiles: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
    """Code of each channel of each patch (patches, channels), and whether the channel is flat there.

    tiles: (patches, channels, positions). Codes do not depend on a channel's level or positive scale.
    """
    centred = tiles - tiles.mean(2, keepdim=True)
    flat = centred.abs().amax(2) <= 1e-6 * tiles.abs().amax(2)
    signs = (centred @ planes > 0) & ~flat[:, :, None]
    return (signs.long() << torch.arange(planes.shape[1])).sum(2), flat
