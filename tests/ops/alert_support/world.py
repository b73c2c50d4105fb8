"""Series as agents and the bridge would export them, in promtool's notation, a sample a minute.

A value is a number (constant over the whole case) or promtool's notation: ``0x9 3x50`` is ten minutes at 0, then 3;
``_x60`` is an hour without a scrape; ``stale`` is a target that has gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradwatch.catalog import BY_NAME, RUN_STATES

Series = tuple[str, str]
Value = float | str
#: Minutes that a constant lasts.
LONG = 300


def series(name: str, value: Value, minutes: int = LONG, /, **labels: str) -> Series:
    """One series; ``name`` is catalogued, or a name as Prometheus makes it (``up``)."""
    metric = BY_NAME.get(name)
    if metric is not None:
        unknown = set(labels) - set(metric.all_labels) - {"namespace", "pod", "instance", "job", "team"}
        assert not unknown, f"{name} has no label {unknown}"
    shown = ", ".join(f'{label}="{text}"' for label, text in labels.items() if text)
    values = value if isinstance(value, str) else f"{value}x{minutes}"
    return f"{name if metric is None else metric.exposed}{{{shown}}}", values


def run(
    *,
    model: str = "lstm",
    run: str = "r1",
    name: str = "swift-fox",
    tier: str = "experiment",
    namespace: str = "ml",
    pod: str = "a",
    state: str | Mapping[str, str] = "running",
    minutes: int = LONG,
    lasts: str = "",
    **metrics: Value,
) -> list[Series]:
    """A run as the agent beside it exports it. ``metrics`` are metrics of the run with the default labels below;
    ``lasts`` is put behind every value: ``_x60`` or ``stale``."""
    place = {"namespace": namespace, "pod": pod}
    of_run = {"model": model, "run": run, **place}
    states: Mapping[str, str] = {state: f"1x{minutes}"} if isinstance(state, str) else state
    made = [series("run_state", states.get(each, f"0x{minutes}"), state=each, **of_run) for each in RUN_STATES]
    made.append(series("run", 1, minutes, run_name=name, tier=tier, team="vision", **of_run))
    defaults: dict[str, Value] = {"recent_steps": 1000, "recent_clipped_steps": 0, "clip_rate_budget": 0.1}
    defaults |= {"recent_nonfinite_steps": 0, "nonfinite_steps_in_a_row": 0, "generalization_gap_budget": 0.1}
    more: dict[str, dict[str, str]] = {
        "generalization_gap": {"metric": "loss", "slice": ""},
        "gap_over_budget_validations": {"metric": "loss", "slice": ""},
        "generalization_gap_budget": {"metric": "loss"},
        "loss": {"split": "train", "slice": ""},
        "journal_rows_missed": {"rank": "0"},
    }
    for metric, value in {**defaults, **metrics}.items():
        labels = more.get(metric, {"optimizer": "adamw"} if "optimizer" in BY_NAME[metric].labels else {})
        if value != "":
            made.append(series(metric, value, minutes, **of_run, **labels))
    return [(label, f"{values} {lasts}".strip()) for label, values in made]


def finding(code: str, severity: str, value: Value = 1, **labels: str) -> list[Series]:
    place = {"model": "lstm", "run": "r1", "namespace": "ml", "pod": "a"}
    return [series("finding_active", value, code=code, severity=severity, **{**place, **labels})]


def bridge(*, poll: Value = "0+60x300", namespace: str = "monitoring") -> list[Series]:
    """A bridge that polls well, unless told otherwise."""
    return [series("bridge_last_poll_timestamp_seconds", poll, namespace=namespace, pod="bridge-0")]


def heartbeat(value: Value, *, tier: str = "experiment", run: str = "r1") -> list[Series]:
    """The last heartbeat of a run that MLflow calls RUNNING, as the bridge exports it."""
    place = {"namespace": "monitoring", "pod": "bridge-0"}
    labels = {"model": "lstm", "run": run, "run_name": "swift-fox", "tier": tier}
    return [series("run_heartbeat_timestamp_seconds", value, **labels, **place)]


def versions(current: Mapping[str, float], previous: Mapping[str, float], *, alias: str = "latest") -> list[Series]:
    """Two versions of a model with their scores."""
    place = {"namespace": "monitoring", "model": "lstm"}
    made = []
    for version, which, scores in (("2", alias, current), ("1", "previous", previous)):
        made.append(series("model_version_info", 1, alias=which, version=version, run=f"r{version}", **place))
        made += [series("model_version_score", v, version=version, name=name, **place) for name, v in scores.items()]
    return made


def slo(good: Value, bad: Value, *, run: str = "r1", minutes: int = LONG) -> list[Series]:
    place = {"model": "lstm", "run": run, "namespace": "ml", "slo": "freshness"}
    return [
        series("slo_events", value, minutes, result=result, **place) for result, value in (("good", good), ("bad", bad))
    ]


def document(rules: Sequence[str], inputs: Sequence[Series], **checks: Any) -> dict[str, Any]:
    """A file for ``promtool test rules``."""
    listed = [{"series": name, "values": values} for name, values in inputs]
    test = {"interval": "1m", "input_series": listed, **checks}
    return {"rule_files": list(rules), "evaluation_interval": "1m", "tests": [test]}
