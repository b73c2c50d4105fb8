"""The rules of Grafana's dashboard linter, from its published documentation, and rules of structure.

Each rule takes a dashboard as a mapping and returns what is wrong with it, a
sentence each. Names of the linter's rules are kept, so that they can be looked
up. Where its code looks at some types of panels only, these look at all; where
its text asks for more than its code checks (``increase``), so do these.

``job`` and ``instance`` are asked of every scraped series. ``ALERTS`` and
``ALERTS_FOR_STATE`` are not scraped: rules make them, and rules aggregate the
two labels away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

from tests.ops.dashboard_support import promql
from tests.ops.dashboard_support.panels import ALL, panels, substituted

Dashboard = Mapping[str, Any]
Rule = Callable[[Dashboard], list[str]]
RULES: dict[str, Rule] = {}

#: Durations that occur nowhere else, to be known again in the syntax tree.
RATE_INTERVAL, RANGE, INTERVAL = 8_869.0, 606_977.0, 48_679.0
SAMPLE = {
    **ALL, "__rate_interval": f"{RATE_INTERVAL:.0f}s", "__range": f"{RANGE:.0f}s", "__interval": f"{INTERVAL:.0f}s",
}  # fmt: skip
#: Units of Grafana's valueFormats/categories that are used here; a further one is added on purpose.
UNITS = {"none", "short", "percentunit", "sci", "s", "bytes", "cps", "bool_yes_no"}
CURRENT_PANELS = {"timeseries", "table", "stat", "heatmap", "bargauge", "state-timeline", "status-history", "text"}
MADE_BY_RULES = ("ALERTS", "ALERTS_FOR_STATE")


def rule(name: str) -> Callable[[Rule], Rule]:
    def register(check: Rule) -> Rule:
        RULES[name] = check
        return check

    return register


def expressions(dashboard: Dashboard) -> Iterator[tuple[str, str]]:
    """(where, PromQL with sample values for the variables) of all panels and annotations."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield f"{panel['title']}:{target['refId']}", substituted(target["expr"], SAMPLE)
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation["target"]:
            yield annotation["name"], substituted(annotation["target"]["expr"], SAMPLE)


def _variables(dashboard: Dashboard, kind: str) -> list[dict[str, Any]]:
    return [each for each in dashboard["templating"]["list"] if each["type"] == kind]


# -- the linter's rules


@rule("template-datasource-rule")
def _(dashboard: Dashboard) -> list[str]:
    sources = _variables(dashboard, "datasource")
    if len(sources) != 1:
        return [f"{len(sources)} data source variables, not one"]
    one = sources[0]
    told = (one["name"], one["label"], one["query"])
    return [] if told == ("datasource", "Data source", "prometheus") else [f"data source variable is {told}"]


def _scrape_variable(dashboard: Dashboard, name: str) -> list[str]:
    found = [each for each in _variables(dashboard, "query") if each["name"] == name]
    if len(found) != 1:
        return [f"no query variable {name}"]
    one = found[0]
    wanted = {"label": name.title(), "multi": True, "allValue": ".+"}
    wrong = [f"{name}: {key} is {one.get(key)!r}" for key, value in wanted.items() if one.get(key) != value]
    if one["datasource"]["uid"] != "${datasource}":
        wrong.append(f"{name}: data source is {one['datasource']['uid']}")
    return wrong


@rule("template-job-rule")
def _(dashboard: Dashboard) -> list[str]:
    return _scrape_variable(dashboard, "job")


@rule("template-instance-rule")
def _(dashboard: Dashboard) -> list[str]:
    return _scrape_variable(dashboard, "instance")


@rule("template-label-promql-rule")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    for variable in _variables(dashboard, "query"):
        found = re.fullmatch(r"(label_values|query_result)\((.+?)(?:, (\w+))?\)", variable["query"])
        if found is None or (found[1] == "label_values") != (found[3] is not None):
            wrong.append(f"{variable['name']}: {variable['query']}")
            continue
        try:
            promql.parse(substituted(found[2], SAMPLE))
        except ValueError as error:
            wrong.append(f"{variable['name']}: {error}")
    return wrong


@rule("template-on-time-change-reload-rule")
def _(dashboard: Dashboard) -> list[str]:
    on_time_range_change = 2
    return [each["name"] for each in _variables(dashboard, "query") if each["refresh"] != on_time_range_change]


@rule("panel-datasource-rule")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    for panel in panels(dashboard):
        sources = [panel.get("datasource"), *(target.get("datasource") for target in panel["targets"])]
        wrong += [f"{panel['title']}: {each}" for each in sources if not each or each["uid"] != "${datasource}"]
    return wrong


@rule("panel-title-description-rule")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    for panel in panels(dashboard):
        if not panel.get("title"):
            wrong.append(f"panel {panel['id']} has no title")
        if "Healthy:" not in panel.get("description", ""):
            wrong.append(f"{panel.get('title')}: the description does not say what healthy looks like")
    return wrong


@rule("panel-units-rule")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    for panel in panels(dashboard):
        units = [panel["fieldConfig"]["defaults"].get("unit")]
        for override in panel["fieldConfig"]["overrides"]:
            units += [each["value"] for each in override["properties"] if each["id"] == "unit"]
        wrong += [f"{panel['title']}: unit {unit!r}" for unit in units if unit not in UNITS]
    return wrong


@rule("panel-no-targets-rule")
def _(dashboard: Dashboard) -> list[str]:
    return [panel["title"] for panel in panels(dashboard) if not panel["targets"]]


@rule("target-promql-rule")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    for where, expression in expressions(dashboard):
        try:
            promql.parse(expression)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    return wrong


@rule("target-rate-interval-rule")
def _(dashboard: Dashboard) -> list[str]:
    """``rate`` over ``$__rate_interval``; ``increase`` over it, or on purpose over all of ``$__range``."""
    allowed = {"rate": {RATE_INTERVAL}, "irate": {RATE_INTERVAL}, "increase": {RATE_INTERVAL, RANGE}}
    wrong = []
    for where, selector in _selectors(dashboard):
        if selector.range is None:
            continue
        nearest = selector.around[0] if selector.around else ""
        if selector.range not in allowed.get(nearest, {selector.range}):
            wrong.append(f"{where}: {nearest} over {selector.range:g} s")
        if selector.range == RATE_INTERVAL and nearest not in allowed:
            wrong.append(f"{where}: $__rate_interval in {nearest}")
    return wrong


def _selectors(dashboard: Dashboard) -> Iterator[tuple[str, promql.Selector]]:
    for where, expression in expressions(dashboard):
        try:
            found = promql.selectors(expression)
        except ValueError:  # another rule's
            continue
        yield from ((where, selector) for selector in found)


def _required(dashboard: Dashboard, label: str) -> list[str]:
    wrong = []
    for where, selector in _selectors(dashboard):
        if selector.metric not in MADE_BY_RULES and (label, "=~", ALL[label]) not in selector.matchers:
            wrong.append(f"{where}: {selector.metric} without {label}")
    return wrong


@rule("target-job-rule")
def _(dashboard: Dashboard) -> list[str]:
    return _required(dashboard, "job")


@rule("target-instance-rule")
def _(dashboard: Dashboard) -> list[str]:
    return _required(dashboard, "instance")


@rule("target-counter-agg-rule")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    for where, selector in _selectors(dashboard):
        if selector.metric.endswith("_total") and selector.around[:1] not in (("rate",), ("irate",), ("increase",)):
            wrong.append(f"{where}: {selector.metric}")
    return wrong


@rule("uneditable-dashboard")
def _(dashboard: Dashboard) -> list[str]:
    return [] if dashboard.get("editable") is False else ["editable"]


# -- structure


@rule("unique-panel-ids")
def _(dashboard: Dashboard) -> list[str]:
    counts = Counter(panel.get("id") for panel in dashboard["panels"])
    return [f"panel id {id_}: {n}" for id_, n in counts.items() if n > 1 or not id_]


@rule("unique-ref-ids")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    for panel in panels(dashboard):
        refs = [target.get("refId") for target in panel["targets"]]
        if len(set(refs)) != len(refs) or not all(refs):
            wrong.append(f"{panel['title']}: {refs}")
    return wrong


@rule("panels-inside-the-grid-without-overlap")
def _(dashboard: Dashboard) -> list[str]:
    wrong = []
    placed = [(panel["title"], panel["gridPos"]) for panel in dashboard["panels"]]
    for title, box in placed:
        if box["x"] < 0 or box["y"] < 0 or box["w"] < 1 or box["h"] < 1 or box["x"] + box["w"] > 24:
            wrong.append(f"{title}: {box}")
    for (title, a), (other, b) in combinations(placed, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        if not apart and not (a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]):
            wrong.append(f"{title} overlaps {other}")
    return wrong


@rule("rows-are-filled")
def _(dashboard: Dashboard) -> list[str]:
    """No holes: the area of the panels is that of the grid down to the last."""
    area = sum(panel["gridPos"]["w"] * panel["gridPos"]["h"] for panel in dashboard["panels"])
    depth = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    return [] if area == 24 * depth else [f"{24 * depth - area} cells are empty"]


@rule("current-panel-types")
def _(dashboard: Dashboard) -> list[str]:
    return [f"{each['title']}: {each['type']}" for each in panels(dashboard) if each["type"] not in CURRENT_PANELS]


@rule("budget-colours")
def _(dashboard: Dashboard) -> list[str]:
    """Every panel has threshold steps: the first without a bound, the others rising."""
    wrong = []
    for panel in panels(dashboard):
        sets = [panel["fieldConfig"]["defaults"].get("thresholds")] if panel["type"] != "heatmap" else []
        for override in panel["fieldConfig"]["overrides"]:
            sets += [each["value"] for each in override["properties"] if each["id"] == "thresholds"]
        for each in sets:
            bounds = [step["value"] for step in (each or {}).get("steps", [])]
            if not bounds or bounds[0] is not None or bounds[1:] != sorted(set(bounds[1:])):
                wrong.append(f"{panel['title']}: {bounds}")
    return wrong


@rule("known-variables")
def _(dashboard: Dashboard) -> list[str]:
    """Every variable that is asked for is defined here, or is Grafana's own."""
    defined = {each["name"] for each in dashboard["templating"]["list"]}
    text = [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]
    text += [str(each.get("query")) for each in dashboard["templating"]["list"]]
    used = {name for each in text for name in re.findall(r"\$\{?([A-Za-z]\w*)", each)}
    return sorted(name for name in used - defined if not name.startswith("__"))


@rule("links-keep-time-and-variables")
def _(dashboard: Dashboard) -> list[str]:
    links = [each for each in dashboard["links"] if "gradwatch" in each["tags"]]
    kept = [each for each in links if each["keepTime"] and each["includeVars"] and each["type"] == "dashboards"]
    return [] if kept and "gradwatch" in dashboard["tags"] else ["no link to the other dashboards"]
