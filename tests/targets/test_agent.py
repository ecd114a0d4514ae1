"""The agent: what it needs, how it plans blocks, what it flags, how it answers."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import simulated_nights as nights

from profiles.schema import CheckSpec, MeasureSpec
from targets.harness import bench, pack
from targets.harness.agent.board import driver, layers, machine, placing, plan, server, timing
from targets.harness.agent.board import model as model_part
from targets.harness.agent.board.base import AgentError
from targets.harness.agent.board.files import sha256, write_result
from targets.harness.agent.board.flags import flag, usual_clocks
from targets.harness.agent.board.model import SPIN_NS, Model, aligned
from targets.harness.compare import AGAIN, BASELINE, CANDIDATE, confirm, screen, stage
from targets.harness.device import Preflight

JOB = {
    "processes": 3,
    "rounds": 30,
    "dropped": 4,
    "timed": 10,
    "block_min_ns": 5_000_000,
    "max_seconds": 300.0,
}


def run_agent(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(pack.FOLDER), *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )


def test_the_agent_is_python_3_6_that_imports_the_standard_library_and_a_runtime_when_it_is_used():
    everywhere = set()
    for path in sorted(pack.FOLDER.glob("board/**/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 6))
        at_start = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
        froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        at_start |= {str(node.module) for node in froms if not node.level}
        assert at_start <= sys.stdlib_module_names, path
        nodes = list(ast.walk(tree))
        everywhere |= {a.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for a in node.names}
        newer = {"removeprefix", "removesuffix"}
        assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & newer, path
    assert everywhere - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_the_zip_says_what_the_folder_says_and_has_the_same_bytes_every_time(tmp_path):
    file = tmp_path / pack.NAME
    file.write_bytes(pack.packed())
    done = subprocess.run([sys.executable, str(file), "facts"], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == json.loads(run_agent("facts").stdout)
    pack.packed.cache_clear()
    assert pack.packed() == file.read_bytes() and pack.digest() == sha256(str(file))


def test_the_agent_starts_without_the_runtime():
    code = "import sys; import board.commands; print('numpy' in sys.modules, 'onnxruntime' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=pack.FOLDER)
    assert out.stdout == "False False\n"


def test_an_unknown_verb_prints_what_there_is_and_ends_with_2():
    done = run_agent("dance")
    assert done.returncode == 2
    assert "agent drive JOB.json OUT.json" in done.stderr


def test_facts_and_state_are_lines_of_json(tmp_path):
    facts = json.loads(run_agent("facts").stdout)
    assert facts == machine.facts("onnxruntime")
    state = json.loads(run_agent("state", str(tmp_path)).stdout)
    assert state["folder"] == str(tmp_path) and state["runnable"] >= 0


def test_a_block_holds_at_least_the_least_work_of_a_block():
    rounds, dropped, timed = plan.plan_blocks(JOB, {"fast": 20_000, "slow": 900_000}, 1.0)
    assert (rounds, dropped) == (30, 4)
    assert timed == {"fast": 250, "slow": 10}


@pytest.mark.parametrize("ns", [20_000, 800_000, 5_000_000])
def test_an_absolute_record_times_each_network_for_ten_seconds_and_a_decision_for_less(ns):
    def timed_s(spec: MeasureSpec) -> float:
        rounds, _, timed = plan.plan_blocks(bench.drive_job({}, {}, spec, "accept", ()), {"net": ns, "other": ns}, 1.0)
        return spec.accept_processes * rounds * timed["net"] * ns * 1e-9

    spec = MeasureSpec()
    assert 10.0 <= timed_s(spec.lasting()) <= 40.0 and timed_s(spec) <= timed_s(spec.lasting())
    assert timed_s(spec) < 10.0 or ns > 800_000
    assert MeasureSpec(least_s=0).lasting() == MeasureSpec(least_s=0)
    assert MeasureSpec(block_min_ms=50).lasting().block_min_ms == 50


def test_blocks_shrink_before_rounds_where_the_cap_is_near():
    rounds, dropped, timed = plan.plan_blocks({**JOB, "max_seconds": 60.0}, {"big": 50_000_000}, 1.0)
    assert (rounds, dropped) == (30, 4)
    assert timed == {"big": 8}
    assert 3 * (1.0 + rounds * (dropped + timed["big"]) * 0.05) <= 60.0


@pytest.mark.parametrize("ms", [1, 10, 100, 1000, 5000])
@pytest.mark.parametrize("networks", [1, 5])
def test_no_plan_takes_longer_than_the_cap(ms, networks):
    medians = {str(i): ms * 1_000_000 for i in range(networks)}
    try:
        rounds, dropped, timed = plan.plan_blocks(JOB, medians, 2.0)
    except AgentError as error:
        assert error.kind == "long" and ms == 5000 and networks == 5
        return
    assert rounds >= 3 and min(timed.values()) >= 1
    assert 3 * (2.0 + rounds * sum(dropped + n for n in timed.values()) * ms * 1e-3) <= 300.0 + 1e-6


@pytest.mark.parametrize("networks", [1, 3])
def test_a_paced_session_is_planned_in_whole_periods(networks):
    job = {**JOB, "period_ns": 33_000_000}
    medians = {str(i): 800_000 for i in range(networks)}
    rounds, dropped, timed = plan.plan_blocks(job, medians, 1.0)
    assert (rounds, dropped, set(timed.values())) == (30, 4, {10})
    assert 3 * (1.0 + rounds * sum(dropped + n + 1 for n in timed.values()) * 0.033) <= 300.0


def test_a_network_slower_than_the_period_takes_the_next_whole_one():
    job = {**JOB, "period_ns": 33_000_000, "max_seconds": 60.0}
    rounds, dropped, timed = plan.plan_blocks(job, {"slow": 34_000_000}, 1.0)
    taken = 3 * (1.0 + rounds * ((dropped + timed["slow"]) * 0.066 + 0.033))
    assert rounds == 30 and 50.0 < taken <= 60.0
    assert timed["slow"] < plan.plan_blocks(job, {"quick": 32_000_000}, 1.0)[2]["quick"]


@pytest.mark.parametrize("cap", [30.0, 60.0, 120.0, 300.0])
def test_no_paced_plan_takes_longer_than_the_cap(cap):
    job = {**JOB, "period_ns": 33_000_000, "max_seconds": cap}
    rounds, dropped, timed = plan.plan_blocks(job, {str(i): 40_000_000 for i in range(3)}, 1.0)
    assert 3 * (1.0 + rounds * sum((dropped + n) * 0.066 + 0.033 for n in timed.values())) <= cap
    assert rounds >= 3


def test_a_sustained_process_keeps_a_limited_number_of_samples_and_loads_the_device_all_the_same():
    job = {"sustained_s": 600.0}
    timed, untimed = plan.plan_sustained(job, {"fast": 20_000, "slow": 20_000_000}, {"fast": 250, "slow": 10})
    assert timed["fast"] + untimed["fast"] == 4096 and (timed["slow"], untimed["slow"]) == (10, 0)
    rounds = 600.0 / (4096 * 20e-6 + 10 * 20e-3)
    assert 0.9 * plan.SUSTAINED_SAMPLES < timed["fast"] * rounds <= plan.SUSTAINED_SAMPLES


def test_progress_weighs_the_sustained_process_by_its_time():
    plain, long = {**JOB, "processes": 4}, {**JOB, "processes": 4, "sustained_s": 600.0}
    assert [driver.share(plain, n, 0.5) for n in range(4)] == pytest.approx([0.125, 0.375, 0.625, 0.875])
    told = [driver.share(long, n, done) for n in range(4) for done in (0.0, 0.5, 1.0)]
    assert told == sorted(told) and (told[0], told[-1]) == (0.0, pytest.approx(1.0))
    assert driver.share(long, 0, 1.0) == pytest.approx(675 / 900)


def test_blocks_of_the_sustained_process_last_a_tenth_of_a_second():
    job = {"sustained_s": 60.0}
    assert plan.plan_sustained(job, {"net": 800_000}, {"net": 12}) == ({"net": 125}, {"net": 0})
    assert plan.plan_sustained({**job, "period_ns": 33_000_000}, {"net": 800_000}, {"net": 12})[0] == {"net": 12}


class Pretended:
    """A clock that moves when it is read, slept on or inferred by, so that pacing is tested to the microsecond.

    ms: how long each inference takes, in turn; oversleep_ms: how much longer than asked every sleep lasts. It stands
    where the session, the clock and the time module stand.
    """

    def __init__(self, ms, oversleep_ms=0.0):
        self.now, self.ms, self.oversleep_ms = 7_000_000, list(ms), oversleep_ms
        self.begun, self.slept = [], 0.0

    def clock(self):
        self.now += 1000
        return self.now

    def sleep(self, seconds):
        self.slept += seconds
        self.now += int(seconds * 1e9 + self.oversleep_ms * 1e6)

    def run_with_iobinding(self, binding):
        self.begun.append(self.now)
        self.now += int(self.ms.pop(0) * 1e6)


def paced(monkeypatch, ms, dropped=0, oversleep_ms=0.0):
    """Nanoseconds, misses, and the pretended clock after inferences of `ms` paced at 20 ms."""
    clock = Pretended(ms, oversleep_ms)
    monkeypatch.setattr(model_part, "CLOCK", clock.clock)
    monkeypatch.setattr(model_part, "time", clock)
    model = Model.__new__(Model)
    model.session, model.binding = clock, None
    ns, missed = model.paced(dropped, len(ms) - dropped, 20_000_000)
    return ns, missed, clock


def ticks(clock):
    """The tick at which each inference began; none begins before its tick or 0.1 ms after it."""
    late = [begun % 20_000_000 for begun in clock.begun]
    assert max(late) < 100_000
    return [begun // 20_000_000 for begun in clock.begun]


def test_one_inference_starts_at_each_tick_and_its_own_time_is_kept(monkeypatch):
    ns, missed, clock = paced(monkeypatch, [1.0, 3.0, 2.0, 19.0, 1.0], dropped=2)
    assert ticks(clock) == [1, 2, 3, 4, 5]
    assert ns == pytest.approx([2e6, 19e6, 1e6], abs=5000) and missed == 0


def test_the_wait_is_slept_and_only_its_last_moment_is_spun(monkeypatch):
    _, _, clock = paced(monkeypatch, [1.0] * 5)
    idle = 13e-3 + 4 * 19e-3
    assert idle - 5.1 * SPIN_NS * 1e-9 < clock.slept < idle - 4.9 * SPIN_NS * 1e-9


def test_an_inference_that_runs_over_its_tick_misses_and_the_ticks_it_ran_over_are_skipped(monkeypatch):
    _, missed, clock = paced(monkeypatch, [1.0, 50.0, 1.0, 21.0, 1.0])
    assert ticks(clock) == [1, 2, 5, 6, 8]
    assert missed == 2


def test_an_inference_that_starts_late_misses_its_deadline_though_it_is_fast(monkeypatch):
    ns, missed, _ = paced(monkeypatch, [1.0] * 3, oversleep_ms=19.5)
    assert missed == 3 and max(ns) < 1_010_000
    assert paced(monkeypatch, [1.0] * 3, oversleep_ms=18.0)[1] == 0


def test_dropped_inferences_count_no_miss(monkeypatch):
    assert paced(monkeypatch, [50.0, 1.0, 1.0], dropped=1)[1] == 0


def block(switches=0, throttle=0, khz=()):
    return {"switches": switches, "throttle": throttle, "khz": [list(khz), list(khz)]}


def flags(blocks):
    repeats = [{"blocks": {"net": blocks}}]
    flag(repeats, ["net"])
    return [b["flagged"] for b in blocks]


def test_a_block_with_more_than_five_switches_above_the_median_is_flagged():
    assert flags([block(1), block(1), block(1), block(6), block(7)]) == [False, False, False, False, True]


def test_long_blocks_with_many_switches_are_not_flagged_for_their_natural_scatter():
    assert flags([block(50), block(50), block(50), block(62), block(90)]) == [False, False, False, False, True]


def test_a_throttle_event_flags_its_block():
    assert flags([block(), block(throttle=1), block()]) == [False, True, False]


def test_a_locked_clock_that_leaves_its_rate_by_more_than_a_percent_flags_its_block():
    assert flags([block(khz=(1000,)), block(khz=(1000,)), block(khz=(1009,)), block(khz=(980,))]) == [False] * 3 + [
        True
    ]


def test_cores_that_are_locked_at_different_clocks_are_each_held_to_their_own():
    little_and_big = [block(khz=(1_500_000, 1_500_000, 2_200_000, 2_200_000)) for _ in range(5)]
    assert flags(little_and_big) == [False] * 5
    slowed = block(khz=(1_500_000, 1_500_000, 1_500_000, 2_200_000))
    assert flags([*little_and_big, slowed]) == [False] * 5 + [True]
    assert usual_clocks([[1, 5], [2, 6], [9]]) == [2, 5]
    assert usual_clocks([]) == []


def test_a_locked_gpu_that_leaves_its_clock_flags_its_block_whatever_the_cores_do():
    usual = [dict(block(khz=(1_500_000,)), gpu_khz=[[918_000], [918_000]]) for _ in range(4)]
    slowed = dict(block(khz=(1_500_000,)), gpu_khz=[[918_000], [624_750]])
    off = dict(block(khz=(1_500_000,)), gpu_khz=[[918_000], []])
    assert flags([*usual, slowed, off]) == [False] * 4 + [True, False]


class Slow(Model):
    """A network of `ms` milliseconds on a pretended clock: nothing is waited for. Its times scatter by `noise`."""

    def __init__(self, clock, ms, noise=0.01, seed=0):
        self.clock, self.ms, self.noise, self.rng = clock, ms, noise, np.random.default_rng(seed)

    def block(self, dropped, timed):
        own = [
            int(self.ms * 1e6 * np.exp(self.noise * abs(self.rng.standard_normal()))) for _ in range(dropped + timed)
        ]
        self.clock.now += sum(own)
        return own[dropped:]


@pytest.fixture
def pretended(monkeypatch):
    clock = Pretended([])
    for part in (timing, model_part, driver):
        monkeypatch.setattr(part, "CLOCK", clock.clock)
    return clock


def check_rule():
    return bench.warmup_rule(CheckSpec().session(MeasureSpec(), 8, 0), "accept")


@pytest.mark.parametrize("ms", [0.8, 20, 45, 50, 100, 300, 1000])
def test_a_network_of_any_speed_becomes_steady_in_the_warm_up_of_a_check(pretended, ms):
    warmth = Slow(pretended, ms).warm(check_rule())
    assert warmth["steady"]
    assert warmth["seconds"] <= max(2.0, 9e-3 * ms)
    assert warmth["inferences"] >= min(50, 6)


@pytest.mark.parametrize("ms", [45, 300, 2000])
def test_a_slow_network_becomes_steady_in_the_longer_warm_up_of_a_measurement_too(pretended, ms):
    warmth = Slow(pretended, ms).warm(bench.warmup_rule(MeasureSpec(), "accept"))
    assert warmth["steady"] and warmth["seconds"] <= 10.0


def test_a_fast_network_still_does_its_fifty_inferences(pretended):
    warmth = Slow(pretended, 10).warm(check_rule())
    assert warmth["steady"] and 50 <= warmth["inferences"] <= 70


@pytest.mark.parametrize("ms", [0.8, 45, 300])
def test_a_network_that_slows_down_all_the_while_is_never_called_steady_and_the_warm_up_ends(pretended, ms):
    model = Slow(pretended, ms, noise=0.0)
    grow = model.block

    def block(dropped, timed):
        model.ms *= 1.0 + 5e-4 if ms < 1 else 1.05
        return grow(dropped, timed)

    model.block = block
    model.ms, rule = ms, dict(check_rule(), steady=0.01)
    warmth = model.warm(rule)
    assert not warmth["steady"]
    assert 2.0 <= warmth["seconds"] < 20.0


def check_plan(clock, ms, processes):
    """Plan of a stage of three equal networks of `ms`, which keeps its cap, warm-ups included."""
    spec = CheckSpec().session(MeasureSpec(), processes, 0)
    job = bench.drive_job({}, {}, spec, "accept", [])
    warm = [Slow(clock, ms, seed=seed).warm(job["warmup"])["seconds"] for seed in range(3)]
    rounds, dropped, timed = plan.plan_blocks(job, dict.fromkeys("ABC", int(ms * 1e6)), 1.0 + sum(warm))
    assert set(timed.values()) == {timed["A"]}
    taken = processes * (1.0 + sum(warm) + rounds * 3 * (dropped + timed["A"]) * ms * 1e-3)
    assert taken <= job["max_seconds"]
    return rounds, dropped, timed["A"]


@pytest.mark.parametrize("processes", [8, 16])
def test_a_stage_of_a_slow_network_keeps_its_sixty_rounds_by_shorter_blocks(pretended, processes):
    assert check_plan(pretended, 0.8, processes) == (60, 4, 12)
    assert check_plan(pretended, 10, processes)[0] == 60
    assert check_plan(pretended, 40, processes) == (60, 1, 1)
    assert check_plan(pretended, 50, processes) == (60, 0, 1)
    rounds, dropped, timed = check_plan(pretended, 300, processes)
    assert rounds >= 10 and (dropped, timed) == (0, 1)


def test_the_cap_of_a_stage_grows_with_its_processes():
    spec = CheckSpec()
    assert spec.session(MeasureSpec(), 8, 0).max_seconds == 150.0
    assert spec.session(MeasureSpec(), 16, 0).max_seconds == 300.0


def test_untimed_inferences_are_given_up_only_by_networks_that_are_slow_by_themselves():
    job = {**JOB, "max_seconds": 3.5}
    assert plan.plan_blocks(job, {"fast": 1_000_000, "slow": 20_000_000}, 0.0)[1] == 1
    assert plan.plan_blocks(job, {"one": 20_000_000, "two": 20_000_000}, 0.0)[1] == 0
    assert plan.plan_blocks({**job, "period_ns": 20_000_000}, {"one": 15_000_000, "two": 15_000_000}, 0.0)[1] == 1


class Pretender:
    """Stands where a worker process stands: a `Slow` network whose warm-up and blocks cost no time."""

    clock, ms = None, {}

    def __init__(self, name, environment):
        self.name = name
        self.model = Slow(self.clock, self.ms[name], seed=int(self.clock.now % 1000) + len(name))

    def send(self, request):
        pass

    def receive(self, patience_s):
        return {}

    def close(self):
        pass

    def ask(self, request, patience_s):
        if request["do"] == "warm":
            self.clock.now += 300_000_000
            return self.model.warm(request["rule"])
        ns = self.model.block(request["dropped"], request["timed"])
        return {"ns": ns, "missed": 0, "switches": 0, "throttle": 0, "stops": 0, "khz": [[], []]}


@pytest.mark.parametrize("ms", [50, 300])
@pytest.mark.parametrize(("slower", "outcome"), [(0.0, "pass"), (0.05, "fail")])
def test_a_check_of_a_slow_network_passes_it_and_fails_its_regression(
    pretended, monkeypatch, tmp_path, ms, slower, outcome
):
    told = slow_check(pretended, monkeypatch, tmp_path, ms, slower)
    assert told.outcome == outcome, told.reason


def slow_check(clock, monkeypatch, folder, ms, slower):
    """The verdict of a whole check on the pretended clock."""
    Pretender.clock = clock
    Pretender.ms = {BASELINE: ms, AGAIN: ms, CANDIDATE: ms * (1.0 + slower)}
    monkeypatch.setattr(driver, "Worker", Pretender)
    check, stages = CheckSpec(), []
    paths = {name: folder / name for name in Pretender.ms}
    for name, path in paths.items():
        path.write_text("slow" if name == CANDIDATE else "same")
    hashes = {name: sha256(str(path)) for name, path in paths.items()}
    for number, processes in ((1, check.screen_processes), (2, check.confirm_processes)):
        spec, begun = check.session(MeasureSpec(), processes, number), clock.now
        result = driver.drive(bench.drive_job(paths, hashes, spec, "accept", []))
        setting = bench.Setting(nights.PRINT, Preflight(()), spec, "accept", "ada", bench.utc_now())
        assert (clock.now - begun) * 1e-9 <= 1.1 * spec.max_seconds
        stages.append(stage(bench.session_of(result, hashes, setting), number, check, None, 1.0))
        early = screen(stages[0], check)
        if early is not None:
            return early
    return confirm(*stages, check)


def test_a_worker_answers_in_json_and_names_what_it_cannot_do(conv):
    path = conv("free", batch=None, size=8)
    options = {"threads": 1, "spin": False, "providers": ["CPUExecutionProvider"], "seed": 0}
    requests = [
        {"do": "open", "name": "a", "path": str(path), "options": options},
        {"do": "block", "name": "a", "dropped": 1, "timed": 5},
        {"do": "open", "name": "b", "path": str(path), "options": {**options, "providers": ["NoSuchProvider"]}},
        {"do": "sing", "name": "a"},
    ]
    done = run_agent("worker", "net", stdin="\n".join(json.dumps(r) for r in requests) + "\n")
    opened, timed, refused, unknown = map(json.loads, done.stdout.splitlines())
    assert opened == {"opened": "a", "protocol": ""}
    assert len(timed["ns"]) == 5 and min(timed["ns"]) > 0 and timed["switches"] >= 0
    assert refused["kind"] == "device" and refused["message"].startswith("no provider NoSuchProvider, there are ")
    assert unknown["message"] == "unknown request 'sing'"


def nonfinite(path, value, kind=1):
    """A network whose outputs are 'fine' and 'bad': 4 values, of them 2 divided by `value`."""
    from onnx import TensorProto, helper, save

    shape = [1, 4]
    divisor = helper.make_tensor("divisor", TensorProto.FLOAT, [4], [1.0, value, value, 1.0])
    one = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("Relu", ["input"], ["fine"]),
        helper.make_node("Add", ["fine", "one"], ["positive"]),
        helper.make_node("Div", ["positive", "divisor"], ["bad"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("input", "fine", "bad")]
    graph = helper.make_graph(nodes, "bad", ports[:1], ports[1:], [divisor, one])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


OPTIONS = {"threads": 1, "spin": False, "providers": ["CPUExecutionProvider"], "seed": 0}
RULE = {"min_inferences": 3, "steady": 1.0, "min_s": 0.0, "window_s": 0.01, "max_s": 0.1}


@pytest.mark.parametrize(("value", "text"), [(0.0, "2 of 4 values of its output 'bad' are NaN or infinite"), (1.0, "")])
def test_a_network_that_gives_no_finite_numbers_is_an_error_after_its_warm_up(tmp_path, value, text):
    path = nonfinite(tmp_path / "net.onnx", value)
    requests = [
        {"do": "open", "name": "net", "path": str(path), "options": OPTIONS},
        {"do": "warm", "name": "net", "rule": RULE},
    ]
    done = run_agent("worker", "net", stdin="\n".join(json.dumps(r) for r in requests) + "\n")
    answer = json.loads(done.stdout.splitlines()[1])
    if text:
        assert (answer["kind"], answer["message"]) == ("model", text)
    else:
        assert answer["inferences"] >= 3


def drive_job(path, **changes):
    spec = MeasureSpec(rank_processes=1, rank_rounds=4, warmup_s=0.05, warmup_max_s=0.1, block_min_ms=0.0)
    job = bench.drive_job({"net": path}, {"net": sha256(str(path))}, spec, "rank", ["CPUExecutionProvider"])
    return {**job, "tied": False, **changes}


def test_a_clock_of_the_day_that_jumps_changes_nothing(conv, monkeypatch):
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(jumps) * 1e9)
    result = driver.drive(drive_job(conv("net")))
    assert len(result["repeats"][0]["order"]) == 4
    assert 0.0 < result["telemetry"]["seconds"] < 60.0
    starts = [b["started"] for b in result["repeats"][0]["blocks"]["net"]]
    assert starts == sorted(starts) and starts[0] > 0


def test_the_agent_and_the_host_never_ask_for_the_time_of_day_to_wait():
    for path in (*pack.FOLDER.rglob("*.py"), Path(bench.__file__)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "time"]
        assert not [node for node in calls if isinstance(node.value, ast.Name) and node.value.id == "time"]


@pytest.mark.parametrize("verb", ["drive", "layers"])
def test_a_full_disk_ends_a_job_with_one_line_that_says_so(conv, tmp_path, verb):
    path = conv("net")
    spec = MeasureSpec()
    job = (
        drive_job(path)
        if verb == "drive"
        else bench.layers_job({"net": path}, {"net": sha256(str(path))}, spec, ["CPUExecutionProvider"])
    )
    (tmp_path / "job.json").write_text(json.dumps({**job, "tied": False}))
    (tmp_path / "out.json.part").symlink_to("/dev/full")
    done = run_agent(verb, str(tmp_path / "job.json"), str(tmp_path / "out.json"))
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and (last["event"], last["kind"]) == ("error", "disk")
    assert last["message"].startswith("cannot write ") and last["message"].endswith("No space left on device")
    assert {p.name for p in tmp_path.iterdir()} == {"job.json", "net.onnx"}


def test_layers_are_counted_over_the_last_inferences_of_a_profile():
    def node(ts, dur, name="conv_kernel_time", op="Conv"):
        return {"cat": "Node", "name": name, "ts": ts, "dur": dur, "args": {"op_name": op}}

    runs = [{"cat": "Session", "name": "model_run", "ts": ts} for ts in (0, 100, 200)]
    events = [*runs, node(10, 999), node(110, 40), node(150, 6, "relu_kernel_time", "Relu"), node(210, 60)]
    events += [node(215, 5, "conv_fence_before"), node(220, 2), node(250, 8, "relu_kernel_time", "Relu")]
    expected = {("conv", "Conv"): 0.051, ("relu", "Relu"): 0.007}
    assert layers.layer_times(events, 2) == pytest.approx(expected)


def test_one_disturbed_turn_moves_no_layer():
    turns = [{("conv", "Conv"): ms} for ms in (0.020, 0.021, 5.0)]
    assert layers.typical(turns) == [{"name": "conv", "op": "Conv", "ms": pytest.approx(0.021)}]


def test_a_profile_that_is_cut_off_is_an_error(conv, tmp_path, monkeypatch):
    class Cut:
        def __init__(self, path, options):
            self.path = options["profile"] + ".json"
            Path(self.path).write_text('[{"cat": "No')
            self.session = self

        def block(self, dropped, timed):
            return []

        def end_profiling(self):
            return self.path

    monkeypatch.setattr(layers, "Model", Cut)
    job = {"options": OPTIONS, "dropped": 1, "runs": 2}
    with pytest.raises(AgentError) as error:
        layers.profiled({"path": "net.onnx"}, job, str(tmp_path / "profile"))
    assert error.value.message == f"the runtime's profile '{tmp_path}/profile.json' is cut off, as on a full disk"
    assert list(tmp_path.iterdir()) == []


def test_a_check_warms_up_over_fifty_inferences_and_two_windows_of_a_tenth_of_a_second():
    spec = CheckSpec().session(MeasureSpec(), 8, 0)
    assert bench.warmup_rule(spec, "accept") == {
        "min_inferences": 50, "steady": 0.02, "min_s": 0.2, "window_s": 0.1, "max_s": 2.0, "longest_s": 10.0,
    }  # fmt: skip
    assert bench.warmup_rule(MeasureSpec(), "accept") == {
        "min_inferences": 50, "steady": 0.02, "min_s": 1.0, "window_s": 0.5, "max_s": 10.0, "longest_s": 10.0,
    }  # fmt: skip


def test_inputs_start_on_64_bytes_and_keep_their_values():

    for size in (1, 7, 1000):
        array = np.arange(size, dtype=np.float64)
        out = aligned(array, np.dtype(np.float32))
        assert out.ctypes.data % 64 == 0 and out.dtype == np.float32 and (out == array).all()


def test_a_result_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(AgentError) as error:
        write_result(str(tmp_path / "no" / "out.json"), {"a": 1})
    assert error.value.kind == "disk"
    assert error.value.message.startswith("cannot write 7 bytes of results to ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "out.json.part").symlink_to("/dev/full")
    with pytest.raises(AgentError) as error:
        write_result(str(tmp_path / "out.json"), {"a": list(range(1000))})
    assert error.value.message.endswith("No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_timing_caches_are_swept_by_their_age_and_the_oldest_where_they_grow_too_large(tmp_path, monkeypatch):
    (tmp_path / "timing").mkdir()
    for age, name in enumerate(("newest", "second", "third", "old")):
        path = tmp_path / "timing" / name
        path.write_bytes(bytes(400))
        os.utime(path, (1e9 - 1000 * age, 1e9 - 1000 * age))
    end = server.Server(str(tmp_path), None)
    end.sweep_timing(1e9 - 2500)
    assert sorted(path.name for path in tmp_path.glob("timing/*")) == ["newest", "second", "third"]
    monkeypatch.setattr(server, "TIMING_BYTES", 900)
    end.sweep_timing(0.0)
    assert sorted(path.name for path in tmp_path.glob("timing/*")) == ["newest", "second"]


def old_files(place: Path, *names: str) -> list[Path]:
    """Files that nobody has asked for since 1970."""
    paths = [place / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (0, 0))
    return paths


def test_what_a_running_job_names_is_not_swept_though_the_clock_jumps(tmp_path):
    """A board without a battery begins in 1970; when it hears the time, everything on it is half a century old."""
    held = [letter * 64 for letter in "abc"]
    files = old_files(tmp_path, *(f"objects/{digest}" for digest in (*held, "d" * 64)), "agent/0123/agent.pyz")
    job = tmp_path / "jobs" / "00000000"
    old_files(job, "lock")
    (job / "work.json").write_text(json.dumps({"models": [held[0], {"path": held[1]}], "reference": held[2]}))
    (job / "job.json").write_text(json.dumps({"agent": str(files[-1])}))
    for folder in (job, files[-1].parent):
        os.utime(folder, (0, 0))
    with (job / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server.Server(str(tmp_path), None).sweep()
        assert [path.exists() for path in files] == [True, True, True, False, True] and job.exists()
    os.utime(job, (0, 0))
    server.Server(str(tmp_path), None).sweep()
    assert not any(path.exists() for path in files) and not job.exists(), "what has ended is swept by its age"


def test_a_file_that_another_client_takes_away_meanwhile_does_not_end_the_sweeping(tmp_path, monkeypatch):
    """Between the list and the look at a file, a half-sent one gets its name and an old one is swept by another."""
    gone, old = old_files(tmp_path, "objects/gone.part", "objects/old")
    caches = old_files(tmp_path, "timing/gone", "timing/old")
    real = server.glob.glob

    def listed(pattern: str) -> list[str]:
        found = real(pattern)
        for path in (gone, caches[0]):
            if str(path) in found:
                path.unlink()
        return found

    monkeypatch.setattr(server.glob, "glob", listed)
    server.Server(str(tmp_path), None).sweep()
    assert not old.exists() and not any(path.exists() for path in caches)


def test_a_models_weights_are_put_beside_it_and_nowhere_else(tmp_path):
    (tmp_path / "objects").mkdir()
    held = {text: hashlib.sha256(text.encode()).hexdigest() for text in ("graph", "weights")}
    for text, digest in held.items():
        (tmp_path / "objects" / digest).write_text(text)
    model = {"path": held["graph"], "name": "net.onnx", "beside": {"w/one.bin": held["weights"]}}
    (path,) = placing.placed({"models": [model]}, str(tmp_path), str(tmp_path / "job"))["models"]
    assert Path(path).name == "net.onnx" and Path(path).read_text() == "graph"
    assert (Path(path).parent / "w" / "one.bin").read_text() == "weights"
    for name in ("../../escaped", "/escaped", ".."):
        astray = {"models": [{**model, "beside": {name: held["weights"]}}]}
        with pytest.raises(AgentError, match="lies outside the model's folder"):
            placing.placed(astray, str(tmp_path), str(tmp_path / "job"))
    assert not list(tmp_path.rglob("escaped"))
