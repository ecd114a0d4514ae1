"""The agent file: what it needs, how it plans blocks, what it flags, how it answers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from targets.harness import agent, bench

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
        [sys.executable, str(bench.AGENT), *arguments], input=stdin, capture_output=True, text=True, timeout=60
    )


def test_the_agent_is_one_file_of_python_3_6_that_imports_only_the_standard_library():
    tree = ast.parse(bench.AGENT.read_text(encoding="utf-8"), feature_version=(3, 6))
    at_start = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
    at_start |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert at_start <= sys.stdlib_module_names
    everywhere = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert everywhere - sys.stdlib_module_names == {"numpy", "onnxruntime"}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {"removeprefix", "removesuffix"}
    assert not names


def test_the_agent_starts_without_the_runtime():
    code = "import sys; import targets.harness.agent; print('numpy' in sys.modules, 'onnxruntime' in sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=bench.AGENT.parents[2]
    )
    assert out.stdout == "False False\n"


def test_an_unknown_verb_prints_what_there_is_and_ends_with_2():
    done = run_agent("dance")
    assert done.returncode == 2
    assert "agent.py drive JOB.json OUT.json" in done.stderr


def test_facts_and_state_are_lines_of_json(tmp_path):
    facts = json.loads(run_agent("facts").stdout)
    assert facts == agent.facts("onnxruntime")
    state = json.loads(run_agent("state", str(tmp_path)).stdout)
    assert state["folder"] == str(tmp_path) and state["runnable"] >= 0


def test_a_block_holds_at_least_the_least_work_of_a_block():
    rounds, dropped, timed = agent.plan_blocks(JOB, {"fast": 20_000, "slow": 900_000}, 1.0)
    assert (rounds, dropped) == (30, 4)
    assert timed == {"fast": 250, "slow": 10}


def test_blocks_shrink_before_rounds_where_the_cap_is_near():
    rounds, dropped, timed = agent.plan_blocks({**JOB, "max_seconds": 60.0}, {"big": 50_000_000}, 1.0)
    assert (rounds, dropped) == (30, 4)
    assert timed == {"big": 8}
    assert 3 * (1.0 + rounds * (dropped + timed["big"]) * 0.05) <= 60.0


@pytest.mark.parametrize("ms", [1, 10, 100, 1000, 5000])
@pytest.mark.parametrize("networks", [1, 5])
def test_no_plan_takes_longer_than_the_cap(ms, networks):
    medians = {str(i): ms * 1_000_000 for i in range(networks)}
    try:
        rounds, dropped, timed = agent.plan_blocks(JOB, medians, 2.0)
    except agent.AgentError as error:
        assert error.kind == "long" and ms == 5000 and networks == 5
        return
    assert rounds >= 3 and min(timed.values()) >= 1
    assert 3 * (2.0 + rounds * sum(dropped + n for n in timed.values()) * ms * 1e-3) <= 300.0 + 1e-6


def block(switches=0, throttle=0, khz=()):
    return {"switches": switches, "throttle": throttle, "khz": [list(khz), list(khz)]}


def flags(blocks):
    repeats = [{"blocks": {"net": blocks}}]
    agent.flag(repeats, ["net"])
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


def test_a_worker_answers_in_json_and_names_what_it_cannot_do(conv):
    path = conv("free", batch=None, size=8)
    options = {"threads": 1, "spin": False, "providers": ["CPUExecutionProvider"], "seed": 0}
    requests = [
        {"do": "open", "name": "a", "path": str(path), "options": options},
        {"do": "block", "name": "a", "dropped": 1, "timed": 5},
        {"do": "open", "name": "b", "path": str(path), "options": {**options, "providers": ["NoSuchProvider"]}},
        {"do": "sing", "name": "a"},
    ]
    done = run_agent("worker", stdin="\n".join(json.dumps(r) for r in requests) + "\n")
    opened, timed, refused, unknown = map(json.loads, done.stdout.splitlines())
    assert opened == {"opened": "a"}
    assert len(timed["ns"]) == 5 and min(timed["ns"]) > 0 and timed["switches"] >= 0
    assert refused["kind"] == "model" and refused["message"].startswith("no provider NoSuchProvider, there are ")
    assert unknown["message"] == "unknown request 'sing'"


def test_inputs_start_on_64_bytes_and_keep_their_values():
    import numpy as np

    for size in (1, 7, 1000):
        array = np.arange(size, dtype=np.float64)
        out = agent.aligned(array, np.dtype(np.float32))
        assert out.ctypes.data % 64 == 0 and out.dtype == np.float32 and (out == array).all()


def test_a_result_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(agent.AgentError) as error:
        agent.write_result(str(tmp_path / "no" / "out.json"), {"a": 1})
    assert error.value.kind == "disk"
    assert error.value.message.startswith("cannot write 7 bytes of results to ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "out.json.part").symlink_to("/dev/full")
    with pytest.raises(agent.AgentError) as error:
        agent.write_result(str(tmp_path / "out.json"), {"a": list(range(1000))})
    assert error.value.message.endswith("No space left on device")
    assert list(tmp_path.iterdir()) == []
