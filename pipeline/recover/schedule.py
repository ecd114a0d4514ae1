"""How many steps a recovery takes and how large each is: one cycle, planned to end inside the minutes it has.

The learning rate rises from peak / 25 to the peak over the first 30 % of the steps and falls to peak / 10,000 at the
last, both along half a cosine (Smith and Topin 2018, super-convergence). It is a function of (step, steps), so that a
resumed run follows the same curve.
"""

from __future__ import annotations

import math

RISE = 0.3
_FROM, _TO = 1 / 25, 1e-4
_MARGIN = 0.9


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step, 0 <= step < steps."""
    top = RISE * max(steps - 1, 1)
    if step <= top:
        return peak * _half_cosine(_FROM, 1.0, step / top)
    return peak * _half_cosine(1.0, _TO, (step - top) / (steps - 1 - top))


def plan_steps(wanted: int, step_s: float, score_s: float, epochs: int, minutes: float) -> int:
    """Steps that fit: all that are wanted, or as many as 90 % of the minutes allow once the scoring is paid for.

    step_s: seconds of a step, measured. score_s: seconds of one `validate`, asked after each of the epochs.
    """
    seconds = _MARGIN * 60 * minutes
    per_epoch = wanted / max(epochs, 1) * step_s + score_s
    if epochs * per_epoch <= seconds:
        return wanted
    fitting = (seconds - score_s) / per_epoch * wanted / max(epochs, 1)
    return max(0, min(wanted, int(fitting)))


def waited(scores: list[float]) -> int:
    """Epochs since the best of these scores."""
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
