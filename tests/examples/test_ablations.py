"""The ablations: how a cell is brought to the latency of the others, and what the table says."""

import json
import math
from types import SimpleNamespace

import pytest

from benchmarks.ablations import __main__ as ablations
from benchmarks.ablations import arms, table
from benchmarks.ablations.arms import ARMS, BUDGET, NET, OURS, Cell, Try, next_budget
from benchmarks.ablations.switches import SWITCHES
from benchmarks.frontier import running
from benchmarks.frontier.arena import FULL, QUICK, Entry, NeverMet
from benchmarks.frontier.cells import DENSE, Store


def levelled(latency, budget=0.5):
    """Builds until one is level, on a device that gives `latency` for a budget."""
    tried = []
    asked = budget
    while asked is not None and len(tried) < arms.TRIES:
        ratio = latency(asked)
        tried.append(Try(asked, ratio, ratio <= 0.995 * budget))
        asked = next_budget(tried, budget, 0.03)
    return tried


def test_a_build_that_is_level_at_once_is_not_repeated():
    assert len(levelled(lambda asked: 0.98 * asked)) == 1


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.1, 1.4, 1.9])
def test_builds_that_miss_or_leave_much_unused_are_level_after_few(factor):
    tried = levelled(lambda asked: factor * asked)
    assert len(tried) <= 3 and tried[-1].kept and tried[-1].ratio > 0.5 * 0.97


def test_a_staircase_is_divided_and_left_where_nothing_lies_between():
    tried = levelled(lambda asked: 0.41 if asked < 0.497 else 0.57)
    assert len(tried) <= arms.TRIES and max(t.ratio for t in tried if t.kept) == 0.41
    assert next_budget([Try(0.5, 0.57, False), Try(0.498, 0.41, True)], 0.5, 0.03) is None


# --- cells ---------------------------------------------------------------------------------------------------------


def test_each_seed_begins_with_the_whole_method_and_every_switch_is_used():
    names = [cell.name for cell in arms.cells()]
    assert names[:2] == [f"{NET}/{DENSE}", f"{NET}/{BUDGET}/{OURS}@0"]
    assert len(names) == len(set(names)) == 1 + len(arms.SEEDS) * len(ARMS)
    assert [cell.name for cell in arms.cells(core_only=True)] == names[: 1 + len(ARMS)]
    assert {arm.switch for arm in ARMS.values()} == {"", *SWITCHES}
    assert next(iter(ARMS)) == OURS  # what others take its plan from


def test_a_cell_knows_its_ablation_and_seed_and_every_draw_gets_it():
    cell = Cell(NET, BUDGET, "no-feedback@2")
    assert (cell.arm, cell.seed, cell.cells) == ("no-feedback", 2, (f"{NET}/{BUDGET}/no-feedback@2/distilled",))
    for pace in (FULL, QUICK):
        flags = arms.seeded(pace, cell).flags
        assert {"prune.seed=2", "measure.seed=2", "recover.seed=2"} <= set(flags) and set(pace.flags) <= set(flags)


def test_a_try_out_is_kept_apart_from_the_results(monkeypatch):
    monkeypatch.setenv("EDGE_TRAINED", "elsewhere")
    monkeypatch.setenv("EDGE_DATA_LIMIT", "")
    base, results = running.place(ablations.CONTEST, quick=True)
    assert base.name == "quick" and results == base / "ablations.jsonl"


class Builds:
    """Builds on a made-up device: the ratio is `factor` times the budget asked for."""

    def __init__(self, factor, monkeypatch):
        self.factor, self.asked = factor, []
        monkeypatch.setattr(arms, "_built", self.built)
        monkeypatch.setattr(
            arms, "_settled", lambda _, entry, __, seconds, sittings, facts: (entry, seconds, sittings, facts)
        )

    def built(self, _arena, _arm, asked, _work):
        self.asked.append(asked)
        if self.factor is None:
            raise NeverMet("deploy build ended with 3: nothing fits", {"search": 7.0}, 0)
        ratio = self.factor * asked
        return Entry(
            lambda: None,
            ratio,
            {},
            {"search": 100.0, "accept": 20.0},
            4,
            {"accepted": [ratio, ratio - 0.002, ratio + 0.002]},
        )


ARENA = SimpleNamespace(profile=SimpleNamespace(prune=SimpleNamespace(slack=0.03, repair="least-squares")))


def test_every_build_of_a_cell_counts_in_its_seconds(monkeypatch, tmp_path):
    builds = Builds(1.2, monkeypatch)
    entry, seconds, sittings, facts = arms.enter(ARENA, Cell(NET, BUDGET, "flops@0"), tmp_path, tmp_path)
    assert len(builds.asked) == 2 and seconds == {"search": 240.0} and sittings == 8
    assert 0.5 * 0.97 < entry.ratio <= 0.5 and [each[0] for each in facts["tried"]] == builds.asked
    assert facts["tried"][0][1] == pytest.approx(0.6) and facts["repair"] == "least-squares"


def test_a_cell_that_no_build_keeps_tells_what_was_tried(monkeypatch, tmp_path):
    Builds(None, monkeypatch)
    with pytest.raises(NeverMet, match=r"no build keeps 0.5x: deploy build ended with 3: nothing fits") as missed:
        arms.enter(ARENA, Cell(NET, BUDGET, "repair-none@1"), tmp_path, tmp_path)
    assert missed.value.seconds == {"search": 7.0}


def test_another_repair_of_a_plan_that_is_not_there_says_what_to_run_first(tmp_path):
    arena = SimpleNamespace(folder=tmp_path)
    with pytest.raises(RuntimeError, match=f"{NET}/0.5x/ours@1 left no plan in .* run it first"):
        arms.enter(arena, Cell(NET, BUDGET, "same-plan-bn@1"), tmp_path, tmp_path)


# --- the table -----------------------------------------------------------------------------------------------------


def filled(path, cells):
    """A store with the dense network and cells: name -> (repaired, recovered, ratios of its builds)."""
    store = Store(path)
    head = {"net": NET, "machine": {"cpu": "a processor", "cores": 2}, "versions": {"torch": "2.13.0"}}
    store.add(head | {
        "cell": f"{NET}/{DENSE}/{DENSE}", "budget": "", "contestant": DENSE, "group": f"{NET}/", "accuracy": 0.892,
        "images": 5000, "onnx": "dense.onnx", "sha256": "dense",
    })  # fmt: skip
    for name, (repaired, recovered, ratios) in cells.items():
        cell = Cell(NET, BUDGET, name)
        store.add(head | {
            "cell": cell.cells[0], "budget": BUDGET, "contestant": name, "group": cell.group, "accuracy": recovered,
            "searched": ratios[-1], "onnx": "x.onnx", "sha256": name, "seconds": {"search": 100.0, "recover": 50.0},
            "facts": {"repaired": repaired, "tried": [[0.5, ratio, ratio, ratio] for ratio in ratios]},
        })  # fmt: skip
    return store


CELLS = {
    "ours@0": (0.83, 0.874, [0.49]), "ours@1": (0.82, 0.872, [0.488]),
    "flops@0": (0.80, 0.864, [0.56, 0.49]), "flops@1": (0.78, 0.860, [0.55, 0.489]),
    "scores@1": (0.70, 0.871, [0.49]),
}  # fmt: skip


def test_worth_is_the_difference_over_the_seeds_that_both_have(tmp_path):
    store = filled(tmp_path / "r.jsonl", CELLS)
    ours, flops, scores = (table.result(store, arm) for arm in ("ours", "flops", "scores"))
    lost = table.worth(ours, flops)
    assert (lost.repaired, lost.recovered, lost.seeds) == (pytest.approx(0.035), pytest.approx(0.011), 2)
    assert lost.recovered_half == pytest.approx(12.706 * 0.001, rel=1e-3)  # t of one degree of freedom
    alone = table.worth(ours, scores)
    assert alone.recovered == pytest.approx(0.001) and math.isnan(alone.recovered_half)
    assert flops.builds == 2 and flops.first == (0.56, 0.55) and flops.seconds == 100
    assert (
        table.worth(ours, table.result(filled(tmp_path / "s.jsonl", {"scores@2": (0.7, 0.87, [0.49])}), "scores"))
        is None
    )


def test_the_table_says_what_each_part_is_worth_and_whether_the_seeds_show_it(tmp_path):
    store = filled(tmp_path / "r.jsonl", CELLS)
    store.add({
        "cell": f"{NET}/{BUDGET}/repair-none@0/distilled", "group": f"{NET}/{BUDGET}", "net": NET, "budget": BUDGET,
        "contestant": "repair-none@0", "missed": "no build keeps 0.5x: 0.512x for 0.500x", "seconds": {"search": 9.0},
    })  # fmt: skip
    text = table.table(store)
    assert "dense 89.20 % of 5000 test images; a processor, 2 cores; torch 2.13.0" in text
    (flops,) = (line for line in text.splitlines() if line.split()[:1] == ["flops"])
    assert "0.4895x (own)" in flops and "0.5550x" in flops and "79.00" in flops and "86.20" in flops
    assert "measuring the table instead of counting: worth +1.10 ± 1.27 points after the epoch" in text
    assert "NOT shown by these seeds" in text and "one seed says little" in text
    assert "no build keeps 0.5x: 0.512x for 0.500x" in text
    told = json.loads(json.dumps(table.record(store), allow_nan=False))
    assert [each["arm"] for each in told["ablations"]] == ["ours", "flops", "scores"]
    assert told["ablations"][2]["worth"]["recovered_half"] is None
    assert table.table(Store(tmp_path / "none.jsonl")) == "no results yet"


def test_ratios_of_the_common_session_replace_those_of_the_builds(tmp_path):
    store = filled(tmp_path / "r.jsonl", {name: CELLS[name] for name in ("ours@0", "flops@0")})
    names = ("ours@0", "flops@0")
    store.add(
        {
            "final": f"{NET}/{BUDGET}",
            "ratios": {n: [0.481, 0.48, 0.482] for n in names},
            "sha256": {n: n for n in names},
        }
    )
    assert table.result(store, "flops").ratios == (0.481,) and table.result(store, "flops").final
    assert "(own)" not in table.table(store)
