"""The fold of a run: everything that rank 0's journal has told so far, attempt after attempt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from gradwatch.catalog import STEP_SECONDS_BUCKETS
from gradwatch.collect.distribution import Distribution
from gradwatch.collect.layers import Layers
from gradwatch.collect.line import Progress
from gradwatch.collect.model import LayerTable, RunFacts, Validation, Window
from gradwatch.collect.pace import Pace
from gradwatch.collect.rows import F64, Rows
from gradwatch.collect.steps import OptimizerFold
from gradwatch.collect.validations import Validations
from gradwatch.journal import PayloadRows
from gradwatch.journal.manifest import MAX_ENTRIES, Manifest, Optimizer, Scalar, clean_text, scalars

#: Optimizers of a run that are told apart.
MAX_OPTIMIZERS: Final = 16
MAX_SLOS: Final = 20
#: Points of the curves on the status page.
CURVE: Final = 240
MAX_WAITING: Final = 1_000
#: Characters of the forensics of a broken step that are kept.
MAX_FORENSICS: Final = 16_384
#: The clip rate that a run tolerates where it does not say.
DEFAULT_CLIP_RATE_BUDGET: Final = 0.1


@dataclass(slots=True)
class Told:
    """What one step of the fold yields for detectors and sinks, in order."""

    windows: list[Window] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    tables: list[LayerTable] = field(default_factory=list)
    #: Whether who the run is has changed: a new attempt, late metadata, an MLflow run.
    facts_changed: bool = False


class RunFold:
    """One run as rank 0 sees it.

    Feed it one attempt after the other: :meth:`begin_attempt`, then
    :meth:`take` for each poll, then :meth:`end_attempt`.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.facts: RunFacts | None = None
        self.optimizers: dict[str, OptimizerFold] = {}
        self.validations = Validations()
        self.durations = Distribution(STEP_SECONDS_BUCKETS)
        self.pace = Pace()
        self.layers: Layers | None = None
        self.samples = 0.0
        self.has_samples = False
        self.loss_scale: float | None = None
        self.last_time = 0.0
        #: Whether the present attempt has taken a step.
        self.stepped = False
        self.slos: dict[str, tuple[int, int]] = {}
        #: (step, mean loss, largest norm) at a bounded number of points over the whole run.
        self.curve: list[tuple[int, float, float]] = []
        #: What the trainer told of its first step that was not finite; empty where it told nothing.
        self.nonfinite: dict[str, Any] = {}
        #: Names of the present attempt's optimizers, in the manifest's order.
        self.order: list[str] = []
        self._curve_every = 1
        self._layer_names: list[str] | None = None
        #: Validations that are compared with the losses of rows that are not final yet.
        self._waiting: list[dict[str, Any]] = []
        self._final_row = 0

    @property
    def clip_rate_budget(self) -> float:
        """Share of recent steps that this run lets be clipped."""
        return clip_rate_budget({} if self.facts is None else self.facts.manifest.budgets)

    # -- attempts

    def begin_attempt(self, attempt: int, manifest: Manifest) -> None:
        former = self.facts
        start = manifest.start_time if former is None else min(former.start_time, manifest.start_time)
        self.facts = RunFacts(self.run, attempt, manifest, dict(manifest.hyperparameters), start)
        self.order = []
        for optimizer in manifest.optimizers[:MAX_OPTIMIZERS] or (Optimizer("default"),):
            fold = self.optimizers.get(optimizer.name)
            if fold is None:
                if len(self.optimizers) >= MAX_OPTIMIZERS:
                    continue
                fold = self.optimizers[optimizer.name] = OptimizerFold(optimizer)
            fold.begin_attempt(optimizer, attempt, start)
            self.order.append(optimizer.name)
        self.layers = Layers(manifest, self._layer_names)
        self._layer_names = self.layers.names
        self.stepped = False
        self._waiting = []

    def take(
        self, progress: Progress, tensors: PayloadRows, samples: PayloadRows, events: list[dict[str, Any]]
    ) -> Told:
        """Fold one poll: rows as far as they count or are final, and what came beside them."""
        told = Told()
        assert self.facts is not None
        assert self.layers is not None
        self._count(progress.counted)
        self.layers.add_gradients(tensors)
        told.tables = self.layers.add_samples(samples, self.facts.attempt)
        told.windows = self._finish(progress.final)
        for event in events:
            self._event(event, told)
        self._validate_up_to(progress.final, told)
        return told

    def end_attempt(self) -> Told:
        """Nothing more will come of this attempt: what is still under way."""
        told = Told()
        while self._waiting:
            self._validate(self._waiting.pop(0), told)
        told.windows = [window for name in self.order for window in self.optimizers[name].end_attempt()]
        self._final_row = 0
        return told

    # -- rows

    def _count(self, rows: Rows) -> None:
        rows = rows.take(rows.plausible)
        if not len(rows):
            return
        for name, own in self._by_optimizer(rows):
            self.optimizers[name].count(own)
        duration = rows["duration"]
        self.durations.add(np.where(duration >= 0, duration, np.nan))
        self.pace.add(duration)
        consumed = rows["samples"]
        consumed = consumed[np.isfinite(consumed) & (consumed >= 0)]
        if len(consumed):
            self.samples += float(consumed.sum())
            self.has_samples = True
        scale = rows["loss_scale"]
        if np.isfinite(scale).any():
            self.loss_scale = float(scale[np.isfinite(scale)][-1])
        self.last_time = float(rows.time[-1])
        self.stepped = self.stepped or bool(rows.taken.any())

    def _finish(self, rows: Rows) -> list[Window]:
        rows = rows.take(rows.plausible)
        if not len(rows):
            return []
        windows = []
        for name, own in self._by_optimizer(rows):
            windows += self.optimizers[name].finish(own, self._sampled(name))
        self._draw(rows)
        return windows

    def _by_optimizer(self, rows: Rows) -> list[tuple[str, Rows]]:
        if len(self.order) == 1:
            return [(self.order[0], rows)]
        which = np.where((rows.optimizer >= 0) & (rows.optimizer < len(self.order)), rows.optimizer, 0)
        return [(self.order[i], rows.take(which == i)) for i in np.unique(which).tolist()]

    def _sampled(self, name: str) -> dict[str, float]:
        assert self.layers is not None
        pair = self.layers.sampled.get(self.order.index(name))
        if pair is None:
            return {}
        named = {"weight_norm_last": pair[0], "update_ratio_last": pair[1]}
        return {key: value for key, value in named.items() if np.isfinite(value)}

    def _draw(self, rows: Rows) -> None:
        """Keep the curve of (step, loss, largest norm) at a bounded number of points: each stands for as many
        rows as the others, twice as many whenever there is no more room."""
        for begin in range(0, len(rows), self._curve_every):
            part = rows.take(slice(begin, begin + self._curve_every))
            self.curve.append((int(part.step[-1]), _finite(part["loss"], np.mean), _finite(part.norm, np.max)))
        while len(self.curve) > CURVE:
            pairs = zip(self.curve[::2], self.curve[1::2])
            odd = self.curve[-1:] if len(self.curve) % 2 else []
            self.curve = [(b[0], _pair(a[1], b[1], np.mean), _pair(a[2], b[2], np.max)) for a, b in pairs] + odd
            self._curve_every *= 2

    # -- events

    def _event(self, event: dict[str, Any], told: Told) -> None:
        assert self.facts is not None
        kind = event["kind"]
        if kind == "validation":
            if self._waiting or self.validations.needs_losses(event):
                self._waiting = [*self._waiting, event][-MAX_WAITING:]
            else:
                self._validate(event, told)
        elif kind == "metadata" and isinstance(event.get("values"), dict):
            told.facts_changed |= self._learn(scalars(event["values"]))
        elif kind == "group" and isinstance(event.get("values"), dict):
            head = f"group.{clean_text(event.get('optimizer', ''), 100)}.{clean_text(event.get('group', ''), 20)}"
            told.facts_changed |= self._learn({f"{head}.{k}": v for k, v in scalars(event["values"]).items()})
        elif kind == "mlflow":
            told.facts_changed |= self._mlflow(event)
        elif kind == "slo":
            self._slo(event)
        elif kind == "nonfinite" and not self.nonfinite and len(json.dumps(event)) <= MAX_FORENSICS:
            self.nonfinite = {**event, "attempt": self.facts.attempt}

    def _validate_up_to(self, rows: Rows, told: Told) -> None:
        """Bring losses and validations into the order in which they were: each compares with the losses before it."""
        known = np.isfinite(rows["loss"]) & rows.plausible
        sequence, loss = rows.sequence[known], rows["loss"][known]
        if len(rows):
            self._final_row = int(rows.sequence[-1])
        at = 0
        while self._waiting and self._row(self._waiting[0]) <= self._final_row:
            event = self._waiting.pop(0)
            until = int(np.searchsorted(sequence, self._row(event), side="right"))
            self.validations.add_losses(float(loss[at:until].sum()), max(0, until - at))
            at = max(at, until)
            self._validate(event, told)
        self.validations.add_losses(float(loss[at:].sum()), len(loss) - at)

    def _validate(self, event: dict[str, Any], told: Told) -> None:
        assert self.facts is not None
        validation = self.validations.add(event, self.facts.attempt, self.facts.manifest.budgets)
        if validation is not None:
            told.validations.append(validation)

    @staticmethod
    def _row(event: dict[str, Any]) -> int:
        row = event.get("row")
        return row if isinstance(row, int) else 0

    def _learn(self, values: Mapping[str, Scalar]) -> bool:
        facts = self.facts
        assert facts is not None
        merged = {**facts.hyperparameters, **values}
        if len(merged) > MAX_ENTRIES or merged == facts.hyperparameters:
            return False
        self.facts = RunFacts(facts.run, facts.attempt, facts.manifest, merged, facts.start_time)
        return True

    def _mlflow(self, event: dict[str, Any]) -> bool:
        facts = self.facts
        assert facts is not None
        given = {key: event[key] for key in ("run_id", "tracking_uri") if isinstance(event.get(key), str)}
        given = {key: clean_text(value) for key, value in given.items() if value}
        if not given:
            return False
        fields = {name: getattr(facts.manifest, name) for name in Manifest.__dataclass_fields__}
        fields["mlflow"] = {**facts.manifest.mlflow, **given}
        self.facts = RunFacts(facts.run, facts.attempt, Manifest(**fields), facts.hyperparameters, facts.start_time)
        return True

    def _slo(self, event: dict[str, Any]) -> None:
        name = clean_text(event.get("slo", ""), 100)
        if name and (name in self.slos or len(self.slos) < MAX_SLOS):
            good, bad = self.slos.get(name, (0, 0))
            self.slos[name] = (good + _count(event.get("good")), bad + _count(event.get("bad")))

    # -- between two lives of the agent

    def to_state(self) -> dict[str, Any]:
        facts = self.facts
        return {
            "start_time": None if facts is None else facts.start_time,
            "hyperparameters": None if facts is None else dict(facts.hyperparameters),
            "mlflow": None if facts is None else dict(facts.manifest.mlflow),
            "optimizers": {name: fold.to_state() for name, fold in self.optimizers.items()},
            "validations": self.validations.to_state(),
            "durations": self.durations.to_state(),
            "pace": self.pace.to_state(),
            "layers": None if self.layers is None else self.layers.to_state(),
            "samples": self.samples if self.has_samples else None,
            "loss_scale": self.loss_scale,
            "last_time": self.last_time,
            "stepped": self.stepped,
            "slos": self.slos,
            "waiting": self._waiting,
            "final_row": self._final_row,
            "curve": self.curve,
            "curve_every": self._curve_every,
            "nonfinite": self.nonfinite,
        }

    @classmethod
    def from_state(cls, run: str, state: dict[str, Any], attempt: int, manifest: Manifest) -> RunFold:
        """The fold as it was, within the attempt whose manifest this is. Raises ``ValueError``, ``KeyError`` or
        ``TypeError`` for a state that :meth:`to_state` did not give."""
        self = cls(run)
        layers = state["layers"]
        self._layer_names = None if layers is None else [str(name) for name in layers["names"]]
        for name in state["optimizers"]:
            self.optimizers[name] = OptimizerFold(Optimizer(name))
        self.begin_attempt(attempt, manifest)
        assert self.facts is not None
        assert self.layers is not None
        self.facts = RunFacts(run, attempt, manifest, dict(state["hyperparameters"]), float(state["start_time"]))
        self._mlflow(dict(state["mlflow"]))
        for name, inner in state["optimizers"].items():
            self.optimizers[name].restore(inner)
        self.validations = Validations.from_state(state["validations"])
        self.durations.restore(state["durations"])
        self.pace = Pace.from_state(state["pace"])
        self.layers.restore(layers)
        self.has_samples, self.samples = state["samples"] is not None, float(state["samples"] or 0.0)
        self.loss_scale, self.last_time = state["loss_scale"], float(state["last_time"])
        self.stepped = bool(state["stepped"])
        self.slos = {name: (int(good), int(bad)) for name, (good, bad) in state["slos"].items()}
        self._waiting, self._final_row = list(state["waiting"]), int(state["final_row"])
        self.curve = [(int(step), float(loss), float(norm)) for step, loss, norm in state["curve"]]
        self._curve_every = max(1, int(state["curve_every"]))
        self.nonfinite = dict(state.get("nonfinite") or {})
        return self


def clip_rate_budget(budgets: Mapping[str, Any]) -> float:
    """A run's budget for its clip rate, from its manifest."""
    value = budgets.get("clip_rate")
    sane = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    return float(value) if sane and value is not None else DEFAULT_CLIP_RATE_BUDGET


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _finite(values: F64, combine: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(combine(finite)) if len(finite) else float("nan")


def _pair(first: float, second: float, combine: Any) -> float:
    return _finite(np.array([first, second]), combine)
