"""Findings over training and validation loss together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gradwatch.detect.fitting import LeakageSuspected, Underfitting
from gradwatch.detect.overfitting import Overfitting
from gradwatch.journal.manifest import Optimizer
from gradwatch.testing import JournalBuilder
from tests.detect.support import Write, codes, findings, only, same_however_cut

VALIDATED = ("overfitting", "underfitting", "leakage-suspected")


def validations(pairs: Sequence[tuple[float, float]], slice: str = "") -> Write:
    """Training and validation loss, ten steps for each validation."""

    def write(journal: JournalBuilder) -> None:
        for training, validation in pairs:
            for _ in range(10):
                journal.step(loss=training)
            journal.validation(loss=validation, train={"loss": training}, slice=slice)

    return write


#: Training falls on; validation turns at the eighth.
TURNED = [(2.0 * 0.8**i, 2.0 * 0.8 ** min(i, 8) * (1.0 + 0.06 * max(0, i - 8))) for i in range(16)]


def test_a_validation_loss_that_rises_while_training_falls(tmp_path: Path) -> None:
    def recovers(journal: JournalBuilder) -> None:
        validations(TURNED)(journal)
        validations([(0.05, 0.3)] * 4)(journal)

    found = same_however_cut(tmp_path, recovers, Overfitting)
    one = only(found, "overfitting")
    assert (one.severity, one.active) == ("ticket", False)
    assert one.evidence["best"] == pytest.approx(
        min(float(np.median([v for _, v in TURNED[i : i + 3]])) for i in range(14))
    )
    assert f"step {one.evidence['best_step']}" in one.advice


def test_it_is_told_with_the_third_validation_whose_median_is_above_the_best(tmp_path: Path) -> None:
    losses = [validation for _, validation in TURNED]
    medians = [float(np.median(losses[i - 2 : i + 1])) for i in range(2, 16)]
    lowest = 2 + int(np.argmin(medians))
    found = only(findings(tmp_path, validations(TURNED)), "overfitting")
    assert found.evidence["best_step"] == lowest * 10 + 9
    rise = max(0.05 * min(medians), 3 * found.evidence["noise"], 0.01 * losses[0])
    above = [i for i in range(lowest, 16) if medians[i - 2] - min(medians) > rise]
    assert found.step == above[2] * 10 + 9


def test_adam_with_coupled_decay_is_told_to_use_adamw(tmp_path: Path) -> None:
    adam = Optimizer("default", "Adam", False, ({"name": "", "lr": 1e-3, "weight_decay": 0.01},))
    settings = {"optimizer.default.decay": "coupled"}
    found = findings(tmp_path, validations(TURNED), optimizers=[adam], hyperparameters=settings)
    assert "AdamW" in only(found, "overfitting").advice


def test_a_steady_gap_noise_and_a_training_loss_that_rises_too_are_left_alone(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(size=40)
    gap = [(0.8 + 1.0 * 0.8**i, 1.2 + 1.0 * 0.8**i) for i in range(30)]
    noisy = [(0.5 + 0.5 * 0.9**i, 1.0 * (1 + 0.08 * float(noise[i]))) for i in range(40)]
    both = [(2.0 * 0.8 ** min(i, 8) * (1.0 + 0.1 * max(0, i - 8)),) * 2 for i in range(16)]
    harder = [(1.0 + 0.01 * i, 1.0 + 0.05 * i) for i in range(16)]
    for name, pairs in (("gap", gap), ("noisy", noisy), ("both", both), ("harder", harder)):
        assert codes(findings(tmp_path / name, validations(pairs)), "overfitting") == [], name


def test_slices_are_judged_apart_and_budgets_count(tmp_path: Path) -> None:
    healthy = [(training, training * 1.05) for training, _ in TURNED]

    def write(journal: JournalBuilder) -> None:
        for (training, good), (_, bad) in zip(healthy, TURNED):
            for _ in range(10):
                journal.step(loss=training)
            journal.validation(loss=good, train={"loss": training})
            journal.validation(loss=bad, slice="tenant-7")

    one = only(findings(tmp_path / "a", write), "overfitting")
    assert one.evidence["slice"] == "tenant-7"
    assert codes(findings(tmp_path / "b", write, budgets={"overfitting": 1.0}), "overfitting") == []


def test_validations_without_a_number_or_a_training_loss_are_passed_over(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        for i in range(12):
            journal.step()
            journal.validation(loss=math.nan if i % 2 else 1.0 + i)

    assert codes(findings(tmp_path, write), *VALIDATED) == []


# -- information


def test_underfitting_is_a_loss_that_rests_high_without_a_gap(tmp_path: Path) -> None:
    pairs = [(2.3 - 0.02 * min(i, 5), 2.3 - 0.02 * min(i, 5)) for i in range(10)] + [(1.0, 1.0)]
    one = only(same_however_cut(tmp_path / "a", validations(pairs), Underfitting), "underfitting")
    assert (one.severity, one.active) == ("info", False)
    learned = [(2.3 * 0.7**i + 0.2, 2.3 * 0.7**i + 0.2) for i in range(12)]
    gap = [(2.3, 2.3 + 0.1 * i) for i in range(12)]
    assert codes(findings(tmp_path / "b", validations(learned)), "underfitting") == []
    assert codes(findings(tmp_path / "c", validations(gap)), "underfitting") == []
    falling = [(2.3 * 0.93**i, 2.3 * 0.93**i) for i in range(12)]
    assert codes(findings(tmp_path / "d", validations(falling), budgets={"underfitting": 0.2}), "underfitting") == []


def test_leakage_is_suspected_where_validation_is_much_better_or_all_is_too_good(tmp_path: Path) -> None:
    better = [(1.0, 0.6)] * 6 + [(1.0, 1.0)]
    one = only(same_however_cut(tmp_path / "a", validations(better), LeakageSuspected), "leakage-suspected")
    assert (one.severity, one.step, one.active) == ("info", 49, False)
    perfect = [(2.3 * 0.3**i, 2.3 * 0.3**i) for i in range(10)]
    assert len(codes(findings(tmp_path / "b", validations(perfect)), "leakage-suspected")) == 1
    # Training means lag behind a curve that falls, and dropout costs training some.
    lagging = [(2.3 * 0.7**i, 2.3 * 0.7 ** (i + 1)) for i in range(8)]
    dropout = [(1.0, 0.88)] * 8
    memorised = [(2.3 * 0.3**i, 0.5 + 2.3 * 0.3**i) for i in range(10)]
    for name, pairs in (("c", lagging), ("d", dropout), ("e", memorised)):
        assert codes(findings(tmp_path / name, validations(pairs)), "leakage-suspected") == [], name
