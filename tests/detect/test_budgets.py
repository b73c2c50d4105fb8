"""Budgets that a run sets for health findings, from ``watch`` to the detectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch.catalog import FINDINGS
from gradwatch.detect.ledger import DETECTORS
from gradwatch.testing import JournalBuilder
from tests.detect.support import findings, only

DOCS = Path(__file__).parents[2] / "docs" / "findings"


def watch(root: Path, **arguments: Any) -> gradwatch.Run:
    model = torch.nn.Linear(2, 1)
    return gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), root=root, **arguments)


def test_budgets_are_in_the_manifest_under_the_codes(tmp_path: Path) -> None:
    with watch(tmp_path, budgets={"overfitting": 0.1, "loss-spike": 6}, clip_rate_budget=0.2) as run:
        assert run._session is not None
        budgets = run._session.writer.manifest.budgets
    assert budgets == {"overfitting": 0.1, "loss-spike": 6.0, "clip_rate": 0.2, "generalization_gap": {}}


@pytest.mark.parametrize(
    ("budgets", "words"),
    [
        ({"overfiting": 0.1}, "did you mean 'overfitting'"),
        ({"clip-missing": 1.0}, "no health finding"),
        ({"clip-rate-high": 0.2}, "clip_rate_budget"),
        ({"generalization-gap": 0.2}, "generalization_gap_budget"),
        ({"overfitting": -1.0}, r"budgets\['overfitting'\]"),
        ({"overfitting": "much"}, "expected a number"),
        ([("overfitting", 0.1)], "expected a mapping"),
    ],
)
def test_a_wrong_budget_is_refused_at_once_in_words(tmp_path: Path, budgets: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        watch(tmp_path, budgets=budgets)


@pytest.mark.parametrize("told", [{}, {"loss": 0.1}])
def test_a_gap_is_a_ticket_only_where_the_run_has_set_its_budget(tmp_path: Path, told: dict[str, float]) -> None:
    def write(journal: JournalBuilder) -> None:
        for _ in range(4):
            journal.step()
            journal.validation(loss=1.5, train={"loss": 1.0})

    for tier in ("experiment", "production"):
        found = findings(tmp_path / tier, write, budgets={"generalization_gap": told}, tier=tier)
        expected = "info" if not told else "page" if tier == "production" else "ticket"
        assert only(found, "generalization-gap").severity == expected


@pytest.mark.parametrize("value", ["much", True, float("nan"), -1.0, [1.0]])
def test_a_budget_that_is_none_counts_as_not_set(tmp_path: Path, value: Any) -> None:
    def write(journal: JournalBuilder) -> None:
        for i in range(10):
            journal.step(loss=1.0)
            journal.validation(loss=0.5 if i < 4 else 1.0, train={"loss": 1.0 - 0.05 * i})

    assert only(findings(tmp_path, write, budgets={"overfitting": value}), "overfitting").severity == "ticket"


def test_every_health_finding_has_a_page_that_says_what_is_checked(tmp_path: Path) -> None:
    told = {code for make in DETECTORS for code in make().codes}
    for finding in FINDINGS:
        if finding.kind == "health" and finding.code in told:
            page = (DOCS / f"{finding.code}.md").read_text()
            assert "## What is checked" in page, finding.code
            assert "## Evidence" in page, finding.code
