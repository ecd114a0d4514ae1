"""Keys of stages, and work that is never done twice."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache import Cache
from pipeline.stage import Stage, canonical, digest, run_or_reuse, stage_key, tool_versions
from profiles.errors import DeployError
from profiles.schema import PruneSpec

EXPORT = Stage("export", version=3)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / ".deploy")


def test_the_key_of_a_tiny_stage_is_this_one():
    key = stage_key(EXPORT, {"opset": 17}, {"weights": "ab"}, {"onnx": "1.18.0"}, "board")
    assert key == "f18fcb2908b86bd72a3691b17d63c943ec0e05f62a023dc4922c2cbc205a383e"


def test_every_part_of_the_key_changes_it():
    keys = {
        stage_key(EXPORT, {"opset": 17}, {"weights": "ab"}, {"onnx": "1.18.0"}, "board"),
        stage_key(Stage("export", version=4), {"opset": 17}, {"weights": "ab"}, {"onnx": "1.18.0"}, "board"),
        stage_key(Stage("import", version=3), {"opset": 17}, {"weights": "ab"}, {"onnx": "1.18.0"}, "board"),
        stage_key(EXPORT, {"opset": 18}, {"weights": "ab"}, {"onnx": "1.18.0"}, "board"),
        stage_key(EXPORT, {"opset": 17}, {"weights": "ac"}, {"onnx": "1.18.0"}, "board"),
        stage_key(EXPORT, {"opset": 17}, {"weights": "ab"}, {"onnx": "1.18.1"}, "board"),
        stage_key(EXPORT, {"opset": 17}, {"weights": "ab"}, {"onnx": "1.18.0"}, "another board"),
        stage_key(EXPORT, {"opset": 17}, {"weights": "ab"}, {"onnx": "1.18.0"}),
    }
    assert len(keys) == 8


def test_a_path_among_the_inputs_stands_for_its_contents(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"same")
    two.write_bytes(b"same")
    assert stage_key(EXPORT, None, {"net": one}) == stage_key(EXPORT, None, {"net": two})
    two.write_bytes(b"other")
    assert stage_key(EXPORT, None, {"net": one}) != stage_key(EXPORT, None, {"net": two})


def test_equal_values_have_one_canonical_text_whatever_their_order_and_type():
    @dataclass(frozen=True)
    class Widths:
        b: tuple[int, ...]
        a: float

    arrays = {"a": np.float64(0.5), "b": np.array([1, 2])}
    assert canonical(Widths((1, 2), 0.5)) == canonical(arrays) == b'{"a":0.5,"b":[1,2]}'
    assert digest(PruneSpec()) == digest(PruneSpec().model_dump(mode="json"))
    assert canonical({"s": {"b", "a"}}) == b'{"s":["a","b"]}'


def test_what_json_cannot_hold_is_no_part_of_a_key():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))
    with pytest.raises(TypeError, match=r"an? object cannot be part of a stage's key or result"):
        canonical(object())


def test_versions_come_from_metadata_and_leave_out_what_is_not_installed():
    versions = tool_versions("numpy", "no-such-distribution")
    assert versions["numpy"] == np.__version__ and "no-such-distribution" not in versions and "python" in versions


def test_a_stage_is_worked_once_and_then_reused(cache: Cache):
    worked: list[Path] = []

    def work(scratch: Path) -> dict[str, Any]:
        worked.append(scratch)
        (scratch / "net.onnx").write_bytes(b"graph")
        return {"net": scratch / "net.onnx", "nodes": 7}

    first = run_or_reuse(cache, EXPORT, {"opset": 17}, {"weights": "ab"}, work)
    second = run_or_reuse(cache, EXPORT, {"opset": 17}, {"weights": "ab"}, work)
    assert len(worked) == 1 and not worked[0].exists()
    assert not first.reused and second.reused
    assert second["nodes"] == 7 and second.path("net").read_bytes() == b"graph"
    assert first == type(first)(second.key, second.values, second.files, first.seconds, False, cache)


def test_a_stage_whose_object_was_damaged_is_worked_again(cache: Cache):
    def work(scratch: Path) -> dict[str, Any]:
        (scratch / "f").write_bytes(b"rows")
        return {"rows": scratch / "f"}

    first = run_or_reuse(cache, EXPORT, None, {}, work)
    first.path("rows").write_bytes(b"flipped bit")
    again = run_or_reuse(cache, EXPORT, None, {}, work)
    assert not again.reused and again.path("rows").read_bytes() == b"rows"


def test_a_stage_that_fails_leaves_no_key_and_no_scratch(cache: Cache):
    def work(scratch: Path) -> dict[str, Any]:
        (scratch / "half").write_bytes(b"half")
        raise DeployError("the network refuses the input.")

    with pytest.raises(DeployError, match="refuses"):
        run_or_reuse(cache, EXPORT, None, {}, work)
    assert not (cache.root / "keys").exists() and list((cache.root / "scratch").iterdir()) == []


def test_a_stage_that_depends_on_the_moment_is_not_reused(cache: Cache):
    with pytest.raises(DeployError, match="stage 'measure' depends on the moment and cannot be reused"):
        run_or_reuse(cache, Stage("measure", always=True), None, {}, lambda scratch: {})


def _build(root: str, number: int, answers: Any) -> None:
    def work(scratch: Path) -> dict[str, Any]:
        time.sleep(0.2)
        (scratch / "who").write_text(str(number))
        return {"who": scratch / "who"}

    result = run_or_reuse(Cache(Path(root)), EXPORT, None, {}, work)
    answers.put((result.reused, result.path("who").read_text()))


def test_of_builds_that_want_the_same_stage_at_once_one_works_and_the_others_wait(cache: Cache):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    builds = [context.Process(target=_build, args=(str(cache.root), number, answers)) for number in range(3)]
    for build in builds:
        build.start()
    told = [answers.get(timeout=60) for _ in builds]
    for build in builds:
        build.join()
    assert sorted(reused for reused, _ in told) == [False, True, True]
    assert len({who for _, who in told}) == 1
