"""Which unit another one can stand in for: what the similarity criteria share.

QSFM (Wang et al., Model pruning based on quantified similarity of feature maps, IEEE IoT Journal 2022) compares the
maps of a layer in pairs, takes the most similar pair, deletes one of the two, and goes on. The source gives no more
than that, and read plainly (maps as they are, the one of smaller norm goes) it loses to the norm of the weights. Here
a pair is compared as the repair `merge` will leave it: map i against a F_j + b, the straight line on its twin fitted
over all samples where a layer reads them, so that a map that is another one twice over is no loss. And it is weighted
by what is read of it:

    loss(i by j) = mean over readers of  w_i v_i d_ij / mean_k (w_k v_k)          w_j += a² w_i when i has gone

The readers are those with weights: a norm over channels passes on what it reads and counts for nothing.
d_ij: dissimilarity of F_i and a F_j + b, averaged over images. v_i: variance of the map. w_i: squared norm of the
weights that read it, and of those that it has taken over. The pair with the least loss in either direction goes first,
so the victim is the map whose loss is less. A loss of 1 is a mean unit of a layer lost whole, whatever the layer's
scale and width: losses compare across groups, and each is what its own removal adds. On ResNet-56 at -48 % operations,
after least squares, one threshold on it over all groups left 0.44 (PSNR) and 0.46 (SSIM) nats of divergence, equal
shares of every group 0.53 and 0.51; the plain reading's similarities and norms left 0.91 and 1.31 with one threshold,
0.64 and 0.69 with equal shares (300 images).

A group holds all that goes with a unit (an expansion's pointwise filter, its depthwise kernel and the column that reads
it), and maps are those at the reader, behind the depthwise kernel: separable convolutions need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.nouns import ChannelGroup, Ranking
from pipeline.prune.capture import Network
from pipeline.prune.criteria._filters import Floats
from pipeline.prune.evidence import Evidence
from pipeline.prune.maps import readers
from pipeline.prune.merge import Mixer, mixers


@dataclass(frozen=True)
class Lines:
    """Maps of a group as one reader sees them, and the straight line of each on each other.

    maps: (images, units, positions). variance: (units,), over images and positions. gain, offset: (units, units), of
    F_i ≈ gain_ij F_j + offset_ij. explained: the share of the variance of F_i that the line gives, (units, units).
    """

    maps: Tensor
    variance: Tensor
    gain: Tensor
    offset: Tensor
    explained: Tensor


Unlike = Callable[[Lines], Tensor]
"""Dissimilarity d_ij ≥ 0 of each map from the line on each other one, (units, units): 0 the same, 1 nothing alike."""


def lines(maps: Tensor) -> Lines:
    """Straight lines between the maps (samples, units, height, width).

    Maps of a single position have no image to compare: their samples are taken as the positions of one.
    """
    samples, units = maps.shape[:2]
    shown = maps.flatten(2) if maps.shape[2:].numel() > 1 else maps.reshape(1, samples, units).transpose(1, 2)
    flat = shown.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    centred = flat - mean[:, None]
    covariance = centred @ centred.T / flat.shape[1]
    variance = covariance.diagonal().clone()
    alive = variance > 1e-9 * flat.square().mean(1)
    variance = torch.where(alive, variance, 0.0)
    gain = torch.where(alive, covariance / torch.where(alive, variance, 1.0), 0.0)
    explained = (gain * covariance / torch.where(alive, variance, 1.0)[:, None]).clamp(0, 1)
    return Lines(shown, variance, gain, mean[:, None] - gain * mean, explained)


def by_similarity(evidence: Evidence, unlike: Unlike) -> list[Ranking]:
    """Rankings of all offered groups by what the loss of each unit leaves when its most similar one stands in."""
    found, weights = [], read_weights(evidence.network)
    for group in evidence.topology.offered:
        every = evidence.maps[group.id]
        share, apart, kept = torch.zeros(group.size), *torch.zeros(2, group.size, group.size)
        weigh = 0
        for maps, read in zip(every, weights(group), strict=True):
            seen = lines(maps)
            own = read * seen.variance
            weigh += bool(own.any())
            own = own / own.mean() if bool(own.any()) else own
            share, apart, kept = share + own, apart + own[:, None] * unlike(seen), kept + own[:, None] * seen.explained
        scale = torch.where(share > 0, share, 1.0)[:, None]
        terms = (value.double().numpy() for value in (share / max(1, weigh), apart / scale, kept / scale))
        found.append(paired(group, *terms))
    return found


def paired(group: ChannelGroup, share: Floats, apart: Floats, kept: Floats) -> Ranking:
    """The ranking that always removes the unit whose loss with some unit that is left to stand in is the least.

    share: what each unit counts, (units,). apart: the part of it that is lost when another one stands in, and kept:
    the part that the other one carries from then on, both (units, units).
    """
    share, open_ = share.copy(), share[:, None] * apart
    np.fill_diagonal(open_, np.inf)
    twins, least = open_.argmin(1), open_.min(1)
    order, added, twin = [], [0.0], []
    for _ in range(group.size - 1):
        gone = int(least.argmin())
        stays = int(twins[gone])
        order.append(gone)
        added.append(float(least[gone]))
        twin.append(stays)
        open_[gone], open_[:, gone], least[gone] = np.inf, np.inf, np.inf
        taken = kept[gone, stays] * share[gone]
        share[stays] += taken
        open_[stays] += np.where(np.isfinite(open_[stays]), taken * apart[stays], 0.0)
        changed = np.flatnonzero((twins == gone) & np.isfinite(least)).tolist()
        for unit in {stays, *changed} if len(order) < group.size - 1 else ():
            twins[unit], least[unit] = open_[unit].argmin(), open_[unit].min()
    (last,) = set(range(group.size)) - set(order)
    added.append(max(float(share[last]), *added))
    return Ranking(group.id, (*order, last), tuple(added[1:]), (*twin, -1))


def read_weights(network: Network) -> Callable[[ChannelGroup], list[Tensor]]:
    """For a group the squared norm of the weights that read each unit, (units,), for each reader of its maps.

    Readers without weights (norms over channels) pass on to readers that have them and weigh nothing; where no reader
    has any, all of them weigh alike.
    """
    layers = {reader.op: mixer for mixer in mixers(network, network.graph) for reader in mixer.readers}

    def squares(mixer: Mixer | None, group: ChannelGroup) -> Tensor:
        if mixer is None:
            return torch.zeros(group.size)
        each = mixer.weight.square().movedim(mixer.axis, 0).flatten(1).sum(1)
        return torch.stack([each[torch.from_numpy(mixer.units == unit)].sum() for unit in group.units])

    def weights(group: ChannelGroup) -> list[Tensor]:
        found = [squares(layers.get(reader.op), group) for reader in readers(network, group)]
        return found if any(bool(own.any()) for own in found) else [torch.ones(group.size) for _ in found]

    return weights
