"""Blocks, pacing and warm-up of whatever can infer once: the timing rules of the measuring agent.

The clock is read around a complete synchronous inference with buffers that are bound before.
"""

import time
from typing import List, Tuple

from .base import CLOCK, Table, median

SPIN_NS = 200_000
"""Longest spin before a tick. A sleeping process is woken 50 to 100 us late, which would pass for a late start."""
WARM_INFERENCES = 3
"""Fewest inferences of a window of the warm-up, unless they take too long: a median of two hides no outlier."""
WARM_WINDOWS = 6
"""Windows before a slow network is given up as not steady."""


class Timed(object):
    """Something that infers. A subclass has `once`, and may have `settle`, which is called outside the timed part."""

    def once(self) -> None:
        """One complete inference: it has ended when this returns."""
        raise NotImplementedError

    def settle(self) -> None:
        """Called after every timed inference."""

    def block(self, dropped: int, timed: int) -> List[int]:
        """Nanoseconds of `timed` inferences after `dropped` untimed ones."""
        run, settle, clock = self.once, self.settle, CLOCK
        for _ in range(dropped):
            run()
        out = [0] * timed
        for i in range(timed):
            begin = clock()
            run()
            out[i] = clock() - begin
            settle()
        return out

    def paced(self, dropped: int, timed: int, period_ns: int) -> Tuple[List[int], int]:
        """Nanoseconds of `timed` inferences, one at each tick, after `dropped` untimed ones; and the deadline misses.

        Ticks are the multiples of the period on the monotonic clock. Only the last moment before a tick is spun, at
        most SPIN_NS and a tenth of the period. An inference misses its deadline when it has not finished before the
        next tick; the ticks that it ran over are skipped.
        """
        run, settle, clock = self.once, self.settle, CLOCK
        spin = min(SPIN_NS, period_ns // 10)
        out, missed, end = [0] * timed, 0, clock()
        for i in range(-dropped, timed):
            tick = (end // period_ns + 1) * period_ns
            rest = tick - spin - clock()
            if rest > 0:
                time.sleep(rest * 1e-9)
            begin = clock()
            while begin < tick:
                begin = clock()
            run()
            end = clock()
            if i >= 0:
                out[i] = end - begin
                missed += int(end >= tick + period_ns)
                settle()
        return out, missed

    def warm(self, rule: Table) -> Table:
        """Infer until min_s and min_inferences are reached and two windows' medians differ by less than `steady`.

        max_s ends it, steady or not. For a slow network half of max_s stands for min_inferences, and it goes on beyond
        max_s, to longest_s at most, until there were WARM_WINDOWS windows to compare.
        """
        begin, count, steady = CLOCK(), 0, False
        longest_s = max(rule["max_s"], rule.get("longest_s", 0.0))
        medians: List[int] = []
        while True:
            samples = self.window(rule["window_s"], 0.25 * longest_s)
            medians.append(median(samples))
            count += len(samples)
            seconds = (CLOCK() - begin) * 1e-9
            enough = count >= rule["min_inferences"] or seconds >= 0.5 * rule["max_s"]
            if len(medians) > 1 and seconds >= rule["min_s"] and enough:
                steady = abs(medians[-1] - medians[-2]) < rule["steady"] * medians[-2]
            tried = len(medians) >= WARM_WINDOWS or (len(medians) > 1 and seconds >= longest_s)
            if steady or (tried and seconds >= rule["max_s"]):
                return {"inferences": count, "seconds": seconds, "windows_ns": medians[-8:], "steady": steady}

    def window(self, least_s: float, most_s: float) -> List[int]:
        """Nanoseconds of the inferences of least_s, and of WARM_INFERENCES at least, begun before most_s are over."""
        samples: List[int] = []
        begin = CLOCK()
        while True:
            samples.extend(self.block(0, 1))
            seconds = (CLOCK() - begin) * 1e-9
            if seconds >= most_s or (seconds >= least_s and len(samples) >= WARM_INFERENCES):
                return samples
