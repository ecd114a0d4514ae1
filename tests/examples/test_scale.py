"""What a network's size costs: every step on a small network, samples of rows, exponents, table and picture."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.scale import __main__ as scale
from benchmarks.scale import steps
from pipeline.search import EVALUATIONS
from profiles.schema import load_profile
from targets.base import RowTimes, load_target

SHORT = {
    "measure": {"rank_processes": 1, "rank_rounds": 3, "warmup_s": 0.01, "warmup_max_s": 0.05},
    "prune": {"grid": 8},
}


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """Every step on the ResNet-20 of CIFAR, on the simulated device."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("scale")
    target = load_target(load_profile("simulated", SHORT), folder)
    with pytest.MonkeyPatch.context() as few:
        few.setattr(steps, "VALUE_SAMPLES", 8)
        found = steps.judged(steps.cifar(3), target, 20, 2, folder)
    torch.set_num_threads(threads)
    return found | {
        "target": "simulated", "machine": {"cpu": "a processor"}, "load": [0.5, 0.6],
    }  # fmt: skip


def test_every_step_is_timed_and_counted(row):
    wanted = {*scale.GROWING, "probe", "losses", "round"}
    assert set(row["seconds"]) == set(row["cpu_s"]) == set(row["peak_mib"]) == wanted
    assert (row["layers"], row["groups"], row["blocks"], row["losses_measured"]) == (20, 12, 9, 2)
    assert list(row["peak_mib"].values()) == sorted(row["peak_mib"].values())
    assert row["samples"] == 8 and 0.7 * EVALUATIONS[0] < row["plans"] <= EVALUATIONS[0]
    first, _, narrowest = row["ratios"].values()
    assert narrowest < first < 0.7


def test_a_sample_of_rows_is_measured_and_the_table_says_so(row):
    assert 0 < row["rows_measured"] < row["rows"]
    text = scale.table({"real": {"resnet20": row}})
    assert f"{row['rows_measured']} of {row['rows']} rows measured on simulated" in text
    assert f"a round tries {row['plans']} plans on 8 samples" in text and "load 0.5 to 0.6" in text


def test_rows_that_are_not_measured_take_a_rooflines_times_scaled_to_the_sample(tmp_path, monkeypatch):
    paths = [tmp_path / f"{n}.onnx" for n in range(6)]
    monkeypatch.setattr(steps, "roofline_ms", lambda path, _: 1.0 + int(path.stem))
    asked = []

    def rows(models, reference, rounds, progress=None):
        """In two groups; the device was half as fast while it measured the second one."""
        asked.append(list(models))
        each, group = [2.0 * (1 + int(path.stem)) for path in models], np.array([int(p.stem) % 2 for p in models])
        ms = np.tile((np.array(each) * (1 + group))[:, None], (1, rounds))
        return RowTimes(ms, np.stack([np.ones(rounds), 2 * np.ones(rounds)]), group)

    sampled = steps.Sampled(SimpleNamespace(rows=rows, name="a device"), 3)
    times = sampled.rows(paths * 2, tmp_path / "reference", 4)
    assert asked == [[paths[0], paths[2], paths[5]] * 2]
    assert np.allclose(times.ms, np.tile(2.0 * np.arange(1, 7), 2)[:, None]) and times.ms.shape == (12, 4)
    assert (sampled.asked, sampled.measured, sampled.name) == (6, 3, "a device")
    assert steps.Sampled(SimpleNamespace(rows=rows), 100).rows(paths, tmp_path, 2).ms.shape == (6, 2)


def grown(layers, power):
    columns = dict.fromkeys(scale.GROWING, 0.01 * layers**power)
    return {
        "layers": layers, "groups": 1, "blocks": 1, "sites": 1, "combinations": 1, "rows": 1, "rows_measured": 1,
        "gap": 0.0, "target": "simulated", "machine": {"cpu": "a processor"}, "load": [0, 0], "seconds": columns,
        "cpu_s": columns, "peak_mib": dict.fromkeys(columns, 100.0),
    }  # fmt: skip


def test_exponents_are_the_slopes_of_the_logarithms_and_are_drawn(tmp_path):
    results = {"growth": {f"cifar-{n}": grown(6 * n + 2, 1.5) for n in (3, 9, 18)}}
    powers = scale.growth(results["growth"])
    assert powers["capture"] == pytest.approx(1.5) and powers["memory"] == pytest.approx(0)
    assert "   proofs   1.50" in scale.table(results)
    scale.draw(results, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    assert scale.growth({}) == {} and scale.table({}) == "no results yet"


def test_a_depth_is_worked_in_a_process_of_its_own_and_replaces_its_older_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "RESULTS", tmp_path / "scale.json")
    (tmp_path / "scale.json").write_text(json.dumps({"growth": {"cifar-1": {"old": True}}}))
    assert scale.main(["--growth", "--depths", "1"]) == 0
    (found,) = json.loads((tmp_path / "scale.json").read_text())["growth"].values()
    assert found["layers"] == 8 and "plans" not in found and found["target"] == "simulated"
    assert set(found["seconds"]) == set(scale.GROWING) and "8 layers" in capsys.readouterr().out
