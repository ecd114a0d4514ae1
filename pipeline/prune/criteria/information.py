"""Information: units by their Shapley value in the output, groups weighted by how much information their maps hold.

    φ_c = mean over permutations of v(S ∪ c) − v(S),      v(S) = −divergence of the outputs with units outside S masked

After Chen and Wang, Information-theoretic channel pruning (TNNLS 2024); the details are not public. The players are the
units of one group; no labels. The divergence is that of the outputs over TEMPERATURE (KL for logits): with logits as
they are a few uncertain samples make all of the value, and on ResNet-56/CIFAR-10 values from one half of 128
permutations hardly agreed with those from the other (rank correlation -0.2 to 0.2; at a temperature of 10 0.1 to 0.7).

The Monte Carlo form chosen: every sample walks a permutation of its own, PERMUTATIONS in one pass (fewer for a large
network, as for `evidence.maps`). A step removes a sixteenth of the group, from the whole group down to half (truncated:
below that the outputs say little, and few plans go there). What a step takes is not shared out but regressed,

    Σ_{c in step} φ_c = v(before) − v(after),      ridge towards the mean

which for single units is the mean over permutations, and for more rids a value of those that went with it. So a group
of any size costs STEPS passes, and values of hundreds of units are rough. Negative values count in the order and are
told as 0.

weight: the group's information concentration, entropy of its activations (histogram of BINS bins between the smallest
and the largest, mean over samples and readers) times the mean relative rank of its maps (as in `activation-rank`), over
the mean of this product over all groups: what is lost where much is held counts more. Only the solver `threshold`,
which compares the scores of all groups, reads it; those that go by measured losses need no prior.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from pipeline.nouns import ChannelGroup, Ranking
from pipeline.prune.criteria import magnitude
from pipeline.prune.criteria.activation_rank import map_ranks
from pipeline.prune.criteria.base import ordered
from pipeline.prune.evidence import Answers, Evidence, divergence, joined
from pipeline.prune.maps import affordable

NEEDS: tuple[str, ...] = ("inputs",)

PERMUTATIONS = 64
STEPS = 8
TEMPERATURE = 8.0
RIDGE = 0.3
BINS = 64


def rank(evidence: Evidence) -> list[Ranking]:
    """Rank units by Shapley value."""
    groups = evidence.topology.offered
    held = np.asarray([concentration(evidence, group) for group in groups])
    weights = held / held.mean() if held.any() else np.ones(len(groups))
    by_size = {ranking.group: ranking.removal_order for ranking in magnitude.rank(evidence)}
    rankings = []
    for group, weight in zip(groups, weights, strict=True):
        ranking = ordered(group, shapley(evidence, group, by_size[group.id]).numpy(), float(weight))
        told = tuple(max(0.0, value) for value in ranking.marginal_loss)
        rankings.append(dataclasses.replace(ranking, marginal_loss=told))
    return rankings


@torch.no_grad()
def shapley(evidence: Evidence, group: ChannelGroup, laid: tuple[int, ...]) -> Tensor:
    """Value of each unit of a group, shape (units,). laid: the units in an order that does not depend on position."""
    count = min(PERMUTATIONS, affordable(evidence.network))
    inputs, dense = evidence.samples.first(count).joined(), _tempered(joined(evidence.outputs))
    walked = torch.arange(count) % len(inputs[0])
    inputs, dense = (tuple(x[walked] for x in of) for of in (inputs, dense))
    source = torch.Generator().manual_seed(evidence.seed)
    walks = torch.tensor(laid)[torch.rand(count, group.size, generator=source).argsort(1)]
    units, gates = torch.tensor(group.units), torch.ones(count, evidence.units)
    each, before, masks, taken = -(-group.size // (2 * STEPS)), torch.zeros(()), [], []
    for start in range(0, max(1, group.size // 2), each):
        gone = walks[:, start : start + each]
        gates.scatter_(1, units[gone], 0.0)
        after = divergence(_tempered(evidence.answers(evidence.gated(inputs, gates), count)), dense)
        masks.append(torch.zeros(count, group.size, dtype=torch.double).scatter_(1, gone, 1.0))
        taken.append(after - before)
        before = after
    return regressed(torch.cat(masks), torch.cat(taken))


def _tempered(outputs: Answers) -> Answers:
    return tuple(each.double() / TEMPERATURE for each in outputs)


def regressed(masks: Tensor, taken: Tensor) -> Tensor:
    """Values of units, shape (units,), from who went in each step (steps, units) and what it took (steps,)."""
    mean = taken.sum() / masks.sum()
    table = masks.T @ masks
    table.diagonal().add_(RIDGE * table.diagonal().mean())
    beside: Tensor = torch.linalg.solve(table, masks.T @ (taken - masks.sum(1) * mean))
    return mean + beside


def concentration(evidence: Evidence, group: ChannelGroup) -> float:
    """Entropy of the group's activations in nats, times the mean relative rank of its maps."""
    seen = evidence.maps[group.id]
    entropy = sum(_entropy(maps.flatten(1)) for maps in seen) / max(1, len(seen))
    return entropy * float(map_ranks(evidence, group).mean())


def _entropy(values: Tensor) -> float:
    """Mean Shannon entropy of the rows' histograms over one common range."""
    low, high = values.min(), values.max()
    bins = ((values - low) / (high - low).clamp_min(1e-12) * BINS).long().clamp_max(BINS - 1)
    counts = torch.zeros(len(values), BINS).scatter_add_(1, bins, torch.ones_like(values))
    return float(torch.special.entr(counts / values.shape[1]).sum(1).mean())
