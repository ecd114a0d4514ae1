"""A board of another instruction set, through an emulator: everything that is not timing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from boards import TestBoard, arm_root, lacking

from profiles.schema import Profile
from targets.base import load_target


@pytest.fixture(scope="module")
def arm_board() -> Iterator[TestBoard]:
    """An arm64 board; skipped where none can be brought up."""
    reason = lacking()
    if reason:
        pytest.skip(reason)
    board = TestBoard(arm_root=arm_root())
    yield board
    board.down()


@pytest.mark.slow
def test_an_arm64_board_is_pushed_the_agent_says_who_it_is_and_computes_what_this_machine_does(
    arm_board, conv, local: Profile, tmp_path
):
    path, batch = conv("net"), [np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)]
    (tmp_path / ".deploy").mkdir()
    target = load_target(arm_board.profile(), tmp_path / ".deploy")
    try:
        doctor = {condition.name: condition for condition in target.doctor()}
        assert doctor["connection"].ok and doctor["runtime"].ok and doctor["providers"].ok
        fingerprint = target.fingerprint()
        assert fingerprint.machine == "aarch64" and fingerprint.cpu == "0x41 0xd42 0x0"
        artifact = target.build(path, tmp_path / "artifact.onnx")
        there = target.infer(artifact, batch)[0]
    finally:
        target.board.close()
    here = load_target(local, tmp_path / ".deploy").infer(path, batch)[0]
    assert np.abs(there - here).max() <= 1e-6 * np.abs(here).max()
