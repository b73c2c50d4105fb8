"""Runs as Prometheus reads them: the catalogue's metrics, computed when somebody scrapes.

Nothing is registered and nothing is set: :class:`Exposition` walks over the
runs' present folds at each scrape. It refuses a series that the catalogue does
not have. Closed label sets (states, finding codes, optimizers) are there from
the beginning at 0, so that ``increase()`` sees the first event.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from gradwatch import __version__
from gradwatch.catalog import BY_NAME, FINDINGS, METRICS, RUN_STATES, Metric, Severity
from gradwatch.collect.distribution import Distribution
from gradwatch.collect.fold import RunFold
from gradwatch.collect.run import RankView, RunTail
from gradwatch.collect.steps import OptimizerFold
from gradwatch.collect.validations import gap_budget
from gradwatch.journal.manifest import clean_text

#: Longest value of a label; what is longer is cut.
MAX_LABEL: Final = 120
#: Series of one run at most, beyond which label sets that a training chose are cut short.
MAX_HYPERPARAMETERS: Final = 100
#: Name of a metric -> name of its series, and its labels.
_SERIES: Final = {metric.name: (metric.exposed, metric.all_labels) for metric in METRICS}
_LOSSES: Final = ("loss",)


class FindingsView(Protocol):
    """What the exposition asks of the findings of a run."""

    counts: dict[tuple[str, Severity], int]

    def is_active(self, code: str, severity: Severity) -> bool: ...


@dataclass(slots=True)
class SinkCounts:
    """How a sink does, as the agent's own metrics tell it."""

    name: str
    errors: int = 0
    backlog: int = 0
    dropped: int = 0


@dataclass(slots=True)
class Snapshot:
    """What is shown at one scrape."""

    runs: Sequence[tuple[RunTail, FindingsView]]
    sinks: Sequence[SinkCounts] = ()


@dataclass(slots=True)
class Page:
    """An exposition under way: samples by metric of the catalogue."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    #: Series that are there: two names that became one label value are one series, the first one's.
    _there: set[tuple[str, ...]] = field(default_factory=set)

    def put(self, name: str, labels: Sequence[str], value: float | None) -> None:
        """One series. ``labels`` are values in the catalogue's order; None is no series."""
        if value is None:
            return
        series = _SERIES.get(name)
        if series is None:
            raise KeyError(f"{name} is not in the catalogue")
        exposed, names = series
        if len(labels) != len(names):
            raise ValueError(f"{name} has the labels {names}, not {len(labels)} of them")
        if self._is_new(name, labels):
            self.samples.setdefault(name, []).append(Sample(exposed, dict(zip(names, labels)), float(value)))

    def put_distribution(self, name: str, labels: Sequence[str], distribution: Distribution) -> None:
        """The series of one histogram."""
        if not self._is_new(name, labels):
            return
        exposed, names = _SERIES[name]
        values = dict(zip(names, labels))
        samples = self.samples.setdefault(name, [])
        buckets = distribution.cumulative
        samples += [Sample(f"{exposed}_bucket", {**values, "le": bound}, count) for bound, count in buckets]
        samples.append(Sample(f"{exposed}_count", values, buckets[-1][1]))
        samples.append(Sample(f"{exposed}_sum", values, distribution.sum))

    def _is_new(self, name: str, labels: Sequence[str]) -> bool:
        key = (name, *labels)
        if key in self._there:
            return False
        self._there.add(key)
        return True

    def families(self) -> Iterator[Family]:
        """Families in the catalogue's order."""
        for metric in METRICS:
            if samples := self.samples.get(metric.name):
                yield _family(metric, samples)


def _family(metric: Metric, samples: list[Sample]) -> Family:
    # A family is named without the suffix that its type brings; the exposition puts it on again.
    family = Family(metric.exposed.removesuffix("_total").removesuffix("_info"), metric.help, metric.type)
    family.samples = samples
    return family


class Exposition(Collector):
    """The catalogue's metrics of whatever ``snapshot`` returns, in a registry of its own."""

    def __init__(self, snapshot: Callable[[], Snapshot], lock: AbstractContextManager[object] | None = None) -> None:
        """``lock`` is held while the runs are looked at, not while the text is made."""
        self._snapshot, self._lock = snapshot, lock or nullcontext()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def describe(self) -> Iterable[Family]:
        return []

    def collect(self) -> Iterator[Family]:
        page = Page()
        with self._lock:
            snapshot = self._snapshot()
            for run, findings in snapshot.runs:
                _run(page, run, findings)
        for sink in snapshot.sinks:
            page.put("sink_errors", [sink.name], sink.errors)
            page.put("sink_backlog", [sink.name], sink.backlog)
            page.put("sink_dropped", [sink.name], sink.dropped)
        page.put("agent_runs", [], len(snapshot.runs))
        page.put("agent", [__version__], 1)
        yield from page.families()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where ``accept`` asks for it, else the classic text."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def _run(page: Page, tail: RunTail, findings: FindingsView) -> None:
    fold = tail.fold
    manifest = tail.lead.manifest if fold.facts is None else fold.facts.manifest
    if manifest is None:
        return
    base = [label(manifest.model), label(tail.run)]
    if fold.facts is not None:
        for optimizer in fold.optimizers.values():
            _optimizer(page, base, optimizer)
        _training(page, base, fold)
        _layers(page, base, fold)
        _hyperparameters(page, base, fold)
        _validations(page, base, fold)
        _findings(page, base, findings)
        _state(page, base, tail)
    for rank, view in sorted(tail.views.items()):
        _rank(page, [*base, str(rank)], view, tail.ranks[rank].missed)


def _optimizer(page: Page, base: list[str], fold: OptimizerFold) -> None:
    labels = [*base, label(fold.name)]
    counters = {
        "steps": fold.steps,
        "replayed_steps": fold.replayed,
        "clipped_steps": fold.clipped,
        "nonfinite_steps": fold.nonfinite,
        "skipped_steps": fold.skipped,
        "nonfinite_steps_in_a_row": fold.nonfinite_in_a_row,
    }
    for name, count in counters.items():
        page.put(name, labels, count)
    recent = fold.recent.counts
    page.put("recent_steps", labels, recent.steps)
    page.put("recent_clipped_steps", labels, recent.clipped)
    page.put("recent_nonfinite_steps", labels, recent.nonfinite)
    page.put("step", labels, fold.step if fold.step >= 0 else None)
    for name in ("grad_norm", "clip_threshold", "clip_coefficient"):
        page.put(name, labels, fold.last.get(name))
    page.put("grad_norm_max", labels, fold.recent.largest_norm)
    for quantile, value in fold.recent.quantiles.items():
        page.put("grad_norm_q", [*labels, str(quantile)], value)
    page.put_distribution("grad_norm_distribution", labels, fold.norms)
    # Without a clip the rate is what the optimizer uses.
    coefficient = fold.last.get("clip_coefficient", 1.0)
    for group, (rate, decay) in fold.rates.items():
        page.put("learning_rate", [*labels, label(group)], _known(rate))
        page.put("weight_decay", [*labels, label(group)], _known(decay))
        if fold.optimizer.linear:
            page.put("effective_learning_rate", [*labels, label(group)], _known(rate * coefficient))


def _training(page: Page, base: list[str], fold: RunFold) -> None:
    page.put_distribution("step_duration_seconds", base, fold.durations)
    page.put("samples", base, fold.samples if fold.has_samples else None)
    page.put("loss_scale", base, fold.loss_scale)
    for name, count in fold.slos.items():
        for result, value in zip(("good", "bad"), count):
            page.put("slo_events", [*base, label(name), result], value)


def _layers(page: Page, base: list[str], fold: RunFold) -> None:
    layers = fold.layers
    if layers is None:
        return
    for name, norms in (
        ("layer_grad_norm", layers.grad_norms()),
        ("layer_weight_norm", layers.weight_norms()),
        ("layer_update_ratio", layers.update_ratios()),
    ):
        for layer, value in norms.items():
            page.put(name, [*base, label(layer)], value)
    for index, optimizer in enumerate(fold.order):
        weight, ratio = layers.sampled.get(index, (math.nan, math.nan))
        page.put("weight_norm", [*base, label(optimizer)], _known(weight))
        page.put("update_ratio", [*base, label(optimizer)], _known(ratio))


def _hyperparameters(page: Page, base: list[str], fold: RunFold) -> None:
    assert fold.facts is not None
    shown: set[tuple[str, str]] = set()
    for name, value in fold.facts.hyperparameters.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or len(shown) >= MAX_HYPERPARAMETERS:
            continue
        plain, group = _split_group(name)
        key = (label(plain), label(group))
        if key not in shown:
            shown.add(key)
            page.put("hyperparameter", [*base, *key], _known(float(value)))


def _split_group(name: str) -> tuple[str, str]:
    """``group.<optimizer>.<i>.<name>`` as (name, "<optimizer>.<i>"); what belongs to no group has "" for it."""
    parts = name.split(".")
    if parts[0] == "group" and len(parts) >= 4:
        return ".".join(parts[3:]), ".".join(parts[1:3])
    return name, ""


def _validations(page: Page, base: list[str], fold: RunFold) -> None:
    assert fold.facts is not None
    windows = [optimizer.windows for optimizer in fold.optimizers.values() if optimizer.windows is not None]
    losses = [window.mean_loss for window in windows if window.mean_loss is not None]
    page.put("loss", [*base, "train", ""], losses[0] if losses else None)
    metrics = set()
    for (metric, slice_), score in fold.validations.last.items():
        where = label(slice_)
        if metric in _LOSSES:
            page.put("loss", [*base, "validation", where], score.value)
        else:
            page.put("score", [*base, label(metric), "validation", where], score.value)
            page.put("score", [*base, label(metric), "train", where], score.training)
        page.put("generalization_gap", [*base, label(metric), where], score.gap)
        if score.gap is not None:
            page.put("gap_over_budget_validations", [*base, label(metric), where], score.over_budget)
            metrics.add(metric)
    page.put("validations", base, fold.validations.count)
    budgets = fold.facts.manifest.budgets
    for metric in sorted(metrics | set(_LOSSES)):
        page.put("generalization_gap_budget", [*base, label(metric)], gap_budget(budgets, metric))
    page.put("clip_rate_budget", base, fold.clip_rate_budget)


def _findings(page: Page, base: list[str], findings: FindingsView) -> None:
    for known in FINDINGS:
        severities = {known.severity} | {s for code, s in findings.counts if code == known.code}
        for severity in sorted(severities):
            page.put("findings", [*base, known.code, severity], findings.counts.get((known.code, severity), 0))
            page.put("finding_active", [*base, known.code, severity], findings.is_active(known.code, severity))
        if known.kind == "contract":
            count = sum(findings.counts.get((known.code, severity), 0) for severity in severities)
            page.put("violations", [*base, known.code], count)


def _state(page: Page, base: list[str], tail: RunTail) -> None:
    fold = tail.fold
    facts = fold.facts
    assert facts is not None
    state = tail.state
    for name in RUN_STATES:
        page.put("run_state", [*base, name], name == state)
    page.put("run_attempt", base, facts.attempt)
    page.put("run_start_timestamp_seconds", base, facts.start_time)
    page.put("last_step_timestamp_seconds", base, fold.last_time or None)
    page.put("run", [*base, *run_facts(fold)], 1)


def run_facts(fold: RunFold) -> list[str]:
    """The labels of ``run_info``, in the catalogue's order."""
    facts = fold.facts
    assert facts is not None
    manifest, known = facts.manifest, facts.hyperparameters

    def first(*names: str) -> str:
        return next((str(known[name]) for name in names if known.get(name) not in (None, "")), "")

    values = {
        "run_name": facts.run_name,
        "tier": manifest.tier,
        "optimizer": ",".join(dict.fromkeys(o.class_name for o in manifest.optimizers if o.class_name)),
        "scheduler": first("scheduler.class", "scheduler.0.class", "scheduler"),
        "precision": first("precision.training", "precision"),
        "mlflow_run_id": manifest.mlflow.get("run_id") or "",
        "commit": first("git.commit", "commit"),
        "model_version": first("config.model_version", "model_version"),
        "world_size": str(manifest.world_size),
        "torch_version": first("machine.torch", "torch_version"),
        "gradwatch_version": manifest.gradwatch,
        "device": first("device.name", "device.type", "device"),
        "host": manifest.host,
        "team": first("config.team", "team"),
    }
    return [label(values[name]) for name in BY_NAME["run"].labels]


def _rank(page: Page, labels: list[str], view: RankView, missed: int) -> None:
    page.put("rank_step", labels, view.step)
    page.put("rank_grad_norm", labels, view.grad_norm)
    page.put("rank_grad_norm_local", labels, view.grad_norm_local)
    page.put("rank_grad_norm_squares", labels, view.grad_norm_squares)
    page.put("rank_step_duration_seconds", labels, view.step_duration)
    page.put("rank_last_step_timestamp_seconds", labels, view.last_time)
    page.put("probe_seconds", labels, view.probe_seconds)
    page.put("journal_rows_missed", labels, missed)


@lru_cache(maxsize=16_384)
def label(value: object) -> str:
    """Anything as the value of a label: bounded, printable; the exposition escapes the rest."""
    return clean_text(value, MAX_LABEL)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
