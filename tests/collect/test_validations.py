"""The generalization gap: its sign, its budget, and what it is compared with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gradwatch.collect.model import Validation
from gradwatch.collect.validations import Validations, gap, gap_budget, is_better_high
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, offer, read_on


@pytest.mark.parametrize(
    ("name", "higher"),
    [("loss", False), ("val/loss", False), ("perplexity", False), ("rmse", False), ("accuracy", True), ("auc", True),
     ("f1", True), ("glossary_hits", True), ("error_rate", False)],
)  # fmt: skip
def test_names_say_which_way_is_better(name: str, higher: bool) -> None:
    assert is_better_high(name, {}) is higher
    assert is_better_high(name, {name: not higher}) is not higher


def test_a_gap_is_positive_where_validation_is_worse() -> None:
    assert gap(1.2, 1.0, better_high=False) == pytest.approx(0.2)
    assert gap(0.8, 1.0, better_high=True) == pytest.approx(0.2)
    assert gap(-0.8, -1.0, better_high=False) == pytest.approx(0.2)
    assert gap(1.2, 0.0, better_high=False) is None
    assert gap(math.nan, 1.0, better_high=False) is None


def test_budgets_by_name_for_all_and_by_default() -> None:
    assert gap_budget({"generalization_gap": {"loss": 0.3, "*": 0.2}}, "loss") == 0.3
    assert gap_budget({"generalization_gap": {"loss": 0.3, "*": 0.2}}, "auc") == 0.2
    assert gap_budget({"generalization_gap": 0.05}, "auc") == 0.05
    assert gap_budget({"generalization_gap": "much"}, "auc") == 0.1


def event(row: int, train: dict[str, float] | None = None, slice_: str = "", **metrics: float) -> dict[str, object]:
    return {"kind": "validation", "row": row, "step": row - 1, "time": 1.0, "slice": slice_, "metrics": metrics} | (
        {"train": train} if train else {}
    )


def test_slices_of_one_validation_share_the_training_value() -> None:
    validations = Validations()
    budgets = {"generalization_gap": 0.1}
    first = validations.add(event(10, {"loss": 1.0}, loss=1.05), 0, budgets)
    again = validations.add(event(10, None, "tenant-7", loss=1.5), 0, budgets)
    assert first is not None
    assert again is not None
    assert first.gaps == pytest.approx({"loss": 0.05})
    assert again.gaps == pytest.approx({"loss": 0.5})
    assert validations.last["loss", ""].over_budget == 0
    assert validations.last["loss", "tenant-7"].over_budget == 1
    later = validations.add(event(20, None, loss=1.5), 0, budgets)
    assert later is not None
    assert later.gaps == {}


def test_validations_in_a_row_above_budget_are_counted_until_one_is_within() -> None:
    validations = Validations()
    seen = []
    for row, loss in enumerate((1.2, 1.3, 1.0, 1.4), 1):
        validations.add(event(row, {"loss": 1.0}, loss=loss), 0, {"generalization_gap": 0.1})
        validations = Validations.from_state(json.loads(json.dumps(validations.to_state())))
        seen.append(validations.last["loss", ""].over_budget)
    assert seen == [1, 2, 0, 1]


@pytest.mark.parametrize("polls", [1, 7])
def test_without_a_logged_training_loss_it_is_the_mean_since_the_last_validation(tmp_path: Path, polls: int) -> None:
    """The same gaps whether the journal is read as it grows or all at once."""
    clock = FakeClock()
    run = follow(tmp_path, clock=clock)
    losses = [1.0 / (i + 1) for i in range(60)]
    seen: list[Validation] = []
    with JournalBuilder(tmp_path, clock=clock) as journal:
        for i, loss in enumerate(losses):
            journal.step(loss=loss)
            if i in (19, 49):
                journal.validation(loss=0.5)
            if polls > 1 and i % polls == 0:
                offer(run, tmp_path)
                for observation in read_on(run):
                    seen += observation.told.validations
    offer(run, tmp_path)
    for observation in read_on(run, clock):
        seen += observation.told.validations
    means = [sum(losses[:20]) / 20, sum(losses[20:50]) / 30]
    assert [v.step for v in seen] == [19, 49]
    assert [v.training["loss"] for v in seen] == pytest.approx(means)
    assert [v.gaps["loss"] for v in seen] == pytest.approx([(0.5 - m) / m for m in means])
