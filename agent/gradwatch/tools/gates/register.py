"""Registering a run: the version's tags, its model card, and who was champion before.

Moving an alias leaves no trace in MLflow, so the former champion is written
down first: as the model's tag ``gradwatch.previous_version``, which the bridge
reads, and on the new version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gradwatch.sinks.mlflow.entities import PREFIX, cut, safe_key, tag_text
from gradwatch.sinks.mlflow.facts import COSTS, PREVIOUS_TAG, hyperparameters
from gradwatch.sinks.mlflow.tracking import Kind, TrackingError
from gradwatch.tools.gates.checks import Check, passes
from gradwatch.tools.gates.evidence import Evidence, EvidenceError, Registry

_BEGIN: Final = "<!-- gradwatch -->"
_END: Final = "<!-- /gradwatch -->"
_SECTION: Final = re.compile(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", re.DOTALL)
#: Parameters that a version carries as tags, under the same names, where they are recorded.
_TAGGED: Final = ("max_norm", "seed", "git.commit", "precision.training", "config.data_fingerprint")
#: Hyperparameters under plain names.
_PLAIN: Final = ("lr", "batch_size", "accumulation_steps", "weight_decay")
MAX_CARD: Final = 4000


@dataclass(frozen=True, slots=True)
class Judged:
    """What the gates said of a run; ``gate`` is None where there was no champion to compare with."""

    audit: Sequence[Check]
    gate: Sequence[Check] | None
    against: str = ""

    @property
    def passed(self) -> bool:
        return passes(self.audit) and (self.gate is None or passes(self.gate))


def champion_of(registry: Registry, model: str, alias: str) -> str | None:
    """The number of the version with this alias; None where there is no such model or alias."""
    try:
        registered = registry.model(model)
    except TrackingError as error:
        if error.kind in (Kind.GONE, Kind.REJECTED):
            return None
        raise EvidenceError(f"MLflow at {registry.uri} cannot be asked for model {model!r}: {error}") from None
    number = (registered.aliases or {}).get(alias)
    return None if number is None else str(number)


def register(registry: Registry, run: Evidence, model: str, source: str, judged: Judged, former: str | None) -> str:
    """A new version of ``model`` with tags and card; its number. The model is made where there is none.

    Raises ``EvidenceError`` where MLflow refuses or does not answer.
    """
    try:
        try:
            registry.model(model)
        except TrackingError as error:
            if error.kind not in (Kind.GONE, Kind.REJECTED):
                raise
            registry.create_model(model)
        made: Any = registry.create_version(model, source, run.mlflow_run)
        number = str(made.version)
        registry.tag_version(model, number, tags(run, judged, former))
        registry.describe_version(model, number, card(made.description or "", run, judged))
    except TrackingError as error:
        raise EvidenceError(f"MLflow at {registry.uri} did not take a version of {model!r}: {error}") from None
    return number


def promote(registry: Registry, model: str, number: str, alias: str, former: str | None) -> None:
    """Move the alias; the former champion is remembered before, so that it is never forgotten."""
    try:
        if former is not None and former != number:
            registry.tag_model(model, PREVIOUS_TAG, former)
        registry.set_alias(model, alias, number)
    except TrackingError as error:
        raise EvidenceError(
            f"version {number} of {model!r} is registered, but the alias {alias!r} could not be moved: {error}"
        ) from None


def tags(run: Evidence, judged: Judged, former: str | None) -> dict[str, str]:
    """Metadata, what was observed, and the gates' results, under ``gradwatch.``."""
    plain, words = hyperparameters(run.params)
    found: dict[str, object] = {"run": run.run, "audit": _result(judged.audit)}
    found |= {name: run.params[name] for name in _TAGGED if name in run.params}
    found |= {name: f"{plain[name]:g}" for name in _PLAIN if name in plain}
    found |= {k: v for k, v in run.params.items() if k.startswith("group.") and k.endswith(".weight_decay")}
    found |= words
    found |= {name: f"{value:g}" for name, value in run.costs.items() if name in COSTS}
    if run.clip_rate is not None:
        found["clip_rate"] = f"{run.clip_rate:.6g}"
    if run.weight_norm is not None:
        found["weight_norm"] = f"{run.weight_norm:.6g}"
    found["gate"] = "no champion" if judged.gate is None else _result(judged.gate)
    bad = [check.name for check in (*judged.audit, *(judged.gate or ())) if check.result == "failed"]
    if bad:
        found["gate_failed"] = ", ".join(bad)
    if judged.against:
        found["gate_against"] = judged.against
    if former is not None:
        found["previous_champion"] = former
    return {safe_key(PREFIX + name): tag_text(value) for name, value in found.items()}


def _result(checks: Sequence[Check]) -> str:
    return "passed" if passes(checks) else "failed"


def card(description: str, run: Evidence, judged: Judged) -> str:
    """``description`` with a section on how the version was trained; one that stands there is replaced."""
    section = "\n".join([_BEGIN, "## Training, as gradwatch saw it", "", *_lines(run, judged), _END])
    if _SECTION.search(description):
        return _SECTION.sub(lambda _: section, description, count=1)
    return f"{description.rstrip()}\n\n{section}".lstrip()


def _lines(run: Evidence, judged: Judged) -> list[str]:
    plain, words = hyperparameters(run.params)
    decays = {k.split(".", 1)[1].rpartition(".")[0]: v for k, v in sorted(run.params.items()) if _is_decay(k)}
    told: Mapping[str, str] = {
        "Clip threshold": run.params.get("max_norm", "none recorded"),
        "Observed clip rate": "nothing clipped" if run.clip_rate is None else f"{run.clip_rate:.1%} of the steps",
        "Weight decay": ", ".join(f"{group}: {decay}" for group, decay in decays.items()) or "none recorded",
        "Optimizer": words.get("optimizer", "none recorded"),
        "Schedule": words.get("scheduler") or run.params.get("config.schedule", "none recorded"),
        "Learning rate": f"{plain['lr']:g}" if "lr" in plain else "none recorded",
        "Audit": _result(judged.audit),
        "Gate": "no champion to compare with"
        if judged.gate is None
        else f"{_result(judged.gate)} against {judged.against}",
        "Run": run.run,
    }
    return [f"- {name}: {cut(value, MAX_CARD // len(told))}" for name, value in told.items()]


def _is_decay(key: str) -> bool:
    return key.startswith("group.") and key.endswith(".weight_decay")
