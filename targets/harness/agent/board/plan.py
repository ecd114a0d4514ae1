"""How many inferences a session's blocks hold, and how many rounds it has, so that it keeps its cap."""

from typing import Dict, Tuple

from .base import AgentError, Table

MAX_TIMED = 4096
SUSTAINED_BLOCK_NS = 100_000_000
SUSTAINED_SAMPLES = 300_000
"""Timed inferences of a model that a sustained process keeps, about; the others load the device untimed."""
Plan = Tuple[int, int, Dict[str, int]]
"""Rounds; untimed inferences at the start of a block; timed ones of each model."""


def plan_blocks(job: Table, medians: Dict[str, int], spent_s: float) -> Plan:
    """Rounds, dropped and timed inferences a block, so that the session keeps to max_seconds.

    medians: ns of one inference of each model; spent_s: seconds that one process took to start and warm up. Blocks grow
    until they take block_min_ns. Where the cap is near, blocks shrink first, then the rounds, down to 3. A network that
    alone takes block_min_ns finds its caches within its own time, and goes without untimed inferences rather than
    without rounds. In a paced session an inference takes the whole periods that it needs, and every block may wait one
    tick for its first.
    """
    repeats, rounds, dropped = job["processes"], job["rounds"], job["dropped"]
    period = int(job.get("period_ns") or 0)
    costs = {n: period * -(-ns // period) if period else max(1, ns) for n, ns in medians.items()}
    timed = {n: min(MAX_TIMED, max(job["timed"], -(-int(job["block_min_ns"]) // ns))) for n, ns in costs.items()}
    turn_s, idle_s = sum(costs.values()) * 1e-9, len(costs) * period * 1e-9
    left_s = job["max_seconds"] - repeats * spent_s
    room_s = left_s / (repeats * rounds) - idle_s
    work_s = sum(timed[n] * costs[n] for n in costs) * 1e-9
    if dropped * turn_s + work_s <= room_s:
        return rounds, dropped, timed
    if dropped * turn_s >= 0.5 * room_s:
        dropped = min(dropped, 1)
    if (dropped + 1) * turn_s > room_s and not period and min(costs.values()) >= job["block_min_ns"]:
        dropped = 0
    share = max(0.0, (room_s - dropped * turn_s) / work_s)
    timed = {n: max(1, int(timed[n] * share)) for n in timed}
    least_s = sum((dropped + timed[n]) * costs[n] for n in costs) * 1e-9 + idle_s
    if least_s > room_s + idle_s:
        rounds = int(left_s / (repeats * least_s))
    if rounds < 3:
        needed = repeats * (spent_s + 3 * least_s)
        raise AgentError(
            "long", "the shortest session takes about %.1f s, the cap is %.1f s" % (needed, job["max_seconds"])
        )
    return rounds, dropped, timed


def plan_sustained(job: Table, medians: Dict[str, int], timed: Dict[str, int]) -> Tuple[Dict[str, int], Dict[str, int]]:
    """Timed inferences of a block of the sustained process and the untimed ones added to it, by model.

    Blocks are longer than in the other processes, since there are many; where more than SUSTAINED_SAMPLES of a model
    would be kept, part of a block is untimed, so that the device is loaded all the same.
    """
    period = int(job.get("period_ns") or 0)
    costs = {n: period * -(-ns // period) if period else max(1, ns) for n, ns in medians.items()}
    whole = {n: min(MAX_TIMED, max(timed[n], -(-SUSTAINED_BLOCK_NS // costs[n]))) for n in timed}
    rounds = max(1.0, job["sustained_s"] / (sum(whole[n] * costs[n] for n in whole) * 1e-9))
    kept = {n: max(1, min(count, int(SUSTAINED_SAMPLES / rounds))) for n, count in whole.items()}
    return kept, {n: whole[n] - kept[n] for n in whole}
