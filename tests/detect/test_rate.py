"""Findings over the learning rate: too high for the loss, or scaled away by the clip."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.detect.curves import Curves
from gradwatch.detect.rate import EffectiveRateLow, LearningRateTooHigh
from gradwatch.testing import JournalBuilder
from tests.detect.support import ADAM, SGD, Curve, codes, findings, only, same_however_cut

CODE = "learning-rate-too-high"


def too_high() -> Curves:
    return Curves((LearningRateTooHigh,))


def rate_low() -> Curves:
    return Curves((EffectiveRateLow,))


def sampled(journal: JournalBuilder, ratio: float, weight: float = 10.0) -> None:
    journal.sample([weight, weight], [weight * ratio, weight * ratio])


def start(journal: JournalBuilder, ratio: float, loss: float = 2.3, **fields: Any) -> Curve:
    """A first step and a sample of its update."""
    curve = Curve(journal)
    curve.steps(1, loss=loss, **fields)
    sampled(journal, ratio)
    return curve


# -- the loss is worse


def diverged(journal: JournalBuilder) -> None:
    curve = start(journal, 0.3)
    curve.steps(200, loss=6.0)
    curve.steps(100, loss=6.0, lr=0.01)


@pytest.mark.parametrize(("optimizer", "word"), [(SGD, "divide by 3"), (ADAM, "AdamW")])
def test_a_loss_above_the_one_before_the_first_update(tmp_path: Path, optimizer: Any, word: str) -> None:
    found = same_however_cut(tmp_path, diverged, too_high, optimizers=[optimizer])
    one = only(found, CODE)
    assert (one.severity, one.active) == ("ticket", False)
    assert one.step <= 49
    assert one.evidence["loss_before"] == pytest.approx(2.3, rel=0.2)
    assert one.evidence["peak_update_ratio"] == pytest.approx(0.3)
    assert "warmup" in one.advice
    assert word in one.advice


def test_a_loss_that_runs_away_to_nan_is_told_with_the_first_ten_steps(tmp_path: Path) -> None:
    def runaway(journal: JournalBuilder) -> None:
        journal.step(loss=1.0)
        sampled(journal, 0.5)
        for i in range(1, 30):
            journal.step(loss=4.0**i if i < 12 else math.inf, grad_norm=4.0**i)

    assert only(same_however_cut(tmp_path, runaway, too_high), CODE).step == 9


def test_a_rising_loss_without_large_updates_is_no_matter_of_the_rate(tmp_path: Path) -> None:
    def growing(journal: JournalBuilder) -> None:
        curve = start(journal, 0.005)
        curve.steps(300, loss=(3.0, 20.0))

    assert codes(findings(tmp_path, growing), CODE) == []


def test_a_lucky_first_loss_of_single_samples_is_no_measure(tmp_path: Path) -> None:
    def single(journal: JournalBuilder) -> None:
        journal.step(loss=0.3)
        sampled(journal, 0.08)
        for loss in np.random.default_rng(0).exponential(size=400).tolist():
            journal.step(loss=loss)

    assert codes(findings(tmp_path, single), CODE) == []


def test_a_healthy_beginning_with_a_bump_is_no_finding(tmp_path: Path) -> None:
    def bump(journal: JournalBuilder) -> None:
        curve = start(journal, 0.11)
        curve.steps(15, loss=4.0)
        curve.steps(300, loss=(2.0, 1.0))

    assert codes(findings(tmp_path, bump), CODE) == []


def test_the_budget_of_a_run_counts(tmp_path: Path) -> None:
    def worse(journal: JournalBuilder) -> None:
        curve = start(journal, 0.12)
        curve.steps(99, loss=6.0)

    assert len(codes(findings(tmp_path / "a", worse), CODE)) == 1
    assert codes(findings(tmp_path / "b", worse, budgets={CODE: 5.0}), CODE) == []


# -- the loss is no better


@pytest.mark.parametrize(("ratio", "expected"), [(0.15, 1), (0.02, 0)])
def test_a_loss_that_is_no_better_after_a_large_update(tmp_path: Path, ratio: float, expected: int) -> None:
    def stuck(journal: JournalBuilder) -> None:
        start(journal, ratio).steps(300, loss=2.3)

    found = codes(same_however_cut(tmp_path, stuck, too_high), CODE)
    assert len(found) == expected
    assert all(100 <= step <= 160 for _, _, step in found)


# -- too large a step


def test_first_updates_of_a_fifth_of_the_weights_unless_those_began_at_zero(tmp_path: Path) -> None:
    def large(journal: JournalBuilder) -> None:
        curve = start(journal, 0.35)
        curve.steps(1, loss=2.2)
        sampled(journal, 0.25)
        curve.steps(100, loss=(2.2, 1.0))

    def from_zero(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        for weight in (0.0, 1.0, 2.0, 4.0):
            curve.steps(1, loss=2.3)
            sampled(journal, 1 / weight if weight else 0.0, weight or 1e-30)
        curve.steps(100, loss=(2.2, 1.0))

    assert only(findings(tmp_path / "a", large), CODE).step == 9
    assert codes(findings(tmp_path / "b", from_zero), CODE) == []


# -- the rate rises later


def test_a_rate_that_rises_to_a_new_height_is_held_against_the_loss_before(tmp_path: Path) -> None:
    def rise(journal: JournalBuilder) -> None:
        curve = start(journal, 0.01, lr=0.01)
        curve.steps(400, loss=(2.3, 0.8), lr=0.01)
        curve.steps(200, loss=1.9, lr=0.1)

    one = only(same_however_cut(tmp_path, rise, too_high), CODE)
    assert 401 <= one.step <= 450
    assert one.evidence["loss_before"] == pytest.approx(0.98, rel=0.1)


@pytest.mark.parametrize(("after", "accuracy", "expected"), [(1.0, 0.7, 1), (1.0, 0.9, 0), (0.82, 0.7, 0)])
def test_a_rise_that_leaves_the_loss_somewhat_worse_for_good(
    tmp_path: Path, after: float, accuracy: float, expected: int
) -> None:
    def rise(journal: JournalBuilder) -> None:
        curve = start(journal, 0.01, lr=0.01)
        curve.steps(399, loss=(2.3, 0.8), lr=0.01)
        curve.steps(100, loss=0.8, lr=0.01)
        journal.validation(accuracy=0.7)
        curve.steps(50, loss=after, lr=0.03)
        journal.validation(accuracy=accuracy)
        curve.steps(150, loss=after, lr=0.03)

    found = codes(same_however_cut(tmp_path, rise, too_high), CODE)
    assert len(found) == expected
    assert all(599 <= step <= 629 for _, _, step in found)


def test_a_warm_restart_and_a_new_attempt_are_no_rise(tmp_path: Path) -> None:
    def restart(journal: JournalBuilder) -> None:
        curve = start(journal, 0.01, lr=0.1)
        curve.steps(300, loss=(2.3, 0.8), lr=0.1)
        for i in range(30):
            curve.steps(10, loss=0.8 - 0.02 * i, lr=0.1 * 0.8**i)
        curve.steps(300, loss=0.8, lr=0.1)

    assert codes(findings(tmp_path / "a", restart), CODE) == []

    def first(journal: JournalBuilder) -> None:
        start(journal, 0.3).steps(29, loss=(2.3, 1.0))

    def second(journal: JournalBuilder) -> None:
        start(journal, 0.3, loss=1.0).steps(200, loss=2.2)

    root = tmp_path / "b"
    findings(root, first)
    assert codes(findings(root, second, attempt=1), CODE) == []


def test_a_journal_that_does_not_reach_back_to_the_first_step_is_not_judged(tmp_path: Path) -> None:
    def late(journal: JournalBuilder) -> None:
        Curve(journal).steps(2_000, loss=1.0)
        sampled(journal, 0.3)
        Curve(journal).steps(20, loss=1.0)
        Curve(journal).steps(100, loss=9.0)

    assert codes(findings(tmp_path, late, capacity=128 * 1024), CODE) == []


def test_attempts_that_a_scaler_skipped_come_before_the_first_step(tmp_path: Path) -> None:
    def skipping(journal: JournalBuilder) -> None:
        for _ in range(3):
            journal.step(loss=2.3, skipped=True, nonfinite=1)
        start(journal, 0.3).steps(60, loss=6.0)

    assert only(findings(tmp_path, skipping), CODE).evidence["loss_before"] == pytest.approx(2.3, rel=0.2)


def test_adversarial_optimizers_are_not_held_against_their_losses(tmp_path: Path) -> None:
    def adversarial(journal: JournalBuilder) -> None:
        for i in range(300):
            journal.step(optimizer=0, loss=0.7 + 0.05 * i)
            journal.step(optimizer=1, loss=0.7 + 0.05 * i)

    assert codes(findings(tmp_path, adversarial, optimizers=["g", "d"]), CODE) == []


# -- effective-learning-rate-low


def clipped_away(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(400, loss=2.3, norm=1.0, clip_threshold=1e-3)
    curve.steps(300, loss=(2.3, 1.0), norm=1.0, clip_threshold=0.5)


def test_a_clip_that_scales_an_sgd_to_a_standstill(tmp_path: Path) -> None:
    found = same_however_cut(tmp_path, clipped_away, rate_low)
    one = only(found, "effective-learning-rate-low")
    assert (one.severity, one.active) == ("ticket", False)
    assert 200 <= one.step <= 260
    assert one.evidence["effective_learning_rate"] == pytest.approx(1e-4, rel=0.1)


def test_adaptive_optimizers_learning_runs_and_moderate_clips_are_left_alone(tmp_path: Path) -> None:
    def learning(journal: JournalBuilder) -> None:
        Curve(journal).steps(600, loss=(2.3, 0.5), norm=1.0, clip_threshold=1e-2)

    def moderate(journal: JournalBuilder) -> None:
        Curve(journal).steps(600, loss=2.3, norm=1.0, clip_threshold=0.2)

    code = "effective-learning-rate-low"
    assert codes(findings(tmp_path / "a", clipped_away, optimizers=[ADAM]), code) == []
    assert codes(findings(tmp_path / "b", learning), code) == []
    assert codes(findings(tmp_path / "c", moderate), code) == []
    assert len(codes(findings(tmp_path / "d", moderate, budgets={code: 0.3}), code)) == 1


def test_samples_and_validations_that_are_read_long_before_their_rows_count_from_their_time_on(tmp_path: Path) -> None:
    """A replay reads all samples at once: the first ones must still be there when the first rows are judged."""

    def long(journal: JournalBuilder) -> None:
        curve = start(journal, 0.3)
        for part in range(60):
            curve.steps(20, loss=6.0 if part < 5 else 2.0)
            sampled(journal, 0.001)
            journal.validation(accuracy=0.1 if part < 30 else 0.9)

    one = only(same_however_cut(tmp_path, long, too_high), CODE)
    assert one.step <= 49
    assert one.evidence["peak_update_ratio"] == pytest.approx(0.3)
