"""Write the history of runs as OpenMetrics text, generated from the catalogue, and make TSDB blocks of it.

Every catalogued metric of every scope appears with its labels, as Prometheus
would have scraped it: with ``job``, ``instance``, ``pod`` and ``team``, and
with a namespace unless the run stands for one on a laptop.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TextIO

from gradwatch.catalog import (
    FINDINGS,
    GRAD_NORM_BUCKETS,
    METRICS,
    QUANTILES,
    RUN_STATES,
    STEP_SECONDS_BUCKETS,
    Metric,
)

Labels = dict[str, str]
STEPS_PER_SECOND = 2.0


@dataclass(frozen=True)
class PastRun:
    """A run that Prometheus has scraped from ``start`` to ``end`` (Unix seconds)."""

    model: str
    run: str
    run_name: str
    start: float
    end: float
    state: str = "running"
    ranks: int = 1
    namespace: str | None = "ml"
    layers: int = 12
    weight_decay: float = 0.01
    #: Time of a restart, from when on the attempt is 1.
    restart: float = math.inf


@dataclass(frozen=True)
class History:
    runs: Sequence[PastRun]
    start: float
    end: float
    every: float = 60.0
    #: Models known to the bridge.
    models: Sequence[str] = field(default=())


_VALUES: Mapping[str, Sequence[str]] = {
    "optimizer": ("adamw",),
    "group": ("0", "1"),
    "q": tuple(f"{q:g}" for q in QUANTILES),
    "split": ("train", "validation"),
    "slice": ("", "tenant-7"),
    "metric": ("loss",),
    "slo": ("freshness", "retrain"),
    "sink": ("prometheus", "mlflow"),
    "state": RUN_STATES,
    "contract": tuple(f.code for f in FINDINGS if f.kind == "contract"),
    "version": ("6", "7"),
    "outcome": ("finished", "failed"),
    "result": ("good", "bad"),
}
_HYPERPARAMETERS = {"lr": 1e-3, "weight_decay": 0.01, "max_norm": 1.0, "batch_size": 64.0}
_COSTS = {"model_size_bytes": 4.2e8, "latency_p95_seconds": 0.031, "cost_per_inference": 2e-5}
_NAMES: Mapping[str, Mapping[str, float]] = {
    "score": {"accuracy": 0.91},
    "hyperparameter": _HYPERPARAMETERS,
    "model_version_hyperparameter": _HYPERPARAMETERS,
    "model_version_score": {"accuracy": 0.9, **_COSTS},
    "score_drop_budget": {"accuracy": 0.02},
    "hyperparameter_drift": {"weight_decay": 1.0, "lr": 0.0},
}


def write(history: History, out: TextIO) -> None:
    """OpenMetrics text of the whole history."""
    for past in history.runs:
        times = _times(past.start, past.end, history.every)
        for rank in range(past.ranks):
            for name, labels in _of_rank(past, rank):
                _series(out, name, labels, times, past)
    for name, labels in _elsewhere(history):
        _series(out, name, labels, _times(history.start, history.end, history.every), None)
    out.write("# EOF\n")


def blocks(history: History, directory: Path, promtool: str = "promtool") -> Path:
    """A TSDB directory holding the history, made by promtool."""
    text, data = directory / "history.om", directory / "data"
    directory.mkdir(parents=True, exist_ok=True)
    with text.open("w") as out:
        write(history, out)
    made = subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", str(text), str(data)],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    text.unlink()
    return data


def _times(start: float, end: float, every: float) -> list[float]:
    return [start + i * every for i in range(int((end - start) / every) + 1)]


def _scraped(past: PastRun, rank: int) -> Labels:
    labels = {"job": "gradwatch", "instance": f"{past.run}-{rank}:9464"}
    if past.namespace is not None:
        labels |= {"namespace": past.namespace, "pod": f"{past.run}-{rank}", "team": "ranking"}
    return labels


def _of_rank(past: PastRun, rank: int) -> Iterator[tuple[str, Labels]]:
    base = _scraped(past, rank)
    for metric in METRICS:
        if metric.scope == "run" and rank == 0:
            mine = base | {"model": past.model, "run": past.run}
        elif metric.scope == "rank":
            mine = base | {"model": past.model, "run": past.run, "rank": str(rank)}
        elif metric.scope == "agent":
            mine = dict(base)
        else:
            continue
        for labels in _expand(metric, past):
            yield from _exposed(metric, mine | labels)
    yield "up", dict(base)


def _expand(metric: Metric, past: PastRun | None) -> Iterator[Labels]:
    if metric.name == "run" and past is not None:
        facts = dict.fromkeys(metric.labels, "x") | {"run_name": past.run_name, "tier": "production"}
        yield facts | {"mlflow_run_id": f"ml{past.run}", "team": "ranking"}
        return
    if {"code", "severity"} <= set(metric.labels):
        for finding in FINDINGS:
            yield {"code": finding.code, "severity": finding.severity}
        return
    choices: list[Sequence[str]] = []
    for label in metric.labels:
        if label == "name":
            choices.append(tuple(_NAMES[metric.name]))
        elif label == "layer":
            assert past is not None
            choices.append((*(f"encoder.{i}" for i in range(past.layers - 1)), "other"))
        elif label == "result" and metric.scope != "run":
            choices.append(("accepted", "failed"))
        else:
            choices.append(_VALUES[label])
    for values in product(*choices):
        yield {label: value for label, value in zip(metric.labels, values, strict=True) if value}


def _elsewhere(history: History) -> Iterator[tuple[str, Labels]]:
    """Series of the bridge and of the rules."""
    bridge = {"job": "gradwatch-bridge", "instance": "bridge:9465", "namespace": "gradwatch"}
    for metric in METRICS:
        if metric.scope != "bridge":
            continue
        if "model" not in metric.labels:
            for labels in _expand(metric, None):
                yield from _exposed(metric, bridge | labels)
            continue
        for model in history.models:
            for labels in _of_model(metric, model, history):
                yield from _exposed(metric, bridge | labels | {"model": model})
    yield "ALERTS", {"alertname": "GradwatchWatchdog", "alertstate": "firing", "severity": "none"}
    for past in history.runs[:1]:
        alert = {"alertname": "GradwatchClipRateHigh", "severity": "ticket", "model": past.model, "run": past.run}
        if past.namespace is not None:
            alert["namespace"] = past.namespace
        yield "ALERTS", alert | {"alertstate": "firing"}
        yield "ALERTS_FOR_STATE", alert


def _of_model(metric: Metric, model: str, history: History) -> Iterator[Labels]:
    mine = [past for past in history.runs if past.model == model]
    if metric.name == "run_heartbeat_timestamp_seconds":
        for past in mine:
            yield {"run": past.run, "run_name": past.run_name, "tier": "production"}
    elif metric.name == "run_heartbeat_state":
        for past in mine:
            yield from ({"run": past.run, "state": state} for state in RUN_STATES)
    elif metric.name == "model_version_info":
        for version, alias in (("7", "current"), ("6", "previous")):
            facts = {"optimizer": "AdamW", "scheduler": "CosineAnnealingLR"}
            yield {"version": version, "alias": alias, "run": mine[0].run if mine else "gone"} | facts
    else:
        rest = tuple(label for label in metric.labels if label != "model")
        yield from _expand(Metric(metric.name, metric.type, rest, "", scope="agent"), None)


def _exposed(metric: Metric, labels: Labels) -> Iterator[tuple[str, Labels]]:
    if metric.type != "histogram":
        yield metric.exposed, labels
        return
    bounds = GRAD_NORM_BUCKETS if metric.name == "grad_norm_distribution" else STEP_SECONDS_BUCKETS
    for bound in (*(f"{b:g}" for b in bounds), "+Inf"):
        yield f"{metric.exposed}_bucket", labels | {"le": bound}
    yield f"{metric.exposed}_sum", labels
    yield f"{metric.exposed}_count", labels


def _series(out: TextIO, name: str, labels: Labels, times: Sequence[float], past: PastRun | None) -> None:
    text = ",".join(f'{key}="{value}"' for key, value in labels.items())
    head = f"{name}{{{text}}}"
    out.writelines(f"{head} {_value(name, labels, t, times, past):.9g} {t:.0f}\n" for t in times)


def _value(name: str, labels: Labels, t: float, times: Sequence[float], past: PastRun | None) -> float:
    """A plausible value; only what a panel tells apart needs to be told apart here."""
    start, end = times[0], times[-1]
    age = t - start
    if name.endswith("_timestamp_seconds"):
        return start if "start" in name else t
    if name == "ALERTS_FOR_STATE":
        return start
    if name in ("ALERTS", "up") or name.endswith("_info"):
        return 1.0
    if name.endswith(("run_state", "run_heartbeat_state")):
        state = "running" if past is None or t < end else past.state
        return float(labels["state"] == state)
    if name.endswith("run_attempt"):
        return float(past is not None and t >= past.restart)
    if name.endswith("finding_active"):
        return float(labels["code"] in ("clip-rate-high", "decay-on-bias-or-norm"))
    if "le" in labels:
        bound = math.inf if labels["le"] == "+Inf" else float(labels["le"])
        return STEPS_PER_SECOND * age * (1.0 if bound >= 1.0 else 0.5 if bound >= 0.3 else 0.0)
    if name.endswith("_total"):
        slow = any(
            word in name for word in ("clipped", "replayed", "skipped", "nonfinite", "missed", "errors", "dropped")
        )
        bad = labels.get("result") == "bad"
        return STEPS_PER_SECOND * age * (0.001 if slow or bad else 1.0)
    if name.endswith(("weight_decay", "hyperparameter")) and past is not None:
        named = _HYPERPARAMETERS.get(labels.get("name", "weight_decay"), 0.0)
        return past.weight_decay if labels.get("name", "weight_decay") == "weight_decay" else named
    if name.endswith("recent_steps"):
        return 3600.0
    if name.endswith("recent_clipped_steps"):
        return 500.0
    if "version" in labels and labels.get("name") in (*_HYPERPARAMETERS, *_COSTS):
        return {**_HYPERPARAMETERS, **_COSTS}[labels["name"]]
    return 1.0 + 0.1 * math.sin(t / 600.0) + 0.01 * len(labels)
