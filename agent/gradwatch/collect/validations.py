"""Validations: their gap to training, and how often in a row it was above budget.

The **generalization gap** of a metric is (validation − training) / |training|
for what should be low, and the negative of it for scores, so positive means
worse on validation. The training value is the mean over the steps since the
last validation, or what was logged beside the validation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gradwatch.collect.model import Validation
from gradwatch.journal.manifest import clean_text

#: Names that say that lower is better; everything else is a score, unless the loop says otherwise.
_LOWER_IS_BETTER: Final = re.compile(
    r"(^|[_./ -])(loss|nll|ce|bce|error|err|mae|mse|rmse|mape|perplexity|ppl|wer|cer|brier|ece|fid|regret)($|[_./ -])",
    re.IGNORECASE,
)
#: The gap that a run tolerates where it does not say.
DEFAULT_GAP_BUDGET: Final = 0.1
MAX_METRICS: Final = 32
MAX_SLICES: Final = 50
_SMALLEST: Final = 1e-12


def is_better_high(name: str, told: Mapping[str, Any]) -> bool:
    """Whether a metric is a score, by what the loop said or else by its name."""
    value = told.get(name)
    return value if isinstance(value, bool) else _LOWER_IS_BETTER.search(name) is None


def gap(validation: float, training: float, better_high: bool) -> float | None:
    """Relative gap, positive when validation is worse; None where it has no meaning."""
    if not math.isfinite(validation) or not math.isfinite(training) or abs(training) < _SMALLEST:
        return None
    relative = (validation - training) / abs(training)
    return -relative if better_high else relative


def gap_budget(budgets: Mapping[str, Any], metric: str) -> float:
    """A run's budget for the gap of a metric, from its manifest."""
    value = _told_gap_budget(budgets, metric)
    return DEFAULT_GAP_BUDGET if value is None else value


def has_own_gap_budget(budgets: Mapping[str, Any], metric: str) -> bool:
    """Whether the run has set a budget for the gap of a metric."""
    return _told_gap_budget(budgets, metric) is not None


def _told_gap_budget(budgets: Mapping[str, Any], metric: str) -> float | None:
    told = budgets.get("generalization_gap")
    value = told.get(metric, told.get("*", told.get("default"))) if isinstance(told, dict) else told
    sane = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if sane and value is not None else None


@dataclass(slots=True)
class Score:
    """The last value of a metric in a slice."""

    value: float
    training: float | None = None
    gap: float | None = None
    over_budget: int = 0


class Validations:
    """What was validated so far, by metric and slice."""

    def __init__(self) -> None:
        self.count = 0
        self.last: dict[tuple[str, str], Score] = {}
        self._training: dict[str, float] = {}
        self._training_row = -1
        self._loss_sum, self._loss_count = 0.0, 0

    def add_losses(self, total: float, count: int) -> None:
        """Training losses since the last call, for a loop that logs nothing beside its validations."""
        self._loss_sum += total
        self._loss_count += count

    def needs_losses(self, event: Mapping[str, Any]) -> bool:
        """Whether this validation is compared with losses of the rows, which must all be known then: the loop logged
        none beside it, and no other slice was validated at the same row."""
        beside, metrics = event.get("train"), event.get("metrics")
        told = isinstance(beside, dict) and "loss" in beside
        validated = isinstance(metrics, dict) and "loss" in metrics
        return validated and not told and event.get("row") != self._training_row

    def add(self, event: Mapping[str, Any], attempt: int, budgets: Mapping[str, Any]) -> Validation | None:
        """Take in a validation event; None where it holds no number."""
        metrics = _numbers(event.get("metrics"))
        if not metrics:
            return None
        self.count += 1
        told = event.get("higher_is_better")
        told = told if isinstance(told, dict) else {}
        slice_ = clean_text(event["slice"], 100) if isinstance(event.get("slice"), str) else ""
        self._note_training(event)
        gaps = {}
        for name, value in metrics.items():
            key = (name, slice_)
            if key not in self.last and not self._room(slice_):
                continue
            training = self._training.get(name)
            distance = None if training is None else gap(value, training, is_better_high(name, told))
            before = self.last.get(key)
            over = 0 if before is None else before.over_budget
            if distance is not None:
                gaps[name] = distance
                over = over + 1 if distance > gap_budget(budgets, name) else 0
            self.last[key] = Score(value, training, distance, over)
        return Validation(
            step=_step(event),
            attempt=attempt,
            time=_time(event),
            slice=slice_,
            metrics=metrics,
            gaps=gaps,
            training={name: self._training[name] for name in metrics if name in self._training},
        )

    def _note_training(self, event: Mapping[str, Any]) -> None:
        """Slices of one validation share its training values: the probe hands them out once."""
        train, row = _numbers(event.get("train")), event.get("row")
        if not train and row == self._training_row:
            return
        if "loss" not in train and self._loss_count:
            train["loss"] = self._loss_sum / self._loss_count
        self._loss_sum, self._loss_count = 0.0, 0
        self._training = train
        self._training_row = row if isinstance(row, int) else -1

    def _room(self, slice_: str) -> bool:
        slices = {known for _, known in self.last}
        return len(self.last) < MAX_METRICS * MAX_SLICES and (slice_ in slices or len(slices) < MAX_SLICES)

    def to_state(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "last": [
                [*key, score.value, score.training, score.gap, score.over_budget] for key, score in self.last.items()
            ],
            "training": self._training,
            "training_row": self._training_row,
            "loss": [self._loss_sum, self._loss_count],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Validations:
        self = cls()
        self.count = int(state["count"])
        self.last = {(item[0], item[1]): Score(*item[2:]) for item in state["last"]}
        self._training, self._training_row = dict(state["training"]), int(state["training_row"])
        self._loss_sum, self._loss_count = state["loss"]
        return self


def _numbers(mapping: object) -> dict[str, float]:
    if not isinstance(mapping, dict):
        return {}
    kept = {}
    for name, value in list(mapping.items())[:MAX_METRICS]:
        if (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300) or value != value:
            kept[clean_text(name, 100)] = float(value)
    return kept


def _step(event: Mapping[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) and -1 <= step < 2**53 else -1


def _time(event: Mapping[str, Any]) -> float:
    time = event.get("time")
    return float(time) if isinstance(time, int | float) and math.isfinite(time) else 0.0
