"""The picture: test accuracy against measured latency, intervals on both axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.frontier.cells import BUDGETS, DENSE, NETS, RECOVERIES, Store
from benchmarks.frontier.table import OURS, Line, lines

FAMILIES = {
    "ours": ("ours", "*", "C3"), "ours-": ("ours, other methods", ".", "C1"),
    "torch-pruning": ("Torch-Pruning", "o", "C0"), "fastnas": ("FastNAS", "^", "C4"),
    "scratch-width": ("narrower, from scratch", "D", "C2"), "scratch-depth": ("shallower, from scratch", "s", "C5"),
}  # fmt: skip
"""Beginning of a contestant's name -> label, marker, colour; the longest beginning counts."""

SHOWN = (0.15, 0.95)
"""Range of the latency axis; longer bounds are cut off at its ends."""


def draw(store: Store, path: Path) -> None:
    """One row of panels a network, one panel a recovery; nothing without results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    every = lines(store)
    nets = [net for net in NETS if any(line.net == net for line in every)]
    if not nets:
        return
    figure, panels = plt.subplots(len(nets), 2, figsize=(14, 4.6 * len(nets)), squeeze=False, layout="constrained")
    for row, net in zip(panels, nets, strict=True):
        dense = store.cells[f"{net}/{DENSE}/{DENSE}"]["accuracy"]
        for panel, recovery in zip(row, RECOVERIES, strict=True):
            shown = [line for line in every if (line.net, line.recovery) == (net, recovery)]
            _points(panel, shown)
            panel.axhline(100 * dense, color="0.5", lw=0.8, ls="--", label="dense")
            for budget in BUDGETS:
                panel.axvline(float(budget.removesuffix("x")), color="0.85", lw=0.8, zorder=0)
            panel.set_title(f"{net}, {recovery}")
            panel.set_xlabel("latency / dense, measured (99 % bounds)")
            panel.set_ylabel("test accuracy, % (95 %)")
            panel.set_xlim(*SHOWN)
            panel.grid(alpha=0.25)
    pairs = (zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels.flat)
    handles = {label: handle for pair in pairs for handle, label in pair}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize="small")
    figure.suptitle("filled: the budget is kept by the measured bound; hollow: it is not", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def family(contestant: str) -> tuple[str, str, str]:
    """Label, marker and colour."""
    beginning = max((name for name in FAMILIES if contestant.startswith(name)), key=len, default=OURS)
    return FAMILIES[beginning]


def _points(panel: object, shown: Sequence[Line]) -> None:
    for line in sorted(shown, key=lambda each: each.contestant, reverse=True):  # ours on top
        label, marker, colour = family(line.contestant)
        bounds = line.bounds if not math.isnan(line.bounds[0]) else (line.ratio, line.ratio)
        panel.errorbar(  # type: ignore[attr-defined]
            line.ratio, 100 * line.accuracy, label=label, marker=marker, color=colour, ls="", capsize=2, elinewidth=0.8,
            markersize=10 if line.contestant == OURS else 5, mfc=colour if line.kept else "none",
            xerr=[[max(0.0, line.ratio - bounds[0])], [max(0.0, bounds[1] - line.ratio)]],
            yerr=[[100 * (line.accuracy - line.interval[0])], [100 * (line.interval[1] - line.accuracy)]],
        )  # fmt: skip
