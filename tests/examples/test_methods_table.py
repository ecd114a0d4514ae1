"""The store of benchmarks/methods.py: one row a cell and processor, of which the last counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import methods


def row(cell: str, processor: str, ratio: float) -> dict[str, object]:
    """What a build leaves of a cell."""
    summary = {"latency_ratio": ratio, "accuracy": 0.97, "accuracy_dense": 0.98}
    machine = {"cpu": processor, "cores": 2}
    return {"project": "resnet20_gtsrb", "cell": cell, "exit_code": 0, "machine": machine, "summary": summary}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store in which one cell was taken twice on one processor and once on another."""
    path = tmp_path / "methods.jsonl"
    rows = [row("criteria/obs/0", "A", 0.49), row("criteria/obs/0", "B", 0.48), row("criteria/obs/0", "A", 0.47)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    monkeypatch.setattr(methods, "RESULTS", path)
    return path


def test_rows_of_two_processors_stay_apart_and_the_last_counts(kept: Path):
    found = methods.read()
    assert {where: rows["criteria/obs/0"]["summary"]["latency_ratio"] for where, rows in found.items()} == {
        ("resnet20_gtsrb", "A"): 0.47,
        ("resnet20_gtsrb", "B"): 0.48,
    }
    told = methods.table(found)
    assert "0.470x" in told
    assert "0.480x" in told
    assert "0.490x" not in told


def test_cells_of_one_machine_share_a_heading_however_its_table_was_written(kept: Path):
    other = row("criteria/random/0", "A", 0.46)
    other["machine"] = {"cores": 2, "cpu": "A"}
    kept.write_text(kept.read_text() + json.dumps(other) + "\n")
    assert methods.table(methods.read()).count("resnet20_gtsrb at") == 2


def test_a_cell_is_taken_again_on_another_processor_and_not_on_the_same(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    built: list[str] = []
    here = {"cpu": "A"}

    def deploy(place: Path, budget: str, flags: tuple[str, ...], work: Path) -> dict[str, object]:
        built.append(flags[1])
        told = row("", here["cpu"], 0.4)
        return {key: told[key] for key in ("exit_code", "machine", "summary")}

    monkeypatch.setattr(methods.builds, "WORK", tmp_path)
    monkeypatch.setattr(methods.builds, "deploy", deploy)
    monkeypatch.setattr(methods.builds, "machine", lambda: here)
    for processor, expected in (("A", []), ("C", ["obs"]), ("C", ["obs"])):
        here["cpu"] = processor
        methods.run(1, ["resnet20_gtsrb/criteria/obs/0"])
        assert built == expected
    assert methods.read()["resnet20_gtsrb", "C"]["criteria/obs/0"]["summary"]["latency_ratio"] == 0.4
