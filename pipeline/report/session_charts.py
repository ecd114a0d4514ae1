"""Charts of measuring sessions: how latencies are distributed, how they moved in time, how processes differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from pipeline.report.drawing import INK, SERIES, SOFT, WIDTH, drawn, logarithmic, short, stacked
from targets.harness.measurement import Blocks, Session

LONG = 3.0
"""From this multiple of the median on, a slowest inference asks for a logarithmic axis."""
Line = NDArray[np.float64]


def colour(position: int) -> str:
    """Colour of the network at this position of a session."""
    return SERIES[position % len(SERIES)]


def histograms(sessions: Sequence[Session], names: Sequence[str]) -> str:
    """Every usable inference of each network, one row a network on one axis; nothing is cut off."""
    samples = {n: np.concatenate([s.measurement(n).pooled_ns for s in sessions]) * 1e-6 for n in names}
    first = float(np.median(samples[names[0]]))
    low, high = min(float(ms.min()) for ms in samples.values()), max(float(ms.max()) for ms in samples.values())
    long = high > LONG**2 * low or any(float(ms.max()) > LONG * float(np.median(ms)) for ms in samples.values())
    edges = np.geomspace(0.98 * low, 1.02 * high, 181) if long else np.linspace(0.98 * low, 1.02 * high, 91)
    size = (WIDTH, 0.7 + 0.9 * len(names))
    with stacked("Latencies of single inferences", size, len(names)) as (axes, out):
        for position, (own, (name, ms)) in enumerate(zip(axes, samples.items(), strict=True)):
            _hill(own, ms, edges, colour(position))
            own.axvline(first, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
            own.set_title(f"{short(name)}: {ms.size} inferences", fontsize=9, fontweight="normal", pad=2)
            _share_axis(own, long=long)
        axes[0].set_xlim(edges[0], edges[-1])
        if long:
            logarithmic(axes[0], "x")
        end = "logarithmic, shares too" if long else "shares of inferences"
        axes[-1].set_xlabel(f"ms of one inference ({end}); dotted: median of {short(names[0])}", fontsize=9)
    return out[0]


def _hill(axes: Axes, ms: Line, edges: Line, shade: str) -> None:
    heights, _ = np.histogram(ms, edges)
    axes.stairs(heights / ms.size, edges, fill=True, color=shade, alpha=0.35)
    axes.stairs(heights / ms.size, edges, color=shade)


def _share_axis(axes: Axes, *, long: bool) -> None:
    if long:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        ticks = [at for at in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1) if low <= at <= high][::2]
        axes.set_yticks(ticks, [f"{100 * at:g} %" for at in ticks], fontsize=8)
        axes.set_yticks([], minor=True)
    else:
        axes.set_yticks([])


@dataclass(frozen=True)
class _Track:
    """Block medians of one process. at: where its blocks lie on the time axis; shape (rounds,) like ms and flagged."""

    position: int
    at: Line
    ms: Line
    flagged: NDArray[np.bool_]


def series(
    sessions: Sequence[Session], names: Sequence[str], headings: Sequence[str] = ("",), *, level: bool = False
) -> str:
    """The median of every block in the order they ran, one row a network, flagged blocks marked.

    headings: what the sessions are called, which follow each other; level: the rows share their axis of milliseconds.
    """
    tracks, bounds, timed = _tracks(sessions, names)
    size = (WIDTH, 0.7 + 0.9 * len(names))
    with stacked("Block medians over the session", size, len(names)) as (axes, out):
        for track in tracks:
            own = axes[track.position]
            own.plot(track.at, track.ms, color=colour(track.position), linewidth=0.8)
            own.plot(track.at[track.flagged], track.ms[track.flagged], "x", color=INK, markersize=3, linestyle="none")
        for own, name in zip(axes, names, strict=True):
            own.set_title(short(name), fontsize=9, fontweight="normal", pad=2)
            own.tick_params(labelsize=8)
            for start in bounds[1:]:
                own.axvline(start, color=SOFT, linewidth=0.9, linestyle=(0, (2, 2)))
        for before, after, start in zip(headings, headings[1:], bounds[1:], strict=False):
            place = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": 8.5, "color": SOFT, "ha": "center"}
            axes[0].annotate(f"{before} | {after}", (start, 1.0), xycoords=axes[0].get_xaxis_transform(), **place)
        _scale(axes, tracks, level=level)
        marked = "; x: flagged" if any(track.flagged.any() for track in tracks) else ""
        axes[-1].set_xlabel(f"{'seconds' if timed else 'rounds'} of measuring{marked}", fontsize=9)
        axes[len(axes) // 2].set_ylabel("ms of a block", fontsize=9)
    return out[0]


def _scale(axes: Sequence[Axes], tracks: Sequence[_Track], *, level: bool) -> None:
    for position, own in enumerate(axes):
        ms = np.concatenate([track.ms for track in tracks if level or track.position == position])
        low, high = float(ms.min()), float(ms.max())
        own.margins(x=0.01)
        if high > LONG * low:
            own.set_ylim(low / 1.05, high * 1.05)
            logarithmic(own, "y")
        else:
            room = 0.06 * (high - low) or 0.05 * high
            own.set_ylim(low - room, high + room)


def _tracks(sessions: Sequence[Session], names: Sequence[str]) -> tuple[list[_Track], list[float], bool]:
    """Tracks, where each session begins, and whether the axis is in seconds rather than in rounds."""
    blocks = [[session.measurement(name).processes for name in names] for session in sessions]
    timed = all(block.started_ns.any() for session in blocks for each in session for block in each)
    tracks: list[_Track] = []
    starts, offset = [], 0.0
    for session in blocks:
        starts.append(offset)
        places = _seconds(session) if timed else _rounds(session)
        for position, (processes, own) in enumerate(zip(session, places, strict=True)):
            tracks += [
                _Track(position, offset + at, block.medians_ns * 1e-6, block.flagged)
                for block, at in zip(processes, own, strict=True)
            ]
        offset += max(float(at[-1]) for own in places for at in own) + 1.0
    return tracks, starts, timed


def _seconds(session: list[tuple[Blocks, ...]]) -> list[list[Line]]:
    """When each block began, s. A session joined to an earlier one counts from its own start and is put after it."""
    places: list[list[Line]] = [[] for _ in session]
    offset, end = 0.0, 0.0
    for repeat in zip(*session, strict=True):
        starts = [block.started_ns * 1e-9 for block in repeat]
        if min(float(own.min()) for own in starts) + offset < end:
            offset = end
        for own, at in zip(places, starts, strict=True):
            own.append(at + offset)
        end = max(float(at.max()) for at in starts) + offset
    return places


def _rounds(session: list[tuple[Blocks, ...]]) -> list[list[Line]]:
    places: list[list[Line]] = []
    for own in session:
        before = np.cumsum([0, *(len(block.ns) for block in own[:-1])])
        places.append([start + np.arange(len(block.ns), dtype=float) for start, block in zip(before, own, strict=True)])
    return places


def processes(session: Session) -> str:
    """The median of every process as a share of its network's median over all: what fresh processes alone change."""
    names = list(session.measurements)
    with drawn("Median of each process", (WIDTH, 0.9 + 0.32 * len(names))) as (axes, out):
        for position, measured in enumerate(session.measurements.values()):
            own = np.array([float(np.median(block.kept)) * 1e-6 for block in measured.processes])
            axes.scatter(100 * (own / measured.p50_ms - 1), np.full(own.size, position), color=colour(position), s=26)
        axes.axvline(0.0, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.set_yticks(range(len(names)), [short(name) for name in names], fontsize=9)
        axes.set(xlabel="median of a process against all processes, %", ylim=(len(names) - 0.5, -0.5))
        axes.margins(x=0.12)
    return out[0]
