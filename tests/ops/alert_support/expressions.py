"""Which labels a series that a rule may use can have: scraped, recorded, or made by Prometheus."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gradwatch.catalog import METRICS, Metric
from tests.ops.dashboard_support import promql

ROOT = Path(__file__).parents[3]
#: What Prometheus attaches to a series that it scrapes.
SCRAPED = {"namespace", "pod", "job", "instance", "team"}
MADE = {"ALERTS": {"alertname", "alertstate", "severity", "namespace", "model", "run"}, "up": SCRAPED}
EXPOSED: dict[str, Metric] = {metric.exposed: metric for metric in METRICS}


@cache
def rules() -> list[dict[str, Any]]:
    """All rules of the committed files, in order."""
    files = sorted((ROOT / "alerts" / "rules").glob("*.yaml"))
    return [rule for path in files for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def metric_of(series: str) -> Metric:
    """The catalogued metric behind a series; a ``KeyError`` where there is none."""
    for suffix in ("_bucket", "_count", "_sum"):
        found = EXPOSED.get(series.removesuffix(suffix))
        if series.endswith(suffix) and found is not None and found.type == "histogram":
            return found
    return EXPOSED[series]


@cache
def labels_of(series: str) -> set[str]:
    """Labels that a series may have; a ``KeyError`` where nobody exports or records it."""
    if series in MADE:
        return MADE[series]
    for rule in rules():
        if rule.get("record") == series:
            return promql.available(rule["expr"], labels_of)
    return SCRAPED | set(metric_of(series).all_labels)
