"""Read the committed dashboards: panels, targets, and queries with their variables substituted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
GENERATED = ROOT / "dashboards" / "generated"
UIDS = ("gradwatch-fleet", "gradwatch-oncall", "gradwatch-debug")

#: What Grafana puts in for All.
ALL: Mapping[str, str] = {
    "namespace": ".*", "model": ".*", "run": ".*", "rank": ".*", "layer": ".*",
    "job": ".+", "instance": ".+", "slo_target": "0.99",
}  # fmt: skip
#: Points that a panel of half a screen asks for at most, and the steps that Grafana rounds to, in seconds.
POINTS = 800
STEPS = (15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)


@dataclass(frozen=True)
class Target:
    """One query of a panel or of an annotation."""

    dashboard: str
    panel: str
    kind: str
    ref: str
    expression: str
    instant: bool
    #: Least step that the panel asks for, in seconds.
    interval: float
    #: The panel's own time range in seconds, where it has one.
    span: float | None = None

    @property
    def id(self) -> str:
        return f"{self.dashboard.removeprefix('gradwatch-')}:{self.panel}:{self.ref}"


def load() -> dict[str, dict[str, Any]]:
    return {uid: json.loads((GENERATED / f"{uid}.json").read_text()) for uid in UIDS}


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels that show data, those inside collapsed rows too."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel.get("panels", ())
        else:
            yield panel


def targets() -> list[Target]:
    found = []
    for uid, dashboard in load().items():
        for panel in panels(dashboard):
            least = seconds(panel.get("interval", "1m"))
            span = seconds(panel["timeFrom"]) if "timeFrom" in panel else None
            found += [
                Target(uid, panel["title"], panel["type"], each["refId"], each["expr"], each["instant"], least, span)
                for each in panel["targets"]
            ]
        found += [
            Target(uid, each["name"], "annotation", "A", each["target"]["expr"], False, 60.0)
            for each in dashboard["annotations"]["list"]
            if "expr" in each["target"]
        ]
    return found


def seconds(duration: str) -> float:
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[duration[-1]]


def substituted(expression: str, values: Mapping[str, str]) -> str:
    """``$name`` and ``${name}`` replaced; an unknown variable is an error, as it is a bug."""

    def value(found: re.Match[str]) -> str:
        name = found.group(1) or found.group(2)
        return found.group(0) if name.isdigit() else values[name]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, expression)


def request(target: Target, start: float, end: float, scrape: float, **chosen: str) -> tuple[str, dict[str, str]]:
    """Path and parameters of the request to Prometheus that Grafana would send for this target."""
    start = end - target.span if target.span else start
    least = max((end - start) / POINTS, target.interval if target.interval > 60 else 15.0)
    step = next(step for step in STEPS if step >= least)
    own = {
        "__interval": f"{step}s",
        "__rate_interval": f"{max(step + scrape, 4 * scrape):.0f}s",
        "__range": f"{end - start:.0f}s",
    }
    query = substituted(target.expression, {**ALL, **own, **chosen})
    if target.instant:
        return "/api/v1/query", {"query": query, "time": f"{end:.0f}"}
    return "/api/v1/query_range", {"query": query, "start": f"{start:.0f}", "end": f"{end:.0f}", "step": str(step)}
