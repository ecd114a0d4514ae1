"""The content-addressed store: whole files or none, and nothing removed that a run refers to."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import Cache, file_hash, locked, named, write_atomic
from pipeline.nightly import baseline
from pipeline.nouns import Pin
from profiles.errors import DeployError
from targets.runtimes import ort

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / ".deploy")


def test_an_object_lies_under_its_hash_and_comes_back(cache: Cache):
    digest = cache.put_bytes(b"rows")
    assert digest == hashlib.sha256(b"rows").hexdigest()
    assert cache.path(digest) == cache.root / "objects" / digest[:2] / digest
    assert cache.get(digest) == b"rows"


def test_a_file_is_stored_by_its_contents_and_may_go_afterwards(cache: Cache, tmp_path: Path):
    source = tmp_path / "net.onnx"
    source.write_bytes(b"graph" * 1000)
    digest = cache.put_file(source)
    source.unlink()
    assert file_hash(cache.path(digest)) == digest


@pytest.mark.parametrize("asked", [lambda path: path, os.path.relpath], ids=["absolute", "relative"])
def test_errors_tell_an_object_by_the_name_of_the_model(cache: Cache, tmp_path: Path, asked: Callable[[Path], Any]):
    path = Path(asked(cache.path(cache.put_bytes(b"no graph"))))
    with pytest.raises(DeployError) as caught, named({"dense": path, "dense-again": path}):
        ort.runtime().build(path, tmp_path / "dense.artifact", ("CPUExecutionProvider",), 1)
    assert caught.value.message.startswith(f"ONNX Runtime {ort.runtime().version()} cannot open 'dense': ")
    assert "objects" not in str(caught.value) and caught.value.hint in str(caught.value)


def test_making_a_cache_touches_no_file(tmp_path: Path):
    Cache(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_object_is_dropped_with_a_warning_and_is_absent(cache: Cache, caplog: pytest.LogCaptureFixture):
    digest = cache.put_bytes(b"true")
    cache.path(digest).write_bytes(b"false")
    with caplog.at_level(logging.WARNING):
        assert cache.get(digest) is None
    assert f"{cache.path(digest)} is damaged" in caplog.text
    assert not cache.path(digest).exists()
    assert cache.put_bytes(b"true") == digest and cache.get(digest) == b"true"


def test_a_damaged_key_record_is_dropped_with_a_warning(cache: Cache, caplog: pytest.LogCaptureFixture):
    cache.write_key("export", "ab", {"values": {}})
    cache.key_path("export", "ab").write_text("{torn")
    with caplog.at_level(logging.WARNING):
        assert cache.read_key("export", "ab") is None
    assert "is damaged and was dropped; its stage runs again." in caplog.text


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    write_atomic(path, b"old")

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="input/output"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_is_one_sentence_with_the_free_space(cache: Cache, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DeployError) as caught:
        cache.put_bytes(b"big")
    assert caught.value.message.startswith("the disk is full: '") and caught.value.message.endswith(" MiB are free.")
    assert caught.value.hint == "free some space, or remove what no run needs: deploy gc --keep-days 0"


def test_a_really_full_file_system_gives_the_same_error_and_no_half_object(tmp_path: Path):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    made = subprocess.run(command, capture_output=True, check=False)
    if made.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        small = Cache(mount / ".deploy")
        with pytest.raises(DeployError, match="the disk is full: "):
            small.put_bytes(os.urandom(1 << 20))
        assert [p for p in mount.rglob("*") if p.is_file()] == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_second_process_waits_for_the_lock_of_a_key(cache: Cache):
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipeline.cache import Cache
with Cache(Path({str(cache.root)!r})).working("tabulate", "k"):
    print("held", flush=True)
    time.sleep(0.5)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        begun = time.monotonic()
        with cache.working("tabulate", "k"):
            assert time.monotonic() - begun > 0.3


def test_a_lock_that_is_not_waited_for_says_that_it_is_taken(tmp_path: Path):
    with locked(tmp_path / "lock") as mine, locked(tmp_path / "lock", wait=False) as theirs:
        assert mine and not theirs
    with locked(tmp_path / "lock", wait=False) as free:
        assert free


def test_a_lock_whose_file_was_deleted_is_taken_anew(tmp_path: Path):
    with locked(tmp_path / "lock"):
        (tmp_path / "lock").unlink()
    with locked(tmp_path / "lock", wait=False) as free:
        assert free and (tmp_path / "lock").exists()


def _aged(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_gc_removes_old_keys_and_the_objects_that_only_they_named(cache: Cache):
    old, young = cache.put_bytes(b"old"), cache.put_bytes(b"young")
    cache.write_key("export", "a" * 64, {"files": {"onnx": old}})
    cache.write_key("export", "b" * 64, {"files": {"onnx": young}})
    _aged(cache.key_path("export", "a" * 64), 40)
    swept = cache.gc(30)
    assert (swept.objects, swept.keys) == (1, 1)
    assert cache.get(old) is None and cache.get(young) == b"young"


def test_gc_keeps_what_a_run_refers_to_however_old(cache: Cache, tmp_path: Path):
    named, journalled, loose = (cache.put_bytes(name) for name in (b"named", b"journalled", b"loose"))
    run = tmp_path / "elsewhere" / "run"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"stages": {"export": {"outputs": {"onnx": named}}}}))
    (run / "journal").write_text(json.dumps({"value": {"files": {"rows": journalled}}}) + "\n")
    cache.remember_run(run)
    cache.gc(0)
    assert cache.get(named) and cache.get(journalled) and cache.get(loose) is None


def test_gc_forgets_a_run_whose_folder_is_gone(cache: Cache, tmp_path: Path):
    cache.remember_run(tmp_path / "gone")
    assert cache.runs() == [] and list((cache.root / "runs").iterdir()) == []


def test_gc_refuses_while_a_build_uses_the_folder(cache: Cache):
    with cache.in_use(), pytest.raises(DeployError) as caught:
        cache.gc(0)
    assert caught.value.message == f"a build is using '{cache.root}'."


def test_the_engine_of_a_baseline_outlives_collecting_until_another_is_accepted(tmp_path):
    cache, old = Cache(tmp_path), time.time() - 10 * 86400
    models = [cache.put_bytes(name) for name in (b"first", b"second", b"nobody's")]
    for name, model in zip(("one", "two", "three"), models, strict=True):
        folder = tmp_path / "engines" / name
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"model": {"": model, "w.bin": "0" * 64}, "sha256": "1" * 64}))
    (tmp_path / "engines" / "damaged").mkdir()
    (tmp_path / "engines" / "damaged" / "record.json").write_text("[]")
    paths = []
    for model in models[:2]:
        path = tmp_path / f"{model[:4]}.onnx"
        path.write_bytes(cache.get(model))
        paths.append(path)
    baseline.accept(tmp_path, "board", Pin("first", models[0], "first.onnx"), paths[0])
    for path in (tmp_path / "engines").iterdir():
        os.utime(path, (old, old))
    cache.gc(keep_days=5)
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["one"]
    baseline.accept(tmp_path, "board", Pin("second", models[1], "second.onnx"), paths[1])
    cache.gc(keep_days=5)
    assert list((tmp_path / "engines").iterdir()) == []


def test_collecting_removes_engines_and_timings_that_nobody_used(tmp_path):
    cache, old = Cache(tmp_path), time.time() - 10 * 86400
    for name in ("used", "unused"):
        (tmp_path / "engines" / name).mkdir(parents=True)
        (tmp_path / "engines" / name / "engine.plan").write_bytes(b"12345")
        (tmp_path / "timing").mkdir(exist_ok=True)
        (tmp_path / "timing" / f"{name}.cache").write_bytes(b"123")
    for path in (tmp_path / "engines" / "unused", tmp_path / "timing" / "unused.cache"):
        os.utime(path, (old, old))
    swept = cache.gc(keep_days=5)
    assert (swept.objects, swept.bytes) == (2, 8)
    assert [path.name for path in (tmp_path / "engines").iterdir()] == ["used"]
    assert [path.name for path in (tmp_path / "timing").iterdir()] == ["used.cache"]
