"""The switches of benchmarks/ablations: whole builds without one part of the pipeline, on the simulated device."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_project import replace, request, write_project

from benchmarks import builds, gpp
from benchmarks.ablations import arms, table
from benchmarks.ablations.switches import SWITCHES, scored, separable, switched
from benchmarks.frontier import arena, dense
from benchmarks.frontier.arena import QUICK
from benchmarks.frontier.cells import DENSE, Store
from benchmarks.frontier.contest import contest
from benchmarks.frontier.finals import measure as measure_together
from pipeline import flow, losses, search
from pipeline.flow import build
from pipeline.journal import Journal
from pipeline.latency.operations import Operations
from pipeline.latency.tabulate import tabulate
from pipeline.nouns import Block, ChannelGroup, Dim, LatencyTable, Ranking, Site, SiteCost, Topology
from pipeline.project import usercode
from pipeline.prune.sensitivity import around, measure
from pipeline.search import Search
from profiles.schema import PrepareSpec


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Switch ("" for none) -> how a build with it ended, and its journal; each is built once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    @cache
    def ended(name):
        root = tmp_path_factory.mktemp(name or "whole")
        asked = request(
            write_project(root / "tiny"), root, overrides={"recover": {"epochs": 0}, "prune": {"rounds": 2}}
        )
        with switched(name) if name else nullcontext():
            result = build(asked)
        if usercode._active is not None:
            usercode._active.leave()
        return result, Journal(Path(str(result.summary["run"])) / "journal")

    yield ended
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_build_without_a_part_ends_with_a_measured_network_and_the_part_is_back(built, name):
    result, _ = built(name)
    assert 0.2 < result.summary["latency_ratio"] < 0.8
    assert result.summary["rejected"] or result.summary["bundle"]
    assert (flow.tabulate, flow.Search, losses.measure, search.around) == (tabulate, Search, measure, around)
    assert flow.ATTEMPTS > 1


def test_without_measuring_a_plan_is_believed_to_be_what_the_table_says(built):
    (whole, journal), (believed, silent) = built(""), built("unmeasured")
    assert journal.entries("session round 1") and not silent.entries("session round 1")
    assert any(each.measured_ms != pytest.approx(each.predicted_ms, rel=1e-6) for each in whole.report.rounds)
    for each in believed.report.rounds:
        assert each.measured_ms == pytest.approx(each.predicted_ms)


def test_values_that_are_added_up_take_fewer_losses_than_those_around_the_plan(built):
    losses = {name: len(built(name)[1].entries("loss")) for name in ("", "single", "scores")}
    assert losses["single"] < losses[""] / 2 and losses["scores"] < losses[""] / 2


def test_a_counted_table_predicts_shares_of_the_multiply_accumulates(tmp_path, monkeypatch):
    seen = []
    with switched("flops"):
        changed = flow.tabulate

        def recorded(target, builder, topology, *args, **more):
            seen.append((changed(target, builder, topology, *args, **more), topology))
            return seen[-1][0]

        monkeypatch.setattr(flow, "tabulate", recorded)
        build(request(write_project(tmp_path / "tiny"), tmp_path, dry_run=True))
    usercode._active.leave()
    ((changed_table, topology),) = seen
    counted, rng = Operations(topology), np.random.default_rng(0)
    for _ in range(20):
        widths = {id: int(rng.choice(options)) for id, options in changed_table.choices.items()}
        dropped = [block.id for block in topology.removable if rng.random() < 0.3]
        share = changed_table.predict(widths, dropped).ms / changed_table.dense_ms
        assert share == pytest.approx(counted.macs(widths, dropped) / counted.macs(), rel=1e-6)


@pytest.mark.slow
def test_cells_are_worked_to_one_latency_and_measured_in_one_session(tmp_path, monkeypatch):
    """The whole way of a cell: builds, recovery, judge, common session, table."""
    there = write_project(tmp_path / "benchmarks" / "projects" / "tiny")
    replace(there / "deploy.toml", "tiny.safetensors", "../tiny/tiny.safetensors")
    for module, name, value in (
        (builds, "ROOT", tmp_path), (dense, "ROOT", tmp_path), (builds, "TARGET", "simulated"),
        (arena, "TARGET", "simulated"), (arms, "NET", "tiny"), (table, "NET", "tiny"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("EDGE_TRAINED", str(tmp_path))
    store, base = Store.load(tmp_path / "ablations.jsonl"), tmp_path / "runs"
    wanted = (DENSE, "ours@0", "no-feedback@0", "same-plan-bn@0")
    for cell in (cell for cell in arms.cells(core_only=True) if cell.contestant in wanted):
        contest(cell, store, arms.seeded(QUICK, cell), base, arms.enter, again=False)
        if usercode._active is not None:
            usercode._active.leave()
        assert "failed" not in store.cells[cell.cells[0]], store.cells[cell.cells[0]]
    store.add(measure_together("tiny/0.5x", store, QUICK.overrides, base))
    found = {each.arm: each for each in table.results(store)}
    assert set(found) == {"ours", "no-feedback", "same-plan-bn"}
    for each in found.values():
        assert each.final and 0.2 < each.ratios[0] < 0.51 and each.builds <= arms.TRIES
        assert 0.1 < each.repaired[0] <= 1 and each.recovered[0] > 0.3
    ours, other = (store.cells[f"tiny/0.5x/{name}@0/distilled"] for name in ("ours", "same-plan-bn"))
    assert (ours["parameters"], ours["macs"]) == (other["parameters"], other["macs"])
    assert found["same-plan-bn"].ratios[0] == pytest.approx(found["ours"].ratios[0], abs=0.01)
    left = {path.name for path in (base / "tiny" / "0.5x" / "ours@0").iterdir()}
    assert left >= {"plan.json", "pruned.safetensors", "distilled.onnx"} and "build" not in left
    assert "least squares on that plan instead of batch-norm statistics: worth" in table.table(store)


# --- made-up tables ------------------------------------------------------------------------------------------------

A, B = ChannelGroup("a", "a", tuple(range(4)), ()), ChannelGroup("b", "b", tuple(range(4)), (), block="branch")
PAIR = Topology((A, B), (Block("branch", "add", 0, (), ()),), {}, ())


def test_a_separable_table_adds_what_each_width_saves_alone():
    dims = (Dim((("a", 1),)), Dim((("b", 1),)))
    keys = list(itertools.product((1, 2, 4), (1, 2, 4)))
    cost = SiteCost(
        Site("s", "test", dims, ("n",), "branch"), {k: 1.0 + k[0] * k[1] for k in keys}, {k: k[0] for k in keys}
    )
    found = separable(LatencyTable((cost,), {"a": (1, 2, 4), "b": (1, 2, 4)}, 1, 17.0), None, PAIR)
    assert found.sites[0].ms[4, 4] == 17 and found.sites[0].ms[2, 4] == 9
    assert found.sites[0].ms[2, 2] == 1 and found.sites[0].ms[1, 1] == 0  # 5 and 2 in truth
    assert found.sites[0].dropped_ms == cost.dropped_ms


def test_scores_are_summed_over_the_units_that_go_and_those_of_a_block():
    rankings = {"a": Ranking("a", (0, 1, 2, 3), (1, 2, 3, 4)), "b": Ranking("b", (3, 2, 1, 0), (10, 20, 30, 40))}

    class Probe:
        class network:
            topology = PAIR

    found = scored(Probe, rankings, {"a": (1, 2, 4), "b": (2, 4)}, widths=3, progress=None)
    assert found.groups == {"a": {1: 6, 2: 3, 4: 0}, "b": {2: 30, 4: 0}} and found.blocks == {"branch": 100}


def test_every_arm_of_grow_push_prune_is_trained_as_long_and_in_the_same_way():
    for arm in gpp.ARMS:
        flags = arm.flags(5, 0)
        found = dict(pair.split("=", 1) for flag, pair in itertools.pairwise(flags) if flag == "--set")
        assert int(found["prepare.epochs"]) + int(found["recover.epochs"]) == 7
        for name in ("learning_rate", "alpha"):
            assert found[f"prepare.{name}"] == found[f"recover.{name}"] == str(getattr(PrepareSpec(), name))
