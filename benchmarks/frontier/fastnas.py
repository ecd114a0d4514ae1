"""ModelOpt 0.47 FastNAS as its guide runs it on a CNN: `mtp.prune` with a constraint on FLOPs.

FastNAS measures how much accuracy each layer's widths cost alone (here on calibration images), and finds by halving the
same tolerance for all layers that meets the constraint. It knows FLOPs and no latency of other devices, so the FLOPs
are searched so that the network, exported and optimised as all others, keeps the budget as measured. Widths are
multiples of the contestant's number: the default of 32 leaves next to nothing to choose in networks of this size.
"""

from __future__ import annotations

import copy
import io
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from benchmarks.frontier.arena import Arena, Entry
from benchmarks.frontier.trials import Trials

SCORED = 512
"""Calibration images that widths are scored on."""


def enter(arena: Arena, budget: float, contestant: str, folder: Path) -> Entry:
    """The network of most FLOPs that keeps the budget. Raises NeverMet."""
    divisor, begun = int(contestant.rpartition("-")[2]), time.monotonic()
    checkpoint = folder / "search.pth"
    trials = Trials(arena, folder, lambda share: cut(arena, divisor, share, checkpoint))
    share = trials.least(budget, {}, begun)
    return trials.entry(share, {}, begun, {"FLOPs": 1 - share})


def cut(arena: Arena, divisor: int, share: float, checkpoint: Path) -> nn.Module | None:
    """The network that FastNAS finds without this share of the FLOPs; None where it finds none.

    checkpoint: where it keeps the scores of the widths, which do not depend on the share.
    """
    import modelopt.torch.prune as mtp  # type: ignore[import-not-found, unused-ignore]

    rules = mtp.fastnas.FastNASConfig()
    rules["nn.Conv2d"]["*"]["channel_divisor"] = divisor
    for kind in ("nn.BatchNorm2d", "nn.Linear"):
        rules[kind]["*"]["feature_divisor"] = divisor
    samples = arena.samples
    asked: dict[str, Any] = {
        "data_loader": [batch[0] for batch in samples.inputs], "score_func": lambda model: score(arena, model),
        "collect_func": lambda batch: batch, "checkpoint": str(checkpoint), "verbose": False,
    }  # fmt: skip
    model = copy.deepcopy(arena.model)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found, _ = mtp.prune(
                model, mode=[("fastnas", rules)], constraints={"flops": f"{100 * (1 - share):.2f}%"},
                dummy_input=arena.project.example()[0], config=asked,
            )  # fmt: skip
    except (AssertionError, RuntimeError, ValueError) as error:
        said = (str(error).strip().splitlines() or [""])[-1][:120]
        print(f"   FastNAS finds nothing without {share:.3f} of the FLOPs: {type(error).__name__} {said}", flush=True)
        return None
    return cast(nn.Module, found).eval()


@torch.inference_mode()
def score(arena: Arena, model: nn.Module) -> float:
    """Accuracy on calibration images."""
    samples = arena.samples.first(SCORED)
    assert samples.targets is not None
    right = torch.cat([model(*batch).argmax(1) for batch in samples.inputs]) == samples.targets
    return float(right.float().mean())
