"""What is recorded of a run or of a registered version, from its journal or from MLflow, in one form.

The gates look at nothing else. MLflow is asked through the bridge's bounded
client; ``mlflow`` is imported with the first question.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from gradwatch.catalog import FINDING
from gradwatch.collect.model import Finding
from gradwatch.sinks.mlflow.entities import METRIC_PREFIX, PREFIX, parameters, validation_rows
from gradwatch.sinks.mlflow.facts import COSTS, Facts, facts_of, hyperparameters, missing_metadata, number
from gradwatch.sinks.mlflow.history import History
from gradwatch.sinks.mlflow.tracking import TrackingError
from gradwatch.tools.report.record import Record

_MODEL: Final = re.compile(r"models:/(?P<name>[^@]+?)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))")
_FINDING_TAG: Final = f"{PREFIX}finding."
_RESOLVED: Final = "resolved: "
_SEVERITY: Final = re.compile(r"(info|ticket|page) at step -?\d+: ")

#: A metric and the cohort that it was taken on; "" for all data.
Where = tuple[str, str]


class EvidenceError(Exception):
    """There is nothing to judge: the message says what was asked for, what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Open:
    """A finding that stands."""

    code: str
    severity: str
    message: str

    @property
    def is_contract(self) -> bool:
        """Whether the code of the training is wrong, whatever the data."""
        return self.code in FINDING and FINDING[self.code].kind == "contract"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is recorded. ``params`` are flat (``group.default.0.weight_decay``); numbers are None where unknown."""

    target: str
    run: str
    params: Mapping[str, str]
    findings: Sequence[Open]
    scores: Mapping[Where, float]
    #: Generalization gap: relative, positive where validation is worse than training.
    gaps: Mapping[Where, float]
    #: Clipped steps / steps, over the whole run.
    clip_rate: float | None
    #: Steps taken with a gradient or loss that was not finite.
    nonfinite_steps: int | None
    #: Global L2 norm of the weights at the last sample.
    weight_norm: float | None
    missing: Sequence[str]
    state: str = ""
    mlflow_run: str = ""
    model: str = ""
    version: str = ""
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def numbers(self) -> Mapping[str, float]:
        """Hyperparameters that are numbers, under plain names."""
        return hyperparameters(self.params)[0]

    @property
    def words(self) -> Mapping[str, str]:
        """Classes of optimizers and schedulers."""
        return hyperparameters(self.params)[1]


# -- a journal


def of_journal(target: str, record: Record, findings: Sequence[Finding]) -> Evidence:
    """What the journals of a run hold, as far as their rings reach back."""
    # Names as they stand in MLflow, so that a journal compares with what was uploaded of another.
    params = {k.removeprefix(PREFIX): v for k, v in parameters(record.facts.hyperparameters).items()}
    steps = [steps for steps in record.optimizers.values() if len(steps)]
    count = sum(len(s) for s in steps)
    clips = any(bool(np.isfinite(s.threshold).any()) for s in steps)
    norms = record.tensors.global_weight_norm
    norms = norms[np.isfinite(norms)]
    scores: dict[Where, float] = {}
    gaps: dict[Where, float] = {}
    for validation in record.validations:
        rows = validation_rows(validation)
        told = {k.removeprefix(METRIC_PREFIX): v for k, v in zip(rows.keys, rows.values, strict=True)}
        scores |= _by_slice(told, "validation/")
        gaps |= _by_slice(told, "generalization_gap/")
    numbers, words = hyperparameters(params)
    return Evidence(
        target=target,
        run=record.facts.run,
        params=params,
        findings=[Open(f.code, f.severity, f.message) for f in findings if f.active],
        scores=scores,
        gaps=gaps,
        clip_rate=sum(int(s.clipped.sum()) for s in steps) / count if clips else None,
        nonfinite_steps=sum(int((s.nonfinite & s.taken).sum()) for s in steps) if count else None,
        weight_norm=float(norms[-1]) if len(norms) else None,
        missing=missing_metadata(params, words | dict.fromkeys(numbers, ""), datasets=False),
        state=record.end.state if record.end is not None else "running",
        mlflow_run=str(record.facts.manifest.mlflow.get("run_id") or ""),
        costs={name: scores[name, ""] for name in COSTS if (name, "") in scores},
    )


# -- MLflow


def server() -> Registry:
    """The MLflow server of ``MLFLOW_TRACKING_URI``. Raises ``EvidenceError`` where none is named."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise EvidenceError("MLflow is needed: name its address in MLFLOW_TRACKING_URI")
    return Registry(uri)


class Registry(History):
    """One MLflow server with the questions that only gates have."""

    def metric_history(self, run_id: str, key: str) -> Sequence[Any]:
        return list(self._call(lambda client: client.get_metric_history(run_id, key)))

    def version(self, name: str, number: str) -> Any:
        return self._call(lambda client: client.get_model_version(name, number))

    def aliased(self, name: str, alias: str) -> Any:
        return self._call(lambda client: client.get_model_version_by_alias(name, alias))

    def model(self, name: str) -> Any:
        return self._call(lambda client: client.get_registered_model(name))

    def create_model(self, name: str) -> None:
        self._call(lambda client: client.create_registered_model(name))

    def create_version(self, name: str, source: str, run_id: str) -> Any:
        return self._call(lambda client: client.create_model_version(name, source, run_id=run_id))

    def tag_model(self, name: str, key: str, value: str) -> None:
        self._call(lambda client: client.set_registered_model_tag(name, key, value))

    def describe_version(self, name: str, number: str, text: str) -> None:
        self._call(lambda client: client.update_model_version(name, number, description=text))

    def set_alias(self, name: str, alias: str, number: str) -> None:
        self._call(lambda client: client.set_registered_model_alias(name, alias, number))


def is_version(target: str) -> bool:
    """Whether a registered version is meant, as ``models:/NAME/3`` or ``models:/NAME@champion``."""
    return target.startswith("models:/")


def of_version(target: str, registry: Registry) -> Evidence:
    """What is recorded of a registered version and of the run behind it."""
    match = _MODEL.fullmatch(target)
    if match is None:
        raise EvidenceError(f"{target}: a version is written models:/NAME/3 or models:/NAME@champion")
    try:
        if match["version"]:
            version = registry.version(match["name"], match["version"])
        else:
            version = registry.aliased(match["name"], match["alias"])
    except TrackingError as error:
        raise EvidenceError(f"{target} cannot be read: {error}; `gradwatch audit --all` lists what is there") from None
    return evidence_of_version(version, registry, target)


def evidence_of_version(version: Any, registry: Registry, target: str = "") -> Evidence:
    """What is recorded of a version as MLflow's entity."""
    target = target or f"models:/{version.name}/{version.version}"
    entity = _run(registry, str(version.run_id)) if version.run_id else None
    if entity is None:
        raise EvidenceError(f"{target}: the run behind it is gone, so nothing about it is recorded; register it anew")
    found = of_mlflow(target, entity, registry)
    tagged = {
        name: value
        for name in COSTS
        for key in (f"{PREFIX}{name}", name)
        if (value := number(version.tags.get(key))) is not None
    }
    costs = {**found.costs, **tagged}
    return replace(found, model=str(version.name), version=str(version.version), costs=costs)


def of_run(target: str, registry: Registry) -> Evidence:
    """What MLflow holds of a run: its id there, or its id or name here."""
    entity = _run(registry, target) if re.fullmatch(r"[0-9a-f]{32}", target) else None
    try:
        if entity is None:
            entity = registry.run_named(registry.experiments(), target)
    except TrackingError as error:
        raise EvidenceError(f"MLflow at {registry.uri} cannot be asked for {target!r}: {error}") from None
    if entity is None:
        raise EvidenceError(f"MLflow at {registry.uri} knows no run {target!r}; name its id there, or its journal")
    return of_mlflow(target, entity, registry)


def _run(registry: Registry, run_id: str) -> Any | None:
    try:
        return registry.run(run_id)
    except TrackingError as error:
        raise EvidenceError(f"MLflow at {registry.uri} cannot be asked for run {run_id}: {error}") from None


def of_mlflow(target: str, entity: Any, registry: Registry) -> Evidence:
    """What stands on an ``mlflow.entities.Run``; counts are summed over the windows of its history."""
    facts: Facts = facts_of(entity)
    run_id = str(entity.info.run_id)
    tags = entity.data.tags
    metrics = {k.removeprefix(METRIC_PREFIX): float(v) for k, v in entity.data.metrics.items()}
    keys = [key for key in entity.data.metrics if key.startswith(METRIC_PREFIX)]
    try:
        clip_rate = _clip_rate(registry, run_id, keys)
        nonfinite = _total(registry, run_id, keys, "nonfinite_steps")
    except TrackingError as error:
        raise EvidenceError(f"MLflow at {registry.uri} cannot be asked for the history of {target}: {error}") from None
    watched = any(key.rpartition("/")[2] == "steps" for key in keys)
    params = {k.removeprefix(PREFIX): v for k, v in entity.data.params.items() if k.startswith(PREFIX)}
    return Evidence(
        target=target,
        run=tags.get(f"{PREFIX}run", run_id),
        params=params,
        findings=_findings(tags),
        scores=_by_slice(metrics, "validation/"),
        gaps=_by_slice(metrics, "generalization_gap/"),
        clip_rate=clip_rate,
        nonfinite_steps=int(nonfinite) if watched else None,
        weight_norm=metrics.get("weight_norm_last", metrics.get("weight_norm")),
        missing=facts.missing,
        state=tags.get(f"{PREFIX}state", str(entity.info.status).lower()),
        mlflow_run=run_id,
        costs={n: v for n in COSTS if (v := facts.scores.get(n, facts.numbers.get(n))) is not None},
    )


def _findings(tags: Mapping[str, str]) -> list[Open]:
    found = []
    for key, text in sorted(tags.items()):
        if key.startswith(_FINDING_TAG) and text and not text.startswith(_RESOLVED):
            said = _SEVERITY.match(text)
            severity = said[1] if said else "ticket"
            found.append(Open(key.removeprefix(_FINDING_TAG), severity, text[said.end() :] if said else text))
    return found


def _by_slice(metrics: Mapping[str, float], prefix: str) -> dict[Where, float]:
    """``validation/<metric>[/<slice>]`` as (metric, slice)."""
    found = {}
    for key, value in metrics.items():
        if key.startswith(prefix):
            metric, _, cohort = key.removeprefix(prefix).partition("/")
            found[metric, cohort] = value
    return found


def _total(registry: Registry, run_id: str, keys: Sequence[str], name: str) -> float:
    """The sum over all windows of all optimizers."""
    own = [key for key in keys if key.rpartition("/")[2] == name]
    return sum(float(row.value) for key in own for row in registry.metric_history(run_id, key))


def _clip_rate(registry: Registry, run_id: str, keys: Sequence[str]) -> float | None:
    """Clipped steps over steps; None where nothing clipped and nothing had a threshold."""
    clipped = steps = 0.0
    any_clip = False
    for key in (key for key in keys if key.rpartition("/")[2] == "steps"):
        counts = {(row.step, row.timestamp): float(row.value) for row in registry.metric_history(run_id, key)}
        rate = f"{key.rpartition('/')[0]}/clip_rate"
        steps += sum(counts.values())
        if rate in keys:
            any_clip = True
            rows = registry.metric_history(run_id, rate)
            clipped += sum(float(row.value) * counts.get((row.step, row.timestamp), 0.0) for row in rows)
    return clipped / steps if any_clip and steps else None


__all__ = [
    "Evidence", "EvidenceError", "Open", "Registry", "evidence_of_version", "is_version", "of_journal", "of_mlflow",
    "of_run", "of_version", "server",
]  # fmt: skip
