"""Which blocks something else disturbed."""

from typing import List, Sequence

from .base import Table, median

FLAG_SWITCHES = 5
CLOCK_CHANGE = 0.01
CLOCKS = ("khz", "gpu_khz")


def flag(repeats: List[Table], names: Sequence[str]) -> None:
    """Mark the blocks that something else disturbed.

    A block is flagged when its involuntary switches exceed the model's median by more than 5 (by more than four times
    the square root of the median where that is larger: the natural scatter of the count in long blocks), when a
    hardware throttle counter moved, or when a locked clock, of a core or of a Jetson's GPU, differs by more than 1 %
    from the session's median of the same one: cores of one processor may be locked at different clocks.
    """
    blocks = [block for r in repeats for n in names for block in r["blocks"][n]]
    usual = {kind: usual_clocks([side for block in blocks for side in block.get(kind, ())]) for kind in CLOCKS}
    for name in names:
        middle = median([block["switches"] for repeat in repeats for block in repeat["blocks"][name]])
        limit = middle + max(FLAG_SWITCHES, 4.0 * middle**0.5)
        for repeat in repeats:
            for block in repeat["blocks"][name]:
                off = any(strayed(block.get(kind, ()), usual[kind]) for kind in CLOCKS)
                block["flagged"] = bool(block["switches"] > limit or block["throttle"] != 0 or off)


def strayed(readings: Sequence[Sequence[int]], usual: Sequence[int]) -> bool:
    """Whether a locked clock differs in some reading from its usual one."""
    return any(abs(khz - own) > CLOCK_CHANGE * own for reading in readings for khz, own in zip(reading, usual))


def usual_clocks(readings: Sequence[Sequence[int]]) -> List[int]:
    """Median clock of every core in kHz; readings: one clock a core, in the order of `clock_folders`."""
    cores = max([len(reading) for reading in readings] or [0])
    return [median([reading[core] for reading in readings if core < len(reading)]) for core in range(cores)]
