"""``clip-never`` and ``clip-needs-review``: a threshold that guards nothing, or was chosen for another training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.collect.packed import pack, unpack
from gradwatch.collect.rows import F64, Rows
from gradwatch.collect.run import Observation
from gradwatch.detect.curves import Moment
from gradwatch.detect.detector import budget, found
from gradwatch.journal.manifest import Scalar, scalars

_STEPS: Final = 1_000


class ClipNever:
    """The threshold is so far above the norms that it would let any spike through.

    Nothing was clipped in the last 1,000 steps behind warmup, and the threshold
    is above 10 × (budget) the 99th percentile of their pre-clip norms. Judged at
    every 1,000th step. Over with the first clipped step. Information: a guard
    that never acts costs nothing, but does not do what it is there for.
    """

    code = "clip-never"
    FACTOR: Final = 10.0

    def __init__(self) -> None:
        self._norms: F64 = np.empty(0)
        self._steps = 0
        self._active = False

    def begin(self) -> None:
        self._norms, self._steps = np.empty(0), 0

    def judge(self, now: Moment) -> list[Finding]:
        block = now.block
        if block.clipped:
            self.begin()
            if not self._active:
                return []
            self._active = False
            message = f"{block.clipped} of the last ten steps were clipped."
            return now.found(self.code, message, {"clipped": block.clipped}, active=False)
        if math.isnan(block.threshold) or not now.past.warmup.over or self._active:
            return []
        self._steps += len(block.norms)
        self._norms = np.concatenate([self._norms, block.norms])
        if self._steps < _STEPS:
            return []
        p99 = float(np.quantile(self._norms, 0.99))
        self.begin()
        if not 0 < p99 * budget(now.seen, self.code, self.FACTOR) < block.threshold < math.inf:
            return []
        self._active = True
        message = (
            f"No step of the last {_STEPS} was clipped: the threshold is {block.threshold:.4g}, and 99 in 100 "
            f"gradient norms are below {p99:.4g}."
        )
        evidence = {"clip_threshold": block.threshold, "p99": p99, "factor": block.threshold / p99}
        advice = f"For a guard that acts on outliers alone, set max_norm to about the p99 of healthy norms: {p99:.3g}."
        return now.found(self.code, message, evidence, advice=advice)

    def to_state(self) -> Any:
        return [pack(self._norms), self._steps, self._active]

    def restore(self, state: Any) -> None:
        self._norms, self._steps, self._active = unpack(state[0]), int(state[1]), bool(state[2])


#: Last parts of hyperparameters' names that the size of gradients depends on.
_DEPENDS_ON: Final = re.compile(
    r"""((per_device|global|micro|train|per_gpu)_)*batch(_size)?
      | (gradient_)?accumulation(_steps)? | observed
      | (max_)?(seq|sequence)_?(len|length)? | max_length | context_length | block_size
      | loss(_fn|_name|_function)? | criterion | objective | reduction | label_smoothing
      | data(set)?(_(name|version|fingerprint|hash))?""",
    re.VERBOSE | re.IGNORECASE,
)
#: A mapping in the configuration that says what the threshold was chosen with.
CHOSEN_WITH: Final = "max_norm_chosen_with"


class ClipNeedsReview:
    """What the size of gradients depends on has changed, and the clip threshold has not.

    The threshold belongs to the batch size, the length of sequences, the loss
    and the data with which it was chosen: gradient noise shrinks with the root
    of the batch (McCandlish et al., 2018, *An Empirical Model of Large-Batch
    Training*), and norms follow the loss. Raised once for each change: between
    attempts of a run, within one (a batch size that is told later, or the
    observed accumulation), and against what the configuration says under
    ``max_norm_chosen_with``, such as ``{"batch_size": 32, "dataset": "v3"}``.
    Compared are the entries of the configuration with the usual names of these.
    Changes of a number by less than 10 % (budget) do not count. Over when the
    threshold changes. Information.
    """

    codes = ("clip-needs-review",)
    CHANGED: Final = 0.1

    def __init__(self) -> None:
        self._threshold: float | None = None
        #: The settings as they are, those with which the threshold was chosen, and those told to differ.
        self._now: dict[str, Scalar] = {}
        self._chosen: dict[str, Scalar] = {}
        self._told: list[str] = []
        #: (row, settings) that count from the first clipping row behind that one; a row of -1 begins an attempt.
        self._waiting: list[tuple[int, dict[str, Scalar]]] = []

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None or seen.rank != 0:
            return []
        if seen.begun:
            self._waiting = [(-1, dict(seen.facts.manifest.hyperparameters))]
        for event in seen.events:
            if event["kind"] == "metadata" and isinstance(event.get("values"), dict):
                row = event.get("row")
                self._waiting.append((row if isinstance(row, int) else 0, scalars(event["values"])))
        rows = seen.rows.take(seen.rows.plausible & seen.rows.taken & np.isfinite(seen.rows["clip_threshold"]))
        findings: list[Finding] = []
        at = 0
        while self._waiting and len(rows) and self._waiting[0][0] < int(rows.sequence[-1]):
            row, values = self._waiting.pop(0)
            stop = max(at, int(np.searchsorted(rows.sequence, row, side="right")))
            findings += self._follow(seen, rows.take(slice(at, stop)))
            self._now = ({} if row < 0 else self._now) | {k: v for k, v in values.items() if _matters(k)}
            findings += self._follow(seen, rows.take(slice(stop, stop + 1)))
            at = stop + 1
            findings += self._compare(seen, rows.take(slice(stop, stop + 1)))
        return findings + self._follow(seen, rows.take(slice(at, None)))

    def _follow(self, seen: Observation, rows: Rows) -> list[Finding]:
        """Another threshold is one that was chosen for what there is now."""
        thresholds = rows["clip_threshold"]
        other = np.flatnonzero(thresholds != self._threshold)
        if not len(other):
            return []
        former, self._threshold = self._threshold, float(thresholds[-1])
        self._chosen = dict(self._now)
        if former is None or not self._told:
            return []
        self._told = []
        at = rows.take(slice(int(other[0]), int(other[0]) + 1))
        message = f"The clip threshold is {float(at['clip_threshold'][0]):.4g} now, it was {former:.4g}."
        return self._say(seen, at, message, {"clip_threshold": float(at["clip_threshold"][0])}, active=False)

    def _compare(self, seen: Observation, row: Rows) -> list[Finding]:
        now, tolerance = settings(self._now), budget(seen, self.codes[0], self.CHANGED)
        self._chosen = {**now, **self._chosen, **chosen_with(self._now)}
        changed = {
            name: (self._chosen[name], value)
            for name, value in now.items()
            if name not in self._told and differs(self._chosen[name], value, tolerance)
        }
        if not changed:
            return []
        self._told += changed
        what = "; ".join(f"{name} is {after}, was {before}" for name, (before, after) in sorted(changed.items()))
        evidence = {
            "clip_threshold": self._threshold,
            "changed": {name: {"before": before, "now": after} for name, (before, after) in changed.items()},
        }
        message = f"The clip threshold of {self._threshold:.4g} was chosen for another training: {what}."
        return self._say(seen, row, message, evidence)

    def _say(
        self, seen: Observation, row: Rows, message: str, evidence: dict[str, Any], active: bool = True
    ) -> list[Finding]:
        step, time = int(row.step[0]), float(row.time[0])
        told = {"step": step, **evidence}
        return [found(self.codes[0], seen, step=step, time=time, message=message, evidence=told, active=active)]

    def to_state(self) -> dict[str, Any]:
        return {
            "threshold": self._threshold,
            "now": self._now,
            "chosen": self._chosen,
            "told": self._told,
            "waiting": self._waiting,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._threshold, self._told = state["threshold"], list(state["told"])
        self._now, self._chosen = dict(state["now"]), dict(state["chosen"])
        self._waiting = [(int(row), dict(values)) for row, values in state["waiting"]]


def _matters(name: str) -> bool:
    known = f".{CHOSEN_WITH}." in name or _DEPENDS_ON.fullmatch(name.rpartition(".")[2]) is not None
    return known and name.startswith(("config.", "accumulation."))


def settings(hyperparameters: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The entries of a configuration that the size of gradients depends on."""
    return {
        name: value
        for name, value in hyperparameters.items()
        if _matters(name) and f".{CHOSEN_WITH}." not in name and value is not None
    }


def chosen_with(hyperparameters: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """What the configuration says that the threshold was chosen with, under the names of what it is compared with."""
    head = f"config.{CHOSEN_WITH}."
    return {
        f"config.{name[len(head) :]}": value
        for name, value in hyperparameters.items()
        if name.startswith(head) and value is not None
    }


def differs(before: Scalar, after: Scalar, tolerance: float) -> bool:
    """Whether a setting is another one: numbers by more than a share of the former, others at all."""
    if isinstance(before, int | float) and isinstance(after, int | float) and not isinstance(before, bool):
        return abs(after - before) > tolerance * abs(before)
    return before != after
