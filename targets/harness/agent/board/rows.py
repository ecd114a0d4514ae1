"""Rows of the latency table: many small models in one process."""

import random
from typing import Any, List

from .base import Table, median
from .model import open_model
from .worker import quiet_collector


def rows(job: Table) -> Table:
    """Block medians in ns of every model in every round, with several sessions of the reference among them."""
    models: List[Any] = []
    for path in list(job["models"]) + [job["reference"]] * job["sessions"]:
        models.append(open_model(path, job["options"]))
    quiet_collector()
    counts = []
    for model in models:
        once = min(model.block(1, 3))
        counts.append(max(job["timed"], min(job["timed_max"], int(job["block_ns"] // max(1, once)))))
    rng = random.Random(job["seed"])
    order = list(range(len(models)))
    times: List[List[int]] = [[] for _ in models]
    for turn in range(job["rounds"] + 1):
        rng.shuffle(order)
        for index in order:
            middle = median(models[index].block(job["dropped"], counts[index]))
            if turn:
                times[index].append(middle)
    rows_end = len(job["models"])
    return {"rows": times[:rows_end], "reference": times[rows_end:]}
