"""The arena of benchmarks/frontier: its searches, store and verdicts; Torch-Pruning itself where it is installed."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import nets
from benchmarks.frontier import __main__ as frontier
from benchmarks.frontier import cells, contest, depgraph, finals, noise, ours, running, scratch, shortcuts, table
from benchmarks.frontier.arena import FULL, QUICK, NeverMet
from benchmarks.frontier.bisection import RETRIES, STEP_BACK, Steps, accepted, search, settled
from benchmarks.frontier.cells import Store, Unit
from benchmarks.frontier.drawing import draw, family
from benchmarks.frontier.sessions import Sitting, Timed
from benchmarks.frontier.trials import Trials
from pipeline.prune.capture import capture

# --- searching for a budget ----------------------------------------------------------------------------------------


class Device:
    """A made-up device that counts its sessions."""

    def __init__(self, latency):
        self.latency, self.sessions = latency, []

    def __call__(self, shares):
        self.sessions.append(list(shares))
        return [self.latency(share) for share in shares]


def test_a_search_ends_close_below_the_budget_in_few_sessions():
    device = Device(lambda share: 1 - share)
    tried = search(device, 0.437, Steps())
    best = min(share for share, ratio in tried.items() if ratio <= 0.437)
    assert 0.437 * 0.99 <= tried[best] <= 0.437
    assert len(device.sessions) <= 1 + Steps().sessions


def test_a_search_takes_the_least_share_of_a_staircase_that_rises_again():
    def latency(share):  # narrow layers are left whole beyond 0.7, as with a rounding to eights
        return 0.9 if share > 0.7 else 0.5 if share > 0.63 else 0.8

    tried = search(Device(latency), 0.55, Steps(scan=(0.2, 0.4, 0.68, 0.9)))
    best = min(share for share, ratio in tried.items() if ratio <= 0.55)
    assert 0.63 < best < 0.66


def test_a_search_looks_around_the_fastest_where_nothing_of_the_scan_is_fast_enough():
    def latency(share):
        return 0.3 + abs(share - 0.54)

    assert min(search(Device(latency), 0.31, Steps(scan=(0.2, 0.5, 0.8))).values()) <= 0.32
    assert min(search(Device(latency), 0.2, Steps()).values()) > 0.2


def test_a_search_over_networks_that_all_fail_ends():
    device = Device(lambda share: math.inf)
    assert all(math.isinf(ratio) for ratio in search(device, 0.5, Steps()).values())
    assert len(device.sessions) == 1


def test_a_lucky_measurement_is_not_taken_for_a_budget_kept():
    tried = {0.6: 0.49, 0.7: 0.48, 0.8: 0.3}
    truth = {0.6: 0.53, 0.7: 0.485, 0.8: 0.31}
    assert settled(tried, truth.__getitem__, 0.5, lambda share: share) == 0.7
    assert tried[0.6] == pytest.approx(math.sqrt(0.49 * 0.53))
    assert settled({0.6: 0.49}, lambda _: 0.6, 0.5, lambda share: share) is None


def test_a_limit_is_tightened_while_the_accepting_session_does_not_find_the_budget_kept():
    asked, bounds = [], {0.5: 0.503, 0.49: 0.501, 0.48: 0.495}

    def choose(limit):
        asked.append(limit)
        return max(key for key in bounds if key <= limit)

    assert accepted(choose, bounds.__getitem__, 0.5, 0.5) == 0.48
    assert asked == [0.5 * STEP_BACK**attempt for attempt in range(3)]
    assert accepted(choose, lambda _: 0.6, 0.55, 0.5) == 0.5 and len(asked) == 3 + 1 + RETRIES  # the last one stands
    assert accepted(lambda _: None, bounds.__getitem__, 0.5, 0.5) is None
    assert accepted(choose, lambda _: math.nan, 0.5, 0.5) == 0.5  # a disturbed session says nothing


# --- cells and their store -----------------------------------------------------------------------------------------


def test_the_core_comes_first_and_dense_networks_before_their_contestants():
    every = [unit.name for unit in cells.units()]
    core = [unit.name for unit in cells.units(core_only=True)]
    assert every[: len(core)] == core and len(set(every)) == len(every)
    assert core[:2] == ["resnet20_gtsrb/dense", "resnet20_gtsrb/0.5x/ours"]
    assert len([name for name in core if name.startswith("mobilenetv2_gtsrb/0.35x/")]) == 8
    peers = {"torch-pruning-taylor-8", "torch-pruning-bn-scale-1-freed", "fastnas-8"}
    assert {f"resnet20_gtsrb/0.5x/{name}" for name in peers} < set(core)
    for net in cells.NETS:
        assert next(name for name in every if name.startswith(net)) == f"{net}/dense"
    assert len(every) == sum(1 + len(cells.BUDGETS) * len(cells.contestants(net)) for net in cells.NETS)


def test_every_solver_and_criterion_but_the_default_is_a_contestant_of_its_own():
    names = cells.contestants(NET)
    assert {"ours", "ours-solver-greedy", "ours-criterion-qsfm-ssim", "torch-pruning-group-norm-16"} <= set(names)
    assert not {"ours-solver-exact", "ours-criterion-obs"} & set(names)
    assert ours.method("ours-criterion-qsfm-ssim") == ("--criterion", "qsfm-ssim")
    assert ours.method("ours") == ()


def test_patterns_name_units_or_what_they_begin_with():
    unit = Unit("resnet20_gtsrb", "0.5x", "scratch-depth")
    for pattern in ("resnet20_gtsrb", "resnet20_gtsrb/0.5x", "*/0.5x/scratch-*", "resnet20_gtsrb/0.5x/scratch-depth"):
        assert unit.matches([pattern]), pattern
    for pattern in ("resnet56*", "resnet20_gtsrb/0.35x", "*/0.5x/ours", "resnet"):
        assert not unit.matches([pattern]), pattern
    assert unit.matches([])


def test_a_store_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path):
    unit, store = Unit("net", "0.5x", "ours"), Store.load(tmp_path / "results.jsonl")
    assert store.lacks(unit) == ["distilled", "plain"]
    store.add(cell(unit, "distilled", 0.97))
    with store.path.open("a") as file:
        file.write('{"cell": "net/0.5x/ours/pl')
    again = Store.load(store.path)
    assert again.lacks(unit) == ["plain"]
    again.add(cell(unit, "plain", 0.96))
    assert Store.load(store.path).lacks(unit) == []
    assert len(store.path.read_text().splitlines()) == 2


def test_what_failed_is_tried_again_only_when_asked(tmp_path):
    unit, store = Unit("net", "0.5x", "ours-solver-beam"), Store(tmp_path / "results.jsonl")
    store.add({"cell": "net/0.5x/ours-solver-beam/distilled", "group": "net/0.5x", "failed": "KeyError: 'x'"})
    assert store.lacks(unit) == [] and store.lacks(unit, again=True) == ["distilled"]
    store.add(cell(unit, "distilled", 0.9))
    assert store.lacks(unit, again=True) == []


def test_a_session_is_due_again_when_a_finalist_is_new_or_changed(tmp_path):
    unit, store = Unit("net", "0.5x", "ours"), Store(tmp_path / "results.jsonl")
    assert not store.unmeasured("net/0.5x")
    store.add(cell(unit, "distilled", 0.97))
    assert store.unmeasured("net/0.5x")
    store.add(final("net/0.5x", {"ours": (0.49, 0.48, 0.495)}))
    assert not store.unmeasured("net/0.5x")
    assert store.measured("net/0.5x") == {"ours": [0.49, 0.48, 0.495]}
    store.add(cell(unit, "distilled", 0.97) | {"sha256": "another"})
    assert store.unmeasured("net/0.5x") and not store.measured("net/0.5x")


def test_a_try_out_is_kept_apart_from_the_results(monkeypatch):
    monkeypatch.setenv("EDGE_TRAINED", "elsewhere")
    monkeypatch.setenv("EDGE_DATA_LIMIT", "")
    base, results = running.place(frontier.CONTEST, quick=True)
    assert results != frontier.RESULTS and frontier.RESULTS.parent not in results.parents
    assert base.name == "quick" and frontier.WORK in base.parents


def test_both_paces_give_profile_and_command_line_the_same_keys():
    assert "recover.max_minutes=600" in FULL.flags
    assert QUICK.flags.count("--set") == sum(len(table) for table in QUICK.overrides.values())


@pytest.fixture
def bare(monkeypatch):
    """Units without a network: only what becomes of their results."""
    monkeypatch.setenv("EDGE_TRAINED", "nowhere")
    monkeypatch.setattr(contest, "Arena", lambda *_: None)
    monkeypatch.setattr(contest.dense, "ensure", lambda *_: {})
    return monkeypatch


def test_a_contestant_that_breaks_keeps_what_it_had_finished(bare, tmp_path, capsys):
    unit, store = Unit("net", "0.5x", "ours"), Store(tmp_path / "results.jsonl")

    def work(_arena, _unit, _todo, keep, _enter):
        keep("distilled", {"accuracy": 0.97})
        raise KeyError("layer1")

    bare.setattr(contest, "work", work)
    contest.contest(unit, store, QUICK, tmp_path, contest.enter, again=False)
    found = Store.load(store.path).cells
    assert found["net/0.5x/ours/distilled"]["accuracy"] == 0.97
    assert found["net/0.5x/ours/plain"]["failed"] == "KeyError: 'layer1'"
    assert found["net/0.5x/ours/plain"]["machine"]["cores"] > 0
    assert "KeyError" in capsys.readouterr().err


def test_a_budget_that_is_never_met_is_a_result_of_every_recovery(bare, tmp_path):
    unit, store = Unit("net", "0.25x", "torch-pruning-taylor-8"), Store(tmp_path / "results.jsonl")

    def work(*_):
        raise NeverMet("0.25x is never kept", {"search": 12.345}, 4)

    bare.setattr(contest, "work", work)
    contest.contest(unit, store, QUICK, tmp_path, contest.enter, again=False)
    assert store.lacks(unit) == [] and not store.finalists(unit.group)
    assert {(row["missed"], row["seconds"]["search"], row["sittings"]) for row in store.cells.values()} == {
        ("0.25x is never kept", 12.3, 4)
    }


# --- verdicts ------------------------------------------------------------------------------------------------------


def cell(unit, recovery, accuracy, **more):
    return {
        "cell": f"{unit.name}/{recovery}", "recovery": recovery, "net": unit.net, "budget": unit.budget,
        "contestant": unit.contestant, "group": unit.group, "accuracy": accuracy, "images": 1000, "sittings": 3,
        "before": {"none": 0.1, "bn": 0.7}, "searched": 0.49, "seconds": {"search": 60.0, "recover": 30.0},
        "onnx": "model.onnx", "sha256": f"{unit.contestant}", "design": 1.0, **more,
    }  # fmt: skip


def dense_of(net, accuracy=0.98):
    unit = Unit(net, "", cells.DENSE)
    machine = {"machine": {"cpu": "a processor", "cores": 2}, "versions": {"torch": "2.13.0"}, "validate": 0.99}
    return cell(unit, cells.DENSE, accuracy) | machine


def final(group, ratios):
    return {"final": group, "ratios": {k: list(v) for k, v in ratios.items()}, "sha256": {k: k for k in ratios}}


NET = "resnet20_gtsrb"


def filled(path, ours_at, peers, ratios):
    store = Store(path)
    store.add(dense_of(NET))
    for name, accuracy in {"ours": ours_at, **peers}.items():
        for recovery in ("distilled", "plain"):
            store.add(cell(Unit(NET, "0.5x", name), recovery, accuracy))
    store.add(final(f"{NET}/0.5x", ratios))
    return store


@pytest.mark.parametrize(
    ("peers", "allowed"),
    [
        ({"a": 0.01, "b": 0.02}, 0.005),
        ({"a": 0.0005}, 0.001),  # a tenth of a point is always allowed
        ({"a": -0.004}, 0.001),  # a peer that gains
        ({}, math.inf),
    ],
)
def test_ours_may_lose_half_of_the_best_peers_loss_or_a_tenth_of_a_point(peers, allowed):
    assert table.allowance(peers)[2] == pytest.approx(allowed)


@pytest.mark.parametrize(
    ("loss", "kept", "noise", "missing", "verdict"),
    [
        (0.004, True, 0.0005, (), "meets"),
        (0.006, True, 0.0005, (), "does NOT meet"),
        (0.004, True, 0.002, (), "undecided"),  # within the noise
        (0.004, True, 0.0005, ("a",), "undecided"),
        (0.004, None, 0.0005, (), "undecided"),  # not in the common session
        (0.004, False, 0.0005, ("a",), "does NOT meet"),  # whatever the peers do
    ],
)
def test_a_verdict_needs_a_budget_kept_all_peers_and_a_difference_beyond_the_noise(loss, kept, noise, missing, verdict):
    found = table.Judged(NET, "0.5x", "plain", loss, 0.005, "b", 0.01, 0.02, kept, noise, missing, ("c",))
    assert found.verdict == verdict and verdict in str(found)
    assert all(name in str(found) for name in missing) and "not asked in the core: c" in str(found)


def test_without_every_peer_nothing_is_decided_and_the_missing_are_named(tmp_path):
    ratios = dict.fromkeys(("ours", "scratch-width"), (0.49, 0.48, 0.495))
    store = filled(tmp_path / "r.jsonl", 0.98, {"scratch-width": 0.5, "fastnas-8": 0.5}, ratios)
    for core in (True, False):
        found = next(each for each in table.judged(store, core) if each.stage == "distilled")
        assert found.verdict == "undecided" and "scratch-width" not in found.missing
        assert {"fastnas-8", "torch-pruning-taylor-8-freed"} < set(found.missing)  # one of them never measured
        assert ("torch-pruning-taylor-16" in found.missing) != core
        assert ("torch-pruning-taylor-16" in found.left_out) == core


def test_with_every_peer_the_difference_decides_and_truncated_ones_are_no_rivals(tmp_path):
    peers = dict.fromkeys(cells.asked(NET, "0.5x", True), 0.7)
    ratios = dict.fromkeys(("ours", *peers), (0.49, 0.48, 0.495))
    store = filled(tmp_path / "r.jsonl", 0.97, {**peers, "scratch-depth": 0.979}, ratios)
    found = {each.stage: each for each in table.judged(store, core=True)}
    assert found["plain"].best == "scratch-depth" and found["plain"].verdict == "undecided"
    for recovery in ("distilled", "plain"):
        row = cell(Unit(NET, "0.5x", "scratch-depth"), recovery, 0.979, facts={"truncated": [10, 203]})
        store.add(row)
    found = {each.stage: each for each in table.judged(store, core=True)}
    assert not found["plain"].missing and found["plain"].best != "scratch-depth"
    assert found["plain"].verdict == "meets" and found["plain"].best_unused == pytest.approx(0.02)
    assert "2.0 % unused" in str(found["plain"])
    assert table.table(store, core=True).count("TRUNCATED: 10 of 203 epochs") == 2
    store.add(cell(Unit(NET, "0.5x", "fastnas-8"), "plain", 0.9) | {"failed": "KeyError"})
    assert "fastnas-8" in next(e for e in table.judged(store, core=True) if e.stage == "plain").missing


def test_noise_is_that_of_the_images_that_differ_times_the_design_effect():
    rows = {name: {"net": NET, "images": 100, "wrong": wrong, "accuracy": 1 - len(wrong) / 100, "design": 1.0}
            for name, wrong in {"one": [0, 1, 2, 3], "two": [0, 1, 2, 3], "other": [4, 5, 6, 7]}.items()}  # fmt: skip
    assert noise.half([(1.0, rows["one"]), (-1.0, rows["two"])]) == 0
    plain = noise.half([(1.0, rows["one"]), (-1.0, rows["other"])])
    assert plain == pytest.approx(1.96 * math.sqrt(0.08 / 100), rel=0.01)
    rows["other"]["design"] = 4.0
    assert noise.half([(1.0, rows["one"]), (-1.0, rows["other"])]) == pytest.approx(2 * plain)
    assert noise.design({"net": NET}) == 30 and noise.design({"net": "resnet56_cifar10_jpeg"}) == 1


def test_the_design_effect_is_the_length_of_tracks_that_are_right_or_wrong_as_a_whole():
    tracks = np.repeat(np.arange(100), 30)
    assert noise.effect(np.repeat(np.arange(100) % 10 > 0, 30), tracks) == pytest.approx(30)
    assert noise.effect(np.random.default_rng(0).random(3000) > 0.1, tracks) < 1.6
    low, high = noise.wilson(0.97, 1000, 1.0)
    assert (low, high) == (pytest.approx(0.9575, abs=1e-4), pytest.approx(0.9789, abs=1e-4))
    assert noise.wilson(0.97, 1000, 30)[0] < low


def test_a_peer_that_misses_its_budget_in_the_common_session_is_no_rival(tmp_path):
    peers = {"scratch-depth": 0.979, "torch-pruning-taylor-1": 0.95}
    ratios = {"ours": (0.49, 0.485, 0.495), "scratch-depth": (0.51, 0.505, 0.515)}
    ratios["torch-pruning-taylor-1"] = (0.47, 0.46, 0.48)
    store = filled(tmp_path / "r.jsonl", 0.966, peers, ratios)
    (found,) = [each for each in table.judged(store) if each.stage == "distilled"]
    assert found.best == "torch-pruning-taylor-1"
    assert found.loss == pytest.approx(0.014) and found.allowed == pytest.approx(0.015)
    assert "0.50 of" not in str(found)
    assert table.table(store).count("BUDGET NOT KEPT") == 2  # both of its recoveries


def test_other_methods_of_ours_are_no_peers(tmp_path):
    ratios = dict.fromkeys(("ours", "ours-solver-greedy", "scratch-width"), (0.49, 0.48, 0.495))
    store = filled(tmp_path / "r.jsonl", 0.97, {"ours-solver-greedy": 0.98, "scratch-width": 0.95}, ratios)
    assert {each.best for each in table.judged(store)} <= {"scratch-width", None}


def test_the_stage_before_the_recovery_is_judged_on_the_validation_split(tmp_path):
    ratios = dict.fromkeys(("ours", "torch-pruning-taylor-1", "scratch-width"), (0.49, 0.48, 0.495))
    store = filled(tmp_path / "r.jsonl", 0.97, {"torch-pruning-taylor-1": 0.95}, ratios)
    for recovery in ("distilled", "plain"):  # trained from nothing: there is nothing before
        store.add(cell(Unit(NET, "0.5x", "scratch-width"), recovery, 0.97, before={}))
        store.add(cell(Unit(NET, "0.5x", "ours"), recovery, 0.97, before={"none": 0.2, "least-squares": 0.9}))
    (found,) = [each for each in table.judged(store) if each.stage.startswith("before")]
    assert (found.best, found.loss, found.best_loss) == (
        "torch-pruning-taylor-1", pytest.approx(0.09), pytest.approx(0.29)
    )  # fmt: skip


def test_the_table_tells_intervals_unused_budget_seconds_and_who_has_no_network(tmp_path):
    store = filled(tmp_path / "r.jsonl", 0.97, {"scratch-width": 0.96}, {"ours": (0.49, 0.485, 0.495)})
    store.add({
        "cell": f"{NET}/0.5x/torch-pruning-magnitude-8/plain", "group": f"{NET}/0.5x", "net": NET, "budget": "0.5x",
        "contestant": "torch-pruning-magnitude-8", "missed": "0.5x is never kept: the fastest is 0.640x at 0.735",
        "seconds": {"search": 41.0},
    })  # fmt: skip
    text = table.table(store)
    (own,) = [line for line in text.splitlines() if line.split()[:1] == ["ours"]][:1]
    assert "97.00 [95.75, 97.89]" in own and "0.4900 [0.4850, 0.4950]" in own and "2.0%" in own and "60" in own
    assert "70.00 (bn)" in own
    assert "(own search)" in next(line for line in text.splitlines() if "scratch-width" in line)
    assert "never kept: the fastest is 0.640x at 0.735 (41 s)" in text
    assert "a processor, 2 cores; torch 2.13.0" in text


@pytest.mark.parametrize(
    ("ratio", "rounds", "said"),
    [
        ((0.49, 0.485, 0.495), 4, "keeps the budget, 2.0 % unused (at most 3 %), 4 rounds (at most 4)"),
        ((0.47, 0.465, 0.475), 5, "keeps the budget, 6.0 % unused (NOT at most 3 %), 5 rounds (NOT at most 4)"),
        ((0.498, 0.49, 0.502), 1, "does NOT keep the budget, 0.4 % unused (at most 3 %), 1 rounds (at most 4)"),
    ],
)
def test_what_is_asked_of_our_default_is_said_in_a_line(tmp_path, ratio, rounds, said):
    store = filled(tmp_path / "r.jsonl", 0.97, {}, {"ours": ratio})
    store.add(cell(Unit(NET, "0.5x", "ours"), "distilled", 0.97, facts={"search rounds": rounds}))
    assert f"{NET} at 0.5x: ours {said}" in table.table(store)


def test_the_record_is_plain_json_and_the_picture_is_drawn(tmp_path):
    store = filled(tmp_path / "r.jsonl", 0.97, {"scratch-width": 0.96}, {"ours": (0.49, 0.485, 0.495)})
    told = json.loads(json.dumps(table.record(store), allow_nan=False))
    assert {(c["contestant"], c["kept"]) for c in told["cells"]} == {("ours", True), ("scratch-width", True)}
    assert next(c for c in told["cells"] if not c["final"])["bounds"] == [None, None]
    draw(store, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert family("ours")[0] != family("ours-solver-greedy")[0] != family("scratch-width")[0]


def test_without_results_there_is_a_table_and_no_picture(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    draw(store, tmp_path / "frontier.png")
    assert table.table(store) == "no results yet" and not (tmp_path / "frontier.png").exists()


# --- contestants ---------------------------------------------------------------------------------------------------


class MadeUpArena:
    """Measures a network by its parameters; keeps what it was asked to measure."""

    noise = 0.0

    def __init__(self):
        self.sat, self.models = [], {}

    def captured(self, model):
        return model

    def written(self, model, out):
        self.models[out] = sum(p.numel() for p in model.parameters())
        return out

    def sit(self, files):
        self.sat.append(sorted(files))
        return Sitting({n: Timed(self.models[path] / 100, 0.0, 1.0) for n, path in files.items()}, False, "")

    def accept(self, file, budget):
        ratio = self.models[file] / 100
        return Timed(ratio, ratio - self.noise, ratio + self.noise), False, 1

    def limit(self, budget):
        return budget


def layer_without(share):
    return None if share > 0.9 else nn.Linear(10, 10 - int(10 * share), bias=False)


def test_networks_of_equal_shapes_are_measured_once_and_those_that_fail_are_infinitely_slow(tmp_path):
    arena = MadeUpArena()
    trials = Trials(arena, tmp_path, layer_without)
    assert trials.measured([0.2, 0.21, 0.5, 0.95]) == [0.8, 0.8, 0.5, math.inf]
    assert trials.measured([0.25, 0.95]) == [0.8, math.inf]
    assert arena.sat == [["0.2", "0.5"]] and trials.sittings == 1
    assert trials.measured([0.2], fresh=True) == [0.8] and trials.sittings == 2


def test_a_search_that_never_meets_its_budget_says_how_near_it_came(tmp_path):
    arena = MadeUpArena()
    arena.pace = SimpleNamespace(steps=Steps(scan=(0.3, 0.6, 0.95), points=2, sessions=1))
    with pytest.raises(NeverMet, match=r"0.05x is never kept: the fastest is 0.\d00x at .* gave no network that runs"):
        Trials(arena, tmp_path, layer_without).least(0.05, {}, 0.0)


def test_a_search_goes_on_below_where_the_accepting_session_does_not_find_its_network_good(tmp_path):
    arena = MadeUpArena()
    arena.pace = SimpleNamespace(steps=Steps(scan=(0.3, 0.6, 0.9), points=2, sessions=1))
    assert Trials(arena, tmp_path, layer_without).least(0.7, {}, 0.0) == 0.3
    arena.noise = 0.05
    trials = Trials(arena, tmp_path, layer_without)
    searched = len(arena.sat)
    assert trials.least(0.7, {}, 0.0) > 0.3
    assert trials.accepted[0][0] == 0.7 and trials.accepted[-1][2] <= 0.7 and len(trials.accepted) == 2
    assert trials.sittings == len(arena.sat) - searched + 2 and trials.contaminated == 0


def test_disturbed_sessions_of_a_search_are_counted(tmp_path):
    arena = MadeUpArena()
    trials = Trials(arena, tmp_path, layer_without)
    arena.sit = lambda files: Sitting(MadeUpArena.sit(arena, files).times, True, "")
    trials.measured([0.2, 0.5])
    assert (trials.sittings, trials.contaminated) == (1, 1)


def test_sessions_of_a_build_are_those_of_its_journal(tmp_path, monkeypatch):
    names = ["session round 1", "loss", "session round 2", "session accept"]
    lines = [json.dumps({"name": name, "key": "k", "value": name}) for name in names]
    (tmp_path / "journal").write_text("\n".join(lines) + "\n")
    made = SimpleNamespace(from_json=lambda text: SimpleNamespace(contaminated=text.endswith("2")))
    monkeypatch.setattr(ours, "Session", made)
    assert ours.measured(tmp_path / "journal") == [False, True, False]
    assert "accept" not in ours.AFTER


def test_a_disturbed_common_session_is_refused(tmp_path, monkeypatch):
    store = filled(tmp_path / "r.jsonl", 0.97, {"scratch-width": 0.96}, {"ours": (0.49, 0.485, 0.495)})
    (tmp_path / "model.onnx").write_text("")
    device = SimpleNamespace(fingerprint=lambda: SimpleNamespace(to_table=dict))
    monkeypatch.setattr(finals.builds, "ROOT", tmp_path)
    monkeypatch.setattr(finals, "load_target", lambda *_: device)
    monkeypatch.setattr(finals, "MOST_ARMS", 1)
    monkeypatch.setattr(
        finals, "sit", lambda target, dense, files, *_: Sitting(
            dict.fromkeys(files, Timed(0.4, 0.3, 0.5)), "scratch-width" in files, ""
        )
    )  # fmt: skip
    row = finals.measure(f"{NET}/0.5x", store, {}, tmp_path)
    assert (row["sessions"], row["refused"], set(row["ratios"])) == (1, 1, {"ours"})
    store.add(row)
    assert store.unmeasured(f"{NET}/0.5x")
    monkeypatch.setattr(finals, "MOST_ARMS", 9)
    assert finals.measure(f"{NET}/0.5x", store, {}, tmp_path) is None
    store.add({**row, "contaminated": True, "ratios": {}})  # as it was written down once
    assert store.measured(f"{NET}/0.5x") == {"ours": [0.4, 0.3, 0.5]}


def test_shallower_networks_lose_blocks_of_the_longest_stage_down_to_one_each():
    assert list(scratch.shallower((3, 3, 3))) == [(2, 3, 3), (2, 2, 3), (2, 2, 2), (1, 2, 2), (1, 1, 2), (1, 1, 1)]
    assert {shape.width for shape in scratch.shapes("scratch-depth", (3, 3, 3))} == {1.0}
    assert {shape.blocks for shape in scratch.shapes("scratch-width", (3, 3, 3))} == {(3, 3, 3)}


def test_depths_next_to_the_budget_from_above_are_tried_narrower():
    tried = {scratch.Shape(1.0, (n, n, n)): ratio for n, ratio in ((1, 0.3), (2, 0.6), (3, 0.8), (4, 0.9))}
    found = scratch.narrowed(tried, 0.5)
    assert {shape.blocks for shape in found} == {(2, 2, 2), (3, 3, 3)} and max(shape.width for shape in found) < 1
    assert scratch.narrowed(tried, 1.0) == []


@pytest.mark.parametrize("build", [nets.resnet20, nets.resnet56, nets.mobilenetv2_signs, nets.inception_signs])
def test_narrower_and_shallower_members_of_a_family_run_and_are_smaller(build):
    def size(network):
        with torch.inference_mode():
            assert network.eval()(torch.randn(2, 3, 32, 32)).shape[0] == 2
        return sum(p.numel() for p in network.parameters())

    whole, least = size(build()), size(build(width=2 / 16))
    assert size(build(width=0.5)) < 0.5 * whole and least < 0.2 * whole
    stages = len(build.__defaults__[-1])
    assert size(build(blocks=(1,) * stages)) < whole


def test_a_stage_that_is_as_wide_as_the_one_before_still_halves_the_maps():
    network = nets.resnet20(width=0.25)  # widths 8, 8, 16
    assert network.layer2(network.layer1(torch.randn(1, 8, 32, 32))).shape == (1, 8, 16, 16)


def test_layers_on_padded_residual_streams_are_ignored_and_others_are_not():
    padded, plain = nets.resnet20(), nets.mobilenetv2_signs()
    kept = depgraph.ignored(padded, 43)
    assert padded.conv1 in kept and padded.layer2[0].conv2 in kept and padded.layer2[0].conv1 not in kept
    assert len(kept) == 2 + 9
    assert depgraph.ignored(plain, 43) == [plain.fc]


def made_up(model, example):
    """An arena of random samples."""
    targets = torch.arange(8) % 4
    samples = SimpleNamespace(inputs=[(torch.randn(8, 3, 32, 32),)], targets=targets)
    project = SimpleNamespace(example=lambda: example, loss=nn.functional.cross_entropy)
    return SimpleNamespace(project=project, classes=10, model=model, samples=samples, net="resnet20_gtsrb")


def unequal(model):
    """As networks are at first, all scales are equal."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model.eval()


@pytest.fixture
def few_steps(monkeypatch):
    """A tenth of what is taken in earnest."""
    monkeypatch.setattr(depgraph, "STEPS", 40)


def convolved(model):
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("method", ["magnitude", "taylor", "group-norm", "bn-scale"])
def test_torch_pruning_cuts_inner_channels_to_multiples(method, few_steps):
    pytest.importorskip("torch_pruning", reason="pip install --no-deps torch-pruning==1.6.1")
    torch.manual_seed(0)
    example = (torch.randn(1, 3, 32, 32),)
    model = unequal(nets.resnet20(10))
    way = depgraph.Way(made_up(model, example), model, method, 8)
    pruned, dense = way(0.4), convolved(model)
    assert pruned is not None and pruned(*example).shape == (1, 10)
    widths = convolved(pruned)
    assert sum(widths) < sum(dense) and all(width % 8 == 0 for width in widths)
    assert model.layer1[0].conv1.out_channels == 16
    assert way(0.4) is pruned and convolved(way(0.2)) != widths  # what was passed is still there


def test_torch_pruning_rounded_to_eighths_goes_down_to_eight_channels(few_steps):
    pytest.importorskip("torch_pruning", reason="pip install --no-deps torch-pruning==1.6.1")
    torch.manual_seed(0)
    example = (torch.randn(1, 3, 32, 32),)
    model = unequal(nets.resnet20(10))
    found = depgraph.Way(made_up(model, example), model, "magnitude", 8)(0.98)
    assert {block.conv1.out_channels for m in (found.layer1, found.layer2, found.layer3) for block in m} == {8}


def test_a_shortcut_written_as_a_convolution_computes_the_same_and_is_not_trained():
    torch.manual_seed(0)
    model, x = unequal(nets.resnet20(10)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(shortcuts.freed(model)(x), model(x))
    captured = capture(shortcuts.freed(model), (x[:1],)).graph
    still = [name for name, p in captured.named_parameters() if not p.requires_grad]
    assert len(still) == 2 and all("select" in name for name in still)
    assert len(depgraph.ignored(shortcuts.freed(model), 10)) == 1
    assert not any(hasattr(m, "select") for m in model.modules())


@pytest.mark.parametrize("method", ["magnitude", "taylor", "group-norm"])
def test_torch_pruning_cuts_residual_streams_where_the_shortcut_is_a_convolution(method, few_steps):
    pytest.importorskip("torch_pruning", reason="pip install --no-deps torch-pruning==1.6.1")
    torch.manual_seed(0)
    example = (torch.randn(1, 3, 32, 32),)
    model = shortcuts.freed(unequal(nets.resnet20(10)))
    pruned = depgraph.Way(made_up(model, example), model, method, 1)(0.4)
    assert pruned(*example).shape == (1, 10) and pruned.layer3[0].conv2.out_channels < 64
    for block in (pruned.layer2[0], pruned.layer3[0]):
        assert set(block.select.weight.unique().tolist()) <= {0.0, 1.0} and not block.select.weight.requires_grad


def test_sparse_training_takes_away_as_much_as_the_librarys_scripts():
    for net, method in ((NET, "group-norm"), (NET, "bn-scale"), ("mobilenetv2_gtsrb", "group-norm")):
        script = depgraph.settings(net, method)
        assert depgraph.strength(script, 1100) * sum(depgraph.rates(1100)) == pytest.approx(script.reg * script.rates)
    cifar = depgraph.settings(NET, "group-norm")
    assert depgraph.strength(cifar, 1100) / cifar.reg == pytest.approx(39_000 / 1100, rel=0.01)
    assert depgraph.settings("mobilenetv2_gtsrb", "group-norm").most == 0.7
    assert depgraph.settings("mobilenetv2_gtsrb", "bn-scale").reg == 1e-5
