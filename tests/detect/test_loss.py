"""Findings over the training loss: when they are raised, when they are over, and what they leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradwatch.detect.curves import Curves, Watcher
from gradwatch.detect.learning import LossNotDecreasing, LossPlateau
from gradwatch.detect.loss import LossDiverging, LossSpike
from gradwatch.testing import JournalBuilder
from tests.detect.support import ADAM, SGD, Curve, codes, findings, only, same_however_cut

LOSS = ("loss-spike", "loss-diverging", "loss-not-decreasing", "loss-plateau")


def curves(*watchers: Callable[[], Watcher]) -> Callable[[], Curves]:
    return lambda: Curves(watchers)


def healthy(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(300, loss=(2.3, 1.0))
    curve.steps(900, loss=(1.0, 0.5))


def test_a_loss_that_falls_is_no_finding(tmp_path: Path) -> None:
    assert codes(findings(tmp_path, healthy), *LOSS) == []


# -- loss-spike


def spiky(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(300, loss=(2.3, 1.0))
    curve.steps(20, loss=4.0)
    curve.steps(100, loss=1.0)
    curve.steps(20, loss=5.0)
    curve.steps(100, loss=1.0)


def test_a_spike_is_told_within_ten_steps_with_its_past_and_is_over_when_the_loss_is_back(tmp_path: Path) -> None:
    found = same_however_cut(tmp_path, spiky, curves(LossSpike))
    assert codes(found) == [("loss-spike", "ticket", 309), ("loss-spike", "ticket", 429)]
    assert [f.active for f in found] == [False, False]
    first = found[0]
    assert first.evidence["first_step"] == 300
    assert first.evidence["loss"] == pytest.approx(4.0, rel=0.1)
    # The past of the second spike does not hold the first one.
    assert found[1].evidence["largest_before"] < 3.0
    losses = np.linspace(2.3, 1.0, 300)[-256:]
    assert first.evidence["median_before"] == pytest.approx(float(np.median(losses)), rel=0.05)


def test_one_odd_batch_a_near_zero_loss_and_a_warm_restart_are_no_spikes(tmp_path: Path) -> None:
    def odd(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(300, loss=(2.3, 1.0))
        curve.steps(1, loss=50.0)
        curve.steps(109, loss=1.0)
        curve.steps(200, loss=(1.0, 0.001))
        curve.steps(300, loss=0.001)
        curve.steps(100, loss=0.05)

    def restart(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(300, loss=(2.3, 0.4), lr=0.1)
        for i in range(30):
            curve.steps(10, loss=0.4, lr=0.1 * 0.9**i)
        curve.steps(100, loss=0.9, lr=0.1)

    assert codes(findings(tmp_path / "a", odd), "loss-spike") == []
    assert codes(findings(tmp_path / "b", restart), "loss-spike") == []


def test_the_budget_of_a_run_counts(tmp_path: Path) -> None:
    assert codes(findings(tmp_path, spiky, budgets={"loss-spike": 1_000.0}), "loss-spike") == []


def test_a_spike_that_stays_becomes_the_past(tmp_path: Path) -> None:
    def stays(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(300, loss=(2.3, 1.0))
        curve.steps(500, loss=4.0)

    [spike] = [f for f in findings(tmp_path, stays) if f.code == "loss-spike"]
    assert (spike.step, spike.active) == (309, False)


# -- loss-diverging


def diverging(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(300, loss=(2.3, 0.5))
    curve.steps(300, loss=(0.5, 3.0))
    curve.steps(400, loss=0.5)


@pytest.mark.parametrize(("optimizer", "word"), [(SGD, "SGD"), (ADAM, "AdamW")])
def test_a_loss_that_gives_back_what_it_had_learned_diverges(tmp_path: Path, optimizer: object, word: str) -> None:
    found = same_however_cut(tmp_path, diverging, curves(LossDiverging), optimizers=[optimizer])
    one = only(found, "loss-diverging")
    assert (one.severity, one.active) == ("ticket", False)
    assert 400 < one.step < 550
    assert one.evidence["best"] < 0.7 < one.evidence["loss"]
    assert word in one.advice


def test_growing_returns_losses_of_both_signs_and_two_optimizers_do_not_diverge(tmp_path: Path) -> None:
    def returns(journal: JournalBuilder) -> None:
        for part in range(16):
            Curve(journal, seed=part).steps(50, loss=(1.0 + part, 2.0 + part))
            journal.validation(reward=10.0 + 5 * part)

    def both_signs(journal: JournalBuilder) -> None:
        noise = np.random.default_rng(0).normal(size=1_000)
        for i, value in enumerate(noise.tolist()):
            journal.step(loss=0.2 * value - (0.3 if 100 < i < 300 else 0.0))

    def adversarial(journal: JournalBuilder) -> None:
        for i in range(600):
            journal.step(optimizer=0, loss=0.7 - i * 1e-3)
            journal.step(optimizer=1, loss=0.7 + i * 1e-2)

    assert codes(findings(tmp_path / "a", returns), *LOSS) == []
    assert codes(findings(tmp_path / "b", both_signs), *LOSS) == []
    assert codes(findings(tmp_path / "c", adversarial, optimizers=["g", "d"]), *LOSS) == []


def test_values_that_grow_while_validations_hold_do_not_diverge(tmp_path: Path) -> None:
    def values(journal: JournalBuilder, worse: float) -> None:
        for part in range(20):
            loss = (1.0, 0.7) if part < 10 else (0.7 + 0.2 * (part - 10), 0.9 + 0.2 * (part - 10))
            Curve(journal, seed=part).steps(50, loss=loss)
            journal.validation(reward=220.0 - (worse if part > 11 else 0.0))

    held = same_however_cut(tmp_path / "a", lambda journal: values(journal, 0.0), curves(LossDiverging))
    assert codes(held) == []
    fell = same_however_cut(tmp_path / "b", lambda journal: values(journal, 50.0), curves(LossDiverging))
    assert len(codes(fell)) == 1


def test_without_the_returns_growing_losses_look_like_divergence(tmp_path: Path) -> None:
    def returns(journal: JournalBuilder) -> None:
        Curve(journal).steps(800, loss=(1.0, 17.0))

    assert codes(findings(tmp_path, returns), "loss-diverging") != []


# -- loss-not-decreasing


def stuck(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(1_000, loss=2.3, lr=0.1)
    curve.steps(600, loss=(2.3, 1.0), lr=0.1)


def test_a_loss_that_stays_where_it_began_is_told_behind_warmup(tmp_path: Path) -> None:
    found = same_however_cut(tmp_path, stuck, curves(LossNotDecreasing))
    one = only(found, "loss-not-decreasing")
    assert (one.severity, one.active) == ("ticket", False)
    assert 500 <= one.step <= 700
    assert one.evidence["loss"] == pytest.approx(2.3, rel=0.05)


def test_a_long_warmup_slow_learning_much_noise_and_better_validations_are_left_alone(tmp_path: Path) -> None:
    def warmup(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        for i in range(150):
            curve.steps(10, loss=2.3, lr=1e-5 * (i + 1))

    def slow(journal: JournalBuilder) -> None:
        Curve(journal).steps(1_500, loss=(2.3, 2.0))

    def noisy(journal: JournalBuilder) -> None:
        for value in np.random.default_rng(0).exponential(size=1_500).tolist():
            journal.step(loss=value)

    def validated(journal: JournalBuilder) -> None:
        for part in range(10):
            Curve(journal, seed=part).steps(150, loss=2.3)
            journal.validation(accuracy=0.1 + 0.05 * part)

    def at_once(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(20, loss=(2.3, 1.0))
        curve.steps(1_500, loss=1.0)

    for name, write in (("a", warmup), ("b", slow), ("c", noisy), ("d", validated), ("e", at_once)):
        assert codes(findings(tmp_path / name, write), "loss-not-decreasing") == [], name


def test_a_run_that_goes_on_from_a_checkpoint_has_learned_before(tmp_path: Path) -> None:
    def resumed(journal: JournalBuilder) -> None:
        Curve(journal).steps(1_000, loss=0.8)

    assert codes(findings(tmp_path / "a", resumed, first_step=50_000), "loss-not-decreasing") == []
    assert len(codes(findings(tmp_path / "b", resumed), "loss-not-decreasing")) == 1


def test_the_advice_looks_at_the_clip_first_where_an_sgd_is_clipped_at_every_step(tmp_path: Path) -> None:
    def clipped(journal: JournalBuilder) -> None:
        Curve(journal).steps(1_000, loss=2.3, clip_threshold=1e-3)

    assert "threshold" in only(findings(tmp_path, clipped), "loss-not-decreasing").advice


# -- loss-plateau


def plateau(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(300, loss=(2.3, 1.0))
    curve.steps(1_200, loss=1.0)
    curve.steps(300, loss=(1.0, 0.5))


def test_no_better_level_for_half_of_the_run_is_information(tmp_path: Path) -> None:
    found = same_however_cut(tmp_path, plateau, curves(LossPlateau))
    one = only(found, "loss-plateau")
    assert (one.severity, one.active) == ("info", False)
    assert 1_300 <= one.step < 1_500


# -- what is not there


def test_losses_that_are_not_logged_or_not_finite_are_no_curve(tmp_path: Path) -> None:
    def nothing(journal: JournalBuilder) -> None:
        for i in range(1_200):
            journal.step(loss=math.nan if i % 2 else math.inf)

    assert codes(findings(tmp_path, nothing), *LOSS) == []


def test_a_loss_that_is_logged_every_tenth_step_is_judged_too(tmp_path: Path) -> None:
    def sparse(journal: JournalBuilder) -> None:
        for i in range(2_400):
            level = 2.3 - i / 1_000 if i < 1_500 else 2.5
            journal.step(loss=level if i % 10 == 0 else math.nan)

    assert codes(findings(tmp_path, sparse), "loss-diverging") != []
