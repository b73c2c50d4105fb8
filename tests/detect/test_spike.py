"""``gradient-spike`` where its past is short or holds another spike, and what its advice knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.detect.spike import FEWEST, GradientSpike
from gradwatch.testing import JournalBuilder
from tests.detect.support import ADAM, SGD, codes, findings, only, same_however_cut

CODE = "gradient-spike"


def quiet(journal: JournalBuilder, count: int, loss: float = 1.0, **fields: float) -> None:
    for norm in np.random.default_rng(count).lognormal(sigma=0.1, size=count).tolist():
        journal.step(**({"grad_norm": norm, "loss": loss, "clip_threshold": 5.0} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "norm", "expected"),
    [(FEWEST - 1, 100.0, 0), (FEWEST + 2, 3.0, 0), (FEWEST + 2, 20.0, 1), (150, 3.0, 1)],
)
def test_a_short_past_takes_a_plainer_spike(tmp_path: Path, before: int, norm: float, expected: int) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, before)
        quiet(journal, 1, grad_norm=norm)
        quiet(journal, 40)

    assert len(codes(same_however_cut(tmp_path, write, GradientSpike))) == expected


def test_losses_behind_a_spike_are_no_past_of_the_next_one(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 300)
        quiet(journal, 1, grad_norm=500.0)
        quiet(journal, 20, loss=3.0)
        quiet(journal, 8)
        quiet(journal, 1, grad_norm=500.0)
        quiet(journal, 40, loss=2.0)

    assert codes(same_however_cut(tmp_path, write, GradientSpike)) == [
        (CODE, "info", 300),
        (CODE, "ticket", 320),
        (CODE, "info", 329),
        (CODE, "ticket", 349),
    ]


@pytest.mark.parametrize(("optimizer", "word"), [(SGD, "as many times larger"), (ADAM, "beta2")])
def test_the_advice_knows_what_an_unclipped_spike_did(tmp_path: Path, optimizer: Any, word: str) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 300, clip_threshold=1e9)
        quiet(journal, 1, grad_norm=500.0, clip_threshold=1e9)

    one = only(findings(tmp_path, write, optimizers=[optimizer]), CODE)
    assert (one.severity, one.active) == ("ticket", True)
    assert word in one.advice


def test_the_budget_of_a_run_counts(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 300)
        quiet(journal, 1, grad_norm=10.0)

    assert len(codes(findings(tmp_path / "a", write), CODE)) == 1
    assert codes(findings(tmp_path / "b", write, budgets={CODE: 1_000.0}), CODE) == []
