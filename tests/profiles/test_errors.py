"""Errors carry one sentence, a hint and an exit code."""

from __future__ import annotations

import pytest

from profiles.errors import DeployError, MissedError, UndecidedError, UsageError, near_miss


@pytest.mark.parametrize(("kind", "code"), [(DeployError, 1), (UsageError, 2), (MissedError, 3), (UndecidedError, 4)])
def test_every_error_knows_its_exit_code_and_is_a_deploy_error(kind, code):
    error = kind("budget 8 ms cannot be met: 9.4 ms.", "raise budget.limit_ms.")
    assert error.exit_code == code and isinstance(error, DeployError)
    assert str(error) == "budget 8 ms cannot be met: 9.4 ms.\nraise budget.limit_ms."


def test_an_error_without_a_hint_is_one_line():
    assert str(DeployError("it failed.")) == "it failed."


def test_a_near_miss_is_named():
    assert near_miss("jetsn", ["local", "jetson"]) == "Did you mean 'jetson'?"


def test_without_a_near_miss_all_are_listed_in_order():
    assert near_miss("zzz", ["local", "jetson"]) == "Known: jetson, local."


def test_without_any_there_are_none():
    assert near_miss("x", []) == "There are none."
