"""``underfitting`` and ``leakage-suspected``: what the two losses say together. Information, each common in health."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Final

from gradwatch.collect.model import Finding, Validation
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import budget, found

IN_A_ROW: Final = 3
MAX_SLICES: Final = 50
#: Change from one validation to the next below which a training loss is at rest.
AT_REST: Final = 0.05
_KEPT: Final = 6


class _BothLosses(ABC):
    """Watches pairs of training and validation loss, slice by slice; tells what holds three times in a row."""

    code = ""

    def __init__(self) -> None:
        #: slice -> (training, validation) of the last validations; the first one of all stays in front.
        self._pairs: dict[str, list[tuple[float, float]]] = {}
        self._counts: dict[str, int] = {}

    @property
    def codes(self) -> tuple[str, ...]:
        return (self.code,)

    def observe(self, seen: Observation) -> list[Finding]:
        return [finding for validation in seen.told.validations for finding in self._judge(seen, validation)]

    def _judge(self, seen: Observation, validation: Validation) -> list[Finding]:
        training, loss = validation.training.get("loss"), validation.metrics.get("loss")
        if training is None or loss is None or not math.isfinite(training) or not math.isfinite(loss):
            return []
        name = validation.slice
        if name not in self._pairs and len(self._pairs) >= MAX_SLICES:
            return []
        pairs = self._pairs.setdefault(name, [])
        pairs.append((training, loss))
        if len(pairs) > _KEPT:
            del pairs[1]
        count = self._counts.get(name, 0)
        why = self._holds(seen, pairs)
        self._counts[name] = count + 1 if why else 0
        where = f" on slice {name!r}" if name else ""
        evidence = {
            "step": validation.step,
            "metric": "loss",
            "slice": name,
            "training": training,
            "validation": loss,
            "training_at_first": pairs[0][0],
            "validation_at_first": pairs[0][1],
        }
        at: dict[str, Any] = {"step": validation.step, "time": validation.time, "evidence": evidence}
        if why and count + 1 == IN_A_ROW:
            return [found(self.code, seen, message=f"In three validations{where}: {why}.", **at)]
        if not why and count >= IN_A_ROW:
            message = f"No longer{where}: the training loss is {training:.4g}, the validation loss {loss:.4g}."
            return [found(self.code, seen, message=message, active=False, **at)]
        return []

    @abstractmethod
    def _holds(self, seen: Observation, pairs: list[tuple[float, float]]) -> str:
        """What is the matter, in words; "" where nothing is."""

    def to_state(self) -> dict[str, Any]:
        return {"pairs": self._pairs, "counts": self._counts}

    def restore(self, state: dict[str, Any]) -> None:
        self._pairs = {
            name: [(float(training), float(loss)) for training, loss in pairs] for name, pairs in state["pairs"].items()
        }
        self._counts = {name: int(count) for name, count in state["counts"].items()}


class Underfitting(_BothLosses):
    """The model has learned little of the training data, and learns no more.

    Over three validations in a row: the training loss is above 70 % (budget) of
    that of the first validation's span, moved by less than 5 % between two
    validations, and validation is worse by less than 5 %. Six validations at the
    least. Information: data that is noise to nine tenths looks the same, as do
    returns to a loss that pretraining has learned. Source: Goodfellow, Bengio &
    Courville (2016), *Deep Learning*, § 5.2.
    """

    code = "underfitting"
    LEFT: Final = 0.7
    GAP: Final = 0.05

    def _holds(self, seen: Observation, pairs: list[tuple[float, float]]) -> str:
        if len(pairs) < _KEPT:
            return ""
        (first, _), (before, _), (training, validation) = pairs[0], pairs[-2], pairs[-1]
        left = budget(seen, self.code, self.LEFT)
        high = first > 0 and training > left * first
        if not high or not at_rest(before, training) or validation - training > self.GAP * abs(training):
            return ""
        return (
            f"the training loss rests at {training:.4g}, {training / first:.0%} of what it was at the first "
            f"validation, and validation ({validation:.4g}) is no worse"
        )


class LeakageSuspected(_BothLosses):
    """Validation is better than it can honestly be.

    Over three validations in a row, either the validation loss is below the
    training loss by more than 20 % (budget) while the training loss is at rest
    (it moved by less than 5 % between two validations; a mean over a falling
    curve lags behind), or both losses have fallen below 5 % of the first
    validation's with no more than 10 % between them: hardly anything that is
    worth learning is learned without a gap. Dropout and augmentation, which are
    off in validation, explain some of the former; easy data the latter:
    information. Source: Kaufman et al. (2012), *Leakage in Data Mining*.
    """

    code = "leakage-suspected"
    BETTER: Final = 0.2
    PERFECT: Final = 0.05
    GAP: Final = 0.1

    def _holds(self, seen: Observation, pairs: list[tuple[float, float]]) -> str:
        if len(pairs) < IN_A_ROW:
            return ""
        (_, first), (before, _), (training, validation) = pairs[0], pairs[-2], pairs[-1]
        better = training - validation > budget(seen, self.code, self.BETTER) * abs(training)
        if better and at_rest(before, training):
            return f"the validation loss of {validation:.4g} is far below the training loss of {training:.4g}"
        perfect = first > 0 and max(training, validation) < self.PERFECT * first
        if perfect and abs(validation - training) <= self.GAP * abs(training):
            return (
                f"training and validation loss ({training:.3g}, {validation:.3g}) are both below "
                f"{self.PERFECT:.0%} of the first validation's {first:.4g}, with hardly a gap"
            )
        return ""


def at_rest(before: float, now: float) -> bool:
    """Whether a loss has hardly moved from one validation to the next."""
    return abs(now - before) <= AT_REST * max(abs(before), abs(now))
