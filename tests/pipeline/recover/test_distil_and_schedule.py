"""The distillation loss and the learning-rate cycle against their formulas."""

import math

import pytest
import torch
from torch import nn

from pipeline.recover.distil import distil
from pipeline.recover.schedule import learning_rate, plan_steps, waited

LOSS = nn.functional.cross_entropy


def logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 5, generator=generator)
    return student, teacher, torch.arange(8) % 5


def test_the_loss_of_a_classifier_is_the_tempered_divergence_and_the_task_loss():
    student, teacher, targets = logits()
    p, q = torch.softmax(teacher / 4, 1), torch.softmax(student / 4, 1)
    divergence = float((p * (p / q).log()).sum(1).mean())
    expected = 0.9 * 16 * divergence + 0.1 * float(LOSS(student, targets))
    value = distil(student, teacher, targets, LOSS, alpha=0.9, temperature=4.0)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_a_student_equal_to_its_teacher_pays_only_the_task_loss():
    student, _, targets = logits()
    value = distil(student, student, targets, LOSS, alpha=0.5, temperature=4.0)
    assert float(value) == pytest.approx(0.5 * float(LOSS(student, targets)), rel=1e-5)


def test_a_share_of_zero_is_the_task_loss_alone():
    student, teacher, targets = logits()
    assert distil(student, teacher, targets, LOSS, alpha=0.0, temperature=4.0) == LOSS(student, targets)


def test_outputs_that_are_no_class_scores_are_compared_by_their_squares():
    student, teacher, _ = logits()
    targets = torch.zeros(8, 5)
    expected = float((student - teacher).square().mean() / teacher.var())
    value = distil(student, teacher, targets, nn.functional.mse_loss, alpha=1.0, temperature=4.0)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    pair = distil((student, teacher), (teacher, teacher), targets, nn.functional.mse_loss, alpha=1.0, temperature=4.0)
    assert float(pair) == pytest.approx(expected / 2, rel=1e-5)


def test_the_cycle_rises_to_its_peak_and_falls_to_its_end():
    rates = [learning_rate(step, 101, 0.5) for step in range(101)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[30] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(5e-5)
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_cycle_of_a_few_steps_stays_within_its_bounds(steps):
    rates = [learning_rate(step, steps, 1.0) for step in range(steps)]
    assert all(math.isfinite(rate) and 1e-4 <= rate <= 1 for rate in rates)


def test_a_plan_that_fits_is_kept_and_one_that_does_not_is_cut():
    assert plan_steps(1000, 0.05, 1.0, 10, minutes=2.0) == 1000
    cut = plan_steps(1000, 0.05, 1.0, 10, minutes=0.5)
    assert cut * 0.05 + math.ceil(cut / 100) * 1.0 <= 0.9 * 30
    assert cut == pytest.approx((0.9 * 30 - 1) / 6 * 100, abs=1)
    assert plan_steps(1000, 0.05, 100.0, 10, minutes=0.5) == 0


def test_waiting_counts_the_epochs_since_the_best():
    assert [waited(scores) for scores in ([], [1.0], [1.0, 2.0], [2.0, 1.0, 1.0], [1.0, 1.0])] == [0, 0, 0, 2, 1]
