"""Findings over the gradient norm's regime: exploding and saturated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradwatch.detect.curves import Curves
from gradwatch.detect.gradient import GradientExploding, Saturated
from gradwatch.testing import JournalBuilder
from tests.detect.support import ADAM, SGD, Curve, codes, findings, only, same_however_cut

BOTH = ("gradient-exploding", "saturated")


def both() -> Curves:
    return Curves((GradientExploding, Saturated))


def exploding(journal: JournalBuilder) -> None:
    curve = Curve(journal, noise=0.2)
    curve.steps(300, loss=(2.0, 1.0), norm=1.0)
    curve.steps(100, loss=2.0, norm=30.0)
    curve.steps(100, loss=1.0, norm=1.0)


@pytest.mark.parametrize(("optimizer", "word"), [(SGD, "of the SGD bounded|p99"), (ADAM, "second moment")])
def test_a_regime_of_ten_times_the_norm_with_a_worse_loss(tmp_path: Path, optimizer: Any, word: str) -> None:
    found = same_however_cut(tmp_path, exploding, both, optimizers=[optimizer])
    one = only(found, "gradient-exploding")
    assert (one.severity, one.step, one.active) == ("ticket", 319, False)
    assert one.evidence["grad_norm"] == pytest.approx(30.0, rel=0.2)
    assert one.evidence["grad_norm_before"] == pytest.approx(1.0, rel=0.1)
    assert any(part in one.advice for part in word.split("|"))


def test_learning_that_begins_warm_restarts_and_single_spikes_do_not_explode(tmp_path: Path) -> None:
    def begins(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(300, loss=2.3, norm=0.01)
        curve.steps(300, loss=(2.3, 0.5), norm=(0.2, 1.0))

    def restart(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(200, loss=(2.3, 0.5), norm=1.0)
        curve.steps(300, loss=(0.5, 0.01), norm=(1.0, 0.01))
        curve.steps(300, loss=0.01, norm=0.01)
        curve.steps(200, loss=0.3, norm=1.0)

    def spikes(journal: JournalBuilder) -> None:
        for _ in range(10):
            Curve(journal).steps(60, norm=1.0)
            Curve(journal).steps(4, norm=100.0)

    for name, write in (("a", begins), ("b", restart), ("c", spikes)):
        assert codes(findings(tmp_path / name, write), *BOTH) == [], name


def test_without_a_loss_it_takes_thirty_times(tmp_path: Path) -> None:
    def rise(journal: JournalBuilder, factor: float) -> None:
        nan = float("nan")
        Curve(journal).steps(300, loss=nan, norm=1.0)
        Curve(journal).steps(100, loss=nan, norm=factor)

    for name, factor, expected in (("a", 20.0, 0), ("b", 50.0, 1)):
        found = findings(tmp_path / name, lambda journal: rise(journal, factor))  # noqa: B023
        assert len(codes(found, *BOTH)) == expected


def test_a_regime_that_stays_becomes_the_past(tmp_path: Path) -> None:
    def stays(journal: JournalBuilder) -> None:
        Curve(journal).steps(300, loss=1.0, norm=1.0)
        Curve(journal).steps(500, loss=2.0, norm=50.0)
        Curve(journal).steps(100, loss=4.0, norm=2_000.0)

    assert codes(findings(tmp_path, stays), "gradient-exploding") == [
        ("gradient-exploding", "ticket", 319),
        ("gradient-exploding", "ticket", 819),
    ]


# -- saturated


def saturated(journal: JournalBuilder) -> None:
    curve = Curve(journal)
    curve.steps(300, loss=(2.3, 1.0), norm=1.0)
    curve.steps(200, loss=2.3, norm=0.001)
    curve.steps(100, loss=1.0, norm=1.0)


def test_a_network_that_is_stuck_is_told_from_one_that_is_done(tmp_path: Path) -> None:
    found = same_however_cut(tmp_path / "stuck", saturated, both)
    one = only(found, "saturated")
    assert (one.severity, one.step, one.active) == ("ticket", 349, False)
    assert one.evidence["grad_norm"] == pytest.approx(0.001, rel=0.2)

    def done(journal: JournalBuilder) -> None:
        curve = Curve(journal)
        curve.steps(300, loss=(2.3, 1.0), norm=1.0)
        curve.steps(300, loss=0.3, norm=0.001)

    assert codes(findings(tmp_path / "done", done), *BOTH) == []


def test_gradients_of_exactly_zero_count(tmp_path: Path) -> None:
    def dead(journal: JournalBuilder) -> None:
        Curve(journal).steps(300, loss=(2.3, 1.0), norm=1.0)
        for _ in range(100):
            journal.step(loss=2.3, grad_norm=0.0)

    assert len(codes(findings(tmp_path, dead), "saturated")) == 1


def test_the_budgets_of_a_run_count(tmp_path: Path) -> None:
    budgets = {"gradient-exploding": 100.0, "saturated": 1e6}
    assert codes(findings(tmp_path / "a", exploding, budgets=budgets), *BOTH) == []
    assert codes(findings(tmp_path / "b", saturated, budgets=budgets), *BOTH) == []
