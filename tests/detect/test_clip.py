"""Findings over clipping: too often, never, and a threshold that was chosen for another training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradwatch.detect.clip_rate import ClipRateHigh
from gradwatch.detect.clip_review import ClipNeedsReview, ClipNever
from gradwatch.detect.curves import Curves
from gradwatch.detect.loss import LossDiverging
from gradwatch.testing import JournalBuilder
from tests.detect.support import ADAM, SGD, Curve, codes, findings, only, same_however_cut

CLIP = ("clip-rate-high", "clip-never", "clip-needs-review")


def rate_and_loss() -> Curves:
    return Curves((LossDiverging, ClipRateHigh))


def never() -> Curves:
    return Curves((ClipNever,))


# -- clip-rate-high


def warming(journal: JournalBuilder) -> None:
    """A rate that rises for 1,000 steps, and a clip that binds as long as it does."""
    curve = Curve(journal, noise=0.01)
    for i in range(100):
        curve.steps(10, loss=2.0, norm=3.0, clip_threshold=1.0, lr=1e-3 * (i + 1))
    curve.steps(600, loss=1.0, norm=0.5, clip_threshold=1.0, lr=0.1)


def test_nothing_is_judged_while_the_rate_rises(tmp_path: Path) -> None:
    assert codes(findings(tmp_path, warming), *CLIP) == []


@pytest.mark.parametrize(
    ("optimizer", "word"), [(SGD, "a lower learning rate"), (ADAM, "With AdamW a constant clip coefficient")]
)
def test_the_advice_says_what_clipping_does_to_the_optimizer(tmp_path: Path, optimizer: Any, word: str) -> None:
    def clipped(journal: JournalBuilder) -> None:
        Curve(journal).steps(600, loss=(2.0, 0.2), norm=3.0, clip_threshold=1.0)

    one = only(findings(tmp_path, clipped, optimizers=[optimizer]), "clip-rate-high")
    assert word in one.advice
    assert one.severity == "ticket"


def test_above_half_it_is_a_page_for_an_experiment_only_beside_a_finding_on_the_loss(tmp_path: Path) -> None:
    def diverging(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(500, loss=(2.0, 0.3), norm=3.0, clip_threshold=1.0)
        curve.steps(600, loss=2.0, norm=3.0, clip_threshold=1.0)

    found = same_however_cut(tmp_path, diverging, rate_and_loss)
    assert codes(found, "clip-rate-high") == [("clip-rate-high", "ticket", 399), ("clip-rate-high", "page", 599)]
    paged = next(f for f in found if f.severity == "page")
    assert paged.evidence["loss_findings"] == ["loss-diverging"]
    assert "loss-diverging" in paged.message


def test_between_budget_and_half_even_that_is_no_page(tmp_path: Path) -> None:
    def diverging(journal: JournalBuilder) -> None:
        for i in range(1_100):
            loss = 2.0 - 0.003 * i if i < 500 else 2.0
            journal.step(loss=loss, grad_norm=3.0 if i % 4 == 0 else 0.5, clip_threshold=1.0)

    assert {f.severity for f in findings(tmp_path, diverging) if f.code == "clip-rate-high"} == {"ticket"}


# -- clip-never


def unused(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(1_500, loss=(2.0, 0.5), norm=1.0, clip_threshold=100.0)
    curve.steps(1, norm=200.0, clip_threshold=100.0)
    curve.steps(20, norm=1.0, clip_threshold=100.0)


def test_a_threshold_far_above_everything_is_information_until_it_clips(tmp_path: Path) -> None:
    one = only(same_however_cut(tmp_path / "a", unused, never), "clip-never")
    assert (one.severity, one.active) == ("info", False)
    assert 1_000 <= one.step <= 1_100
    assert one.evidence["p99"] == pytest.approx(1.12, rel=0.05)
    assert "1.1" in one.advice

    def guard(journal: JournalBuilder) -> None:
        Curve(journal).steps(1_500, loss=(2.0, 0.5), norm=1.0, clip_threshold=5.0)

    def no_clip(journal: JournalBuilder) -> None:
        Curve(journal).steps(1_500, loss=(2.0, 0.5), norm=1.0)

    assert codes(findings(tmp_path / "b", guard), *CLIP) == []
    assert codes(findings(tmp_path / "c", no_clip), *CLIP) == []
    assert len(codes(findings(tmp_path / "d", guard, budgets={"clip-never": 2.0}), *CLIP)) == 1


# -- clip-needs-review


def attempts(root: Path, *settings: dict[str, Any], thresholds: tuple[float, ...] = ()) -> list[Any]:
    """A run of so many attempts, each with its settings; what is found in the end."""
    found: list[Any] = []
    for attempt, hyperparameters in enumerate(settings):
        threshold = thresholds[attempt] if thresholds else 5.0

        def write(journal: JournalBuilder) -> None:
            Curve(journal).steps(30, loss=(2.0, 1.0), norm=1.0, clip_threshold=threshold)  # noqa: B023

        found = findings(root, write, attempt=attempt, hyperparameters=hyperparameters)
    return [f for f in found if f.code == "clip-needs-review"]


def test_another_batch_size_in_a_later_attempt_asks_for_a_review(tmp_path: Path) -> None:
    small, large = {"config.batch_size": 32, "config.data.dataset": "v3"}, {"config.batch_size": 256}
    [one] = attempts(tmp_path / "a", small, small | large)
    assert (one.severity, one.attempt, one.active) == ("info", 1, True)
    assert one.evidence["changed"] == {"config.batch_size": {"before": 32, "now": 256}}
    assert attempts(tmp_path / "b", small, small) == []
    assert attempts(tmp_path / "c", small, small | large, thresholds=(5.0, 2.0)) == []
    assert attempts(tmp_path / "d", small, small | {"config.epochs": 90, "config.batch_size": 33}) == []
    [text] = attempts(tmp_path / "e", small, small | {"config.data.dataset": "v4"})
    assert "v4" in text.message


def test_what_the_threshold_was_chosen_with_may_be_declared(tmp_path: Path) -> None:
    settings = {"config.batch_size": 256, "config.max_norm_chosen_with.batch_size": 32}
    [one] = attempts(tmp_path / "a", settings)
    assert one.evidence["changed"]["config.batch_size"] == {"before": 32, "now": 256}
    assert attempts(tmp_path / "b", settings | {"config.batch_size": 32}) == []


def changing(journal: JournalBuilder) -> None:
    """Settings that are told late, changed, and answered with another threshold."""
    curve = Curve(journal)
    curve.steps(20, norm=1.0, clip_threshold=5.0)
    journal.event("metadata", values={"accumulation.observed": 1})
    curve.steps(20, norm=1.0, clip_threshold=5.0)
    journal.event("metadata", values={"accumulation.observed": 8})
    curve.steps(20, norm=1.0, clip_threshold=5.0)
    curve.steps(20, norm=1.0, clip_threshold=2.0)
    journal.event("metadata", values={"accumulation.observed": 8})
    curve.steps(20, norm=1.0, clip_threshold=2.0)


def test_a_change_within_the_run_is_told_once_and_over_with_another_threshold(tmp_path: Path) -> None:
    one = only(same_however_cut(tmp_path, changing, ClipNeedsReview), "clip-needs-review")
    assert (one.step, one.active) == (40, False)
    assert one.evidence["changed"] == {"accumulation.observed": {"before": 1, "now": 8}}
