"""A measuring session for people, for machines and as a page: every statistic with its bounds, or why it has none."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from itertools import pairwise

import made_checks as made
import numpy as np
import pytest
from rich.console import Console
from test_check_report import BAD, sealed

from pipeline.report import session as told
from pipeline.report import session_charts
from pipeline.report.measure_html import measure_page
from targets.harness.measurement import Session

PACED = made.session({"dense": 0.81, "slim": 0.39}, processes=3, rounds=40, paced_ms=0.85)
BRIEF = made.session({"dense": 0.81}, processes=1, rounds=4, timed=5, conditions=())


def shown(session: Session) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    told.show_session(session, console)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_every_statistic_is_told_with_its_bounds_and_a_missing_one_with_its_reason():
    lines = shown(PACED)
    p50 = PACED.measurement("dense").p50
    assert f"dense p50 {p50.value_ms:.3f} ms {p50.low_ms:.3f} to {p50.high_ms:.3f} ms" in lines
    count = PACED.measurement("dense").pooled_ns.size
    assert any(line.startswith("p99 too few samples") and f"p99 needs 4096 inferences, there are {count}" in line
               for line in lines)  # fmt: skip
    assert "note load 1.90 on 2 cores absolute times may be high: wait." in lines
    assert lines[-1].startswith("protocol: 2; 3 processes x 40 rounds, paced at 0.85 ms, 1 thread, no spinning, seed 0")


def test_deadline_misses_are_counted_when_paced_and_absent_when_not():
    missed, of = PACED.measurement("dense").deadline_misses or (0, 0)
    head, first = shown(PACED)[:2]
    assert "missed" in head and f"{missed} of {of} (" in first and missed > 0
    assert "missed" not in shown(BRIEF)[0] and "back to back" in shown(BRIEF)[-1]
    machine = told.session_json(PACED)["models"]["dense"]
    assert machine["deadline_misses"] == {"missed": missed, "inferences": of}
    assert machine["deadline_miss_ratio"] == pytest.approx(missed / of) and machine["paced_ms"] == 0.85
    assert told.session_json(BRIEF)["models"]["dense"]["deadline_misses"] is None


def test_json_is_strict_and_names_the_reason_of_a_null():
    machine = json.loads(json.dumps(told.session_json(BRIEF), allow_nan=False))
    dense = machine["models"]["dense"]
    assert dense["p99_ms"] is None and dense["p99_reason"].startswith("p99 needs 4096 inferences")
    assert dense["p99_ms_bounds"][1] is None and dense["ratio_bounds"] == [None, None]
    assert dense["p50_ms"] > 0 and dense["p50_reason"] is None
    assert dense["spread"] is None, "one process shows no spread"
    assert machine["protocol"].startswith("protocol: 2;") and machine["conditions"] == []
    several = told.session_json(PACED)
    assert several["models"]["slim"]["spread"] == PACED.measurement("slim").spread
    assert several["conditions"][0]["name"] == "load" and len(several["models"]["slim"]["process_p50_ms"]) == 3


def test_times_on_the_gpu_are_told_where_there_are_some():
    parts = tuple(replace(b, gpu_ns=b.ns // 2) for b in BRIEF.measurement("dense").processes)
    both = replace(BRIEF, measurements={"dense": replace(BRIEF.measurement("dense"), processes=parts)})
    half = f"{BRIEF.measurement('dense').p50_ms / 2:.3f} ms"
    lines = shown(both)
    assert "GPU p50" in lines[0] and half in lines[1] and any(line.startswith(f"GPU p50 {half}") for line in lines)
    machine = told.session_json(both)["models"]["dense"]
    assert machine["gpu"]["p50_ms"] == pytest.approx(machine["p50_ms"] / 2, rel=1e-4)
    assert machine["gpu"]["p99_ms"] is None and "p99 needs 4096" in machine["gpu"]["p99_reason"]
    assert "between CUDA events" in measure_page(both) and "CUDA" not in measure_page(BRIEF)
    assert "gpu" not in told.session_json(BRIEF)["models"]["dense"] and "GPU" not in shown(BRIEF)[0]


def test_what_heat_did_is_told_of_a_session_that_lasted():
    blocks = PACED.measurement("dense").processes[0]
    hot = np.where(np.arange(40)[:, None] < 20, 800_000, 880_000) * np.ones_like(blocks.ns)
    long = replace(blocks, ns=hot, started_ns=np.arange(40) * 2_000_000_000)
    session = replace(PACED, measurements={"dense": replace(PACED.measurement("dense"), processes=(long,))})
    assert "drift" in shown(session)[0] and "+10.0 %" in shown(session)[1]
    assert told.session_json(session)["models"]["dense"]["drift"] == pytest.approx(1.1)
    assert "drift" not in shown(PACED)[0] and "first 30 s" in measure_page(session)


def test_the_page_shows_pictures_statistics_conditions_and_samples():
    html = measure_page(PACED)
    sealed(html)
    assert html.count("<svg") == 3
    for part in ("p99 needs 4096", "1.90 on 2 cores", "paced at 0.85 ms", "ratio to dense", "no spinning", "Linux 6.1",
                 "seconds of measuring", "99 % bounds", "throttle events", "missed"):  # fmt: skip
        assert part in html, part


def test_the_same_session_gives_the_same_page():
    assert measure_page(PACED) == measure_page(PACED)


def test_a_page_of_the_shortest_session_can_be_made():
    html = measure_page(BRIEF)
    sealed(html)
    assert "one process" in html and "no upper bound" in html


def test_names_in_tables_and_pictures_are_text():
    strange = (BAD, "_hidden", r"$\frac{1}$", "模型")
    session = made.session(dict.fromkeys(strange, 0.5), processes=2, rounds=5)
    html = measure_page(session)
    sealed(html)
    assert "<script" not in html and "&lt;script&gt;" in html and "\x1b" not in html
    assert html.count(r"$\frac{1}$") >= 5 and "_hidden" in html and "模型" in html


def test_a_contaminated_or_simulated_session_says_so_first():
    dense = PACED.measurement("dense")
    dirty = [replace(block, flagged=np.ones_like(block.flagged)) for block in dense.processes]
    bad = replace(PACED, measurements={**PACED.measurements, "dense": replace(dense, processes=tuple(dirty))})
    assert "this is no result" in measure_page(bad) and "this is no result" not in measure_page(PACED)
    simulated = replace(PACED, fingerprint=replace(PACED.fingerprint, simulated=True))
    assert "simulated device" in measure_page(simulated)


def test_a_long_tail_gets_a_logarithmic_axis_and_is_not_cut_off():
    def page(slowest: float) -> str:
        session = made.session({"dense": 1.0}, processes=2, rounds=20, tail=0.0)
        first, *rest = session.measurement("dense").processes
        ns = first.ns.copy()
        ns[0, 0] = round(1e6 * slowest)
        flagged = np.zeros_like(first.flagged)
        own = replace(session.measurement("dense"), processes=(replace(first, ns=ns, flagged=flagged), *rest))
        return session_charts.histograms([replace(session, measurements={"dense": own})], ["dense"])

    assert "logarithmic" in page(40.0) and re.search(r">(20|30)<", page(40.0))
    assert "logarithmic" not in page(1.2)


def test_blocks_lie_at_the_second_they_began_and_a_joined_session_after_the_first():
    both = PACED.joined(PACED)
    (first, *_), bounds, timed = session_charts._tracks([both], ["dense"])
    tracks = session_charts._tracks([both], ["dense"])[0]
    assert timed and bounds == [0.0] and first.at[0] == 0.0
    assert all(later.at[0] > earlier.at[-1] for earlier, later in pairwise(tracks))


def test_without_times_blocks_follow_each_other_by_round():
    def timeless(session: Session) -> Session:
        measured = {
            name: replace(m, processes=tuple(replace(b, started_ns=np.zeros_like(b.started_ns)) for b in m.processes))
            for name, m in session.measurements.items()
        }
        return replace(session, measurements=measured)

    tracks, bounds, timed = session_charts._tracks([timeless(PACED), timeless(PACED)], ["dense"])
    assert not timed and bounds == [0.0, 120.0]
    assert np.concatenate([track.at for track in tracks]).tolist() == list(range(240))
    assert "rounds of measuring" in measure_page(timeless(PACED))
