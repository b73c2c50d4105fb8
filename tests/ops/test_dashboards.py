"""The committed dashboards: generated identically, linted, and fitting the catalogue."""

from __future__ import annotations

import copy
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gradwatch.catalog import METRICS, Metric
from tests.ops.dashboard_support import promql
from tests.ops.dashboard_support.linter import RULES, SAMPLE
from tests.ops.dashboard_support.panels import ROOT, UIDS, load, panels, substituted, targets

Dashboard = dict[str, Any]
SOURCES = ROOT / "dashboards"
SCRAPED = {"namespace", "pod", "job", "instance", "team"}
FROM_RULES = {"alertname", "alertstate", "severity", "namespace", "model", "run"}
EXPOSED: dict[str, Metric] = {metric.exposed: metric for metric in METRICS}


def metric_of(series: str) -> Metric:
    for suffix in ("_bucket", "_count", "_sum"):
        found = EXPOSED.get(series.removesuffix(suffix))
        if series.endswith(suffix) and found is not None and found.type == "histogram":
            return found
    return EXPOSED[series]


def labels_of(series: str) -> set[str]:
    if series in ("ALERTS", "ALERTS_FOR_STATE"):
        return FROM_RULES
    if series == "up":
        return SCRAPED
    return SCRAPED | set(metric_of(series).all_labels) | ({"le"} if series.endswith("_bucket") else set())


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SOURCES))
    yield importlib.import_module("generate")
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(SOURCES) in str(sys.modules[name].__file__):
            del sys.modules[name]


# -- generation


def test_the_committed_files_are_what_the_sources_generate(generator: ModuleType) -> None:
    assert generator.main(["--check"]) == 0


def test_a_file_that_was_edited_by_hand_fails_the_check(tmp_path: Path) -> None:
    copied = tmp_path / "dashboards"
    shutil.copytree(SOURCES, copied, ignore=shutil.ignore_patterns("__pycache__"))
    edited = copied / "generated" / "gradwatch-fleet.json"
    edited.write_text(edited.read_text().replace("Goodput", "Badput", 1))
    check = subprocess.run(
        [sys.executable, str(copied / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert check.returncode == 1
    assert "gradwatch-fleet.json differs" in check.stderr


@pytest.mark.parametrize("uid", UIDS)
def test_the_json_survives_a_round_trip_through_the_sdk(generator: ModuleType, uid: str) -> None:
    text = (SOURCES / "generated" / f"{uid}.json").read_text()
    built = generator.Built.from_json(json.loads(text))
    assert generator.render(built) == text


def test_there_are_three_dashboards_in_the_classic_schema() -> None:
    for uid, dashboard in load().items():
        assert dashboard["uid"] == uid
        assert dashboard["schemaVersion"] >= 39
        assert "spec" not in dashboard
    assert {path.stem for path in (SOURCES / "generated").iterdir()} == set(UIDS)


# -- lint


@pytest.mark.parametrize("uid", UIDS)
@pytest.mark.parametrize("name", RULES)
def test_no_rule_finds_anything(uid: str, name: str) -> None:
    assert RULES[name](load()[uid]) == []


def _panel(dashboard: Dashboard, kind: str = "timeseries") -> Dashboard:
    return next(panel for panel in panels(dashboard) if panel["type"] == kind)


def _variable(dashboard: Dashboard, name: str) -> Dashboard:
    found: Dashboard = next(each for each in dashboard["templating"]["list"] if each["name"] == name)
    return found


def _expression(text: str) -> Callable[[Dashboard], None]:
    return lambda dashboard: _panel(dashboard)["targets"][0].update(expr=text)


def _drop(name: str) -> Callable[[Dashboard], None]:
    return lambda dashboard: dashboard["templating"]["list"].remove(_variable(dashboard, name))


#: For each rule a way to break a dashboard that it must notice.
BREAKS: dict[str, Callable[[Dashboard], None]] = {
    "template-datasource-rule": _drop("datasource"),
    "template-job-rule": _drop("job"),
    "template-instance-rule": lambda d: _variable(d, "instance").update(allValue=".*"),
    "template-label-promql-rule": lambda d: _variable(d, "model").update(query="label_values(a{b=}, model)"),
    "template-on-time-change-reload-rule": lambda d: _variable(d, "run").update(refresh=1),
    "panel-datasource-rule": lambda d: _panel(d)["targets"][0].update(datasource={"uid": "prod"}),
    "panel-title-description-rule": lambda d: _panel(d).update(description="A norm."),
    "panel-units-rule": lambda d: _panel(d)["fieldConfig"]["defaults"].update(unit="norms"),
    "panel-no-targets-rule": lambda d: _panel(d).update(targets=[]),
    "target-promql-rule": _expression("sum(rate(x[5m])"),
    "target-rate-interval-rule": _expression("rate(gradwatch_steps_total[5m])"),
    "target-job-rule": _expression('gradwatch_step{instance=~"$instance"}'),
    "target-instance-rule": _expression('gradwatch_step{job=~"$job"}'),
    "target-counter-agg-rule": _expression("max(gradwatch_steps_total)"),
    "uneditable-dashboard": lambda d: d.update(editable=True),
    "unique-panel-ids": lambda d: d["panels"][1].update(id=d["panels"][2]["id"]),
    "unique-ref-ids": lambda d: _panel(d)["targets"].append(copy.deepcopy(_panel(d)["targets"][0])),
    "panels-inside-the-grid-without-overlap": lambda d: d["panels"][2]["gridPos"].update(x=1),
    "rows-are-filled": lambda d: d["panels"].pop(3),
    "current-panel-types": lambda d: _panel(d).update(type="graph"),
    "budget-colours": lambda d: _panel(d)["fieldConfig"]["defaults"].pop("thresholds"),
    "known-variables": _expression('gradwatch_step{run=~"$runs"}'),
    "links-keep-time-and-variables": lambda d: d["links"][0].update(keepTime=False),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_notices_what_it_is_for(name: str) -> None:
    broken = copy.deepcopy(load()["gradwatch-debug"])
    BREAKS[name](broken)
    assert RULES[name](broken)


# -- the catalogue


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.id)
def test_metrics_and_labels_of_every_query_are_in_the_catalogue(target: Any) -> None:
    """Matchers, groupings and joins use labels that the series carry."""
    promql.available(substituted(target.expression, SAMPLE), labels_of)


@pytest.mark.parametrize(
    "expression",
    [
        "gradwatch_gradient_norm",
        'gradwatch_grad_norm{layer="a"}',
        "max by (layer) (gradwatch_grad_norm)",
        "gradwatch_grad_norm * on (run) group_left (team_name) gradwatch_run_info",
        "histogram_quantile(0.5, sum by (run) (rate(gradwatch_step_duration_seconds_bucket[4m])))",
    ],
)
def test_a_metric_or_label_that_is_not_there_is_noticed(expression: str) -> None:
    with pytest.raises(LookupError):
        promql.available(expression, labels_of)


def test_every_catalogued_metric_is_shown_on_a_dashboard() -> None:
    shown = {
        metric_of(selector.metric).name
        for target in targets()
        for selector in promql.selectors(substituted(target.expression, SAMPLE))
        if selector.metric not in ("ALERTS", "ALERTS_FOR_STATE", "up")
    }
    assert {metric.name for metric in METRICS} - shown == set()


def test_a_run_is_filtered_by_namespace_and_the_bridge_is_not() -> None:
    """The bridge's namespace is its own: filtering by it would hide what it says about a run elsewhere."""
    for target in targets():
        for selector in promql.selectors(substituted(target.expression, SAMPLE)):
            metric = EXPOSED.get(re.sub(r"_bucket$", "", selector.metric))
            if metric is None:
                continue
            filtered = ("namespace", "=~", ".*") in selector.matchers
            assert filtered == (metric.scope != "bridge"), f"{target.id}: {selector.metric}"


def test_panels_that_the_bridge_alone_feeds_say_so() -> None:
    for dashboard in load().values():
        for panel in panels(dashboard):
            scopes = {
                EXPOSED[selector.metric].scope
                for target in panel["targets"]
                for selector in promql.selectors(substituted(target["expr"], SAMPLE))
                if selector.metric in EXPOSED
            }
            if scopes == {"bridge"}:
                assert "Comes from the bridge alone" in panel["description"], panel["title"]


# -- variables, links, annotations

VARIABLES = {
    "gradwatch-fleet": ["datasource", "namespace", "model", "run", "slo_target", "mlflow", "job", "instance"],
    "gradwatch-oncall": ["datasource", "namespace", "model", "run", "mlflow", "job", "instance"],
    "gradwatch-debug": ["datasource", "namespace", "model", "run", "rank", "layer", "mlflow", "job", "instance"],
}


@pytest.mark.parametrize("uid", UIDS)
def test_the_variables_of_each_dashboard(uid: str) -> None:
    assert [each["name"] for each in load()[uid]["templating"]["list"]] == VARIABLES[uid]


@pytest.mark.parametrize("uid", UIDS)
def test_all_namespaces_includes_having_none(uid: str) -> None:
    """On a laptop nothing has a namespace, and ``.+`` would match nothing."""
    for name in ("namespace", "model"):
        variable = _variable(load()[uid], name)
        assert (variable["allValue"], variable["current"]["value"]) == (".*", ["$__all"])


def test_what_says_which_run_to_choose_sees_all_runs() -> None:
    """Choosing a run must not empty the table in which the next one is chosen, nor the strip about gradwatch."""
    oncall = load()["gradwatch-oncall"]
    start = [each["title"] for each in oncall["panels"]].index("Do they learn?")
    for panel in oncall["panels"][:start] + list(panels(load()["gradwatch-fleet"])):
        for target in panel.get("targets", ()):
            assert "$run" not in target["expr"], panel["title"]
    for title in ("Loss, training and validation", "Pre-clip gradient norm and threshold"):
        chosen = next(panel for panel in panels(oncall) if panel["title"] == title)
        assert 'run=~"$run"' in chosen["targets"][0]["expr"]


def test_graphs_of_runs_open_with_the_run_that_needs_somebody() -> None:
    """All runs at once are two hundred lines, and seconds of work for Prometheus."""
    for uid in ("gradwatch-oncall", "gradwatch-debug"):
        run = _variable(load()[uid], "run")
        assert (run["includeAll"], run["multi"], run["sort"]) == (False, True, 0)
        assert run["query"].startswith("query_result(sort_desc(")


@pytest.mark.parametrize("uid", UIDS)
def test_findings_alerts_and_restarts_are_annotations(uid: str) -> None:
    """The fleet shows alerts alone: findings and restarts of all runs would cover every graph."""
    names = [each["name"] for each in load()[uid]["annotations"]["list"] if each["enable"]]
    of_runs = uid != "gradwatch-fleet"
    assert names == [*["Findings"] * of_runs, "Alerts", *["Restarts"] * of_runs, "Notes from the bridge"]


def _links(panel: Dashboard) -> list[str]:
    config = panel["fieldConfig"]
    links = list(config["defaults"].get("links", []))
    for override in config["overrides"]:
        for each in override["properties"]:
            links += each["value"] if each["id"] == "links" else []
    return [link["url"] for link in links]


@pytest.mark.parametrize("uid", UIDS)
def test_links_to_dashboards_keep_time_and_run(uid: str) -> None:
    for panel in panels(load()[uid]):
        for url in _links(panel):
            if url.startswith("/d/"):
                assert url.removeprefix("/d/").partition("?")[0] in UIDS
                assert "${__url_time_range}" in url
                assert "var-run=" in url
            else:
                assert url.startswith("${mlflow:raw}/#/runs/"), url


def test_every_graph_of_a_run_opens_its_mlflow_run() -> None:
    """The label that the link reads must be on the series, so each query has to be joined with it."""
    for uid, dashboard in load().items():
        for panel in panels(dashboard):
            names_runs = [target for target in panel["targets"] if "{{run_name}}" in target.get("legendFormat", "")]
            for target in names_runs:
                carried = promql.available(substituted(target["expr"], SAMPLE), labels_of)
                assert {"run_name", "mlflow_run_id"} <= carried, f"{uid}: {panel['title']}"
            if names_runs and panel["type"] == "timeseries":
                assert any("/#/runs/" in url for url in _links(panel)), f"{uid}: {panel['title']}"


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.id)
def test_legends_name_labels_that_the_series_carry(target: Any) -> None:
    panel = next((p for p in panels(load()[target.dashboard]) if p["title"] == target.panel), None)
    if panel is None:
        return
    legend = next(each["legendFormat"] for each in panel["targets"] if each["refId"] == target.ref)
    carried = promql.available(substituted(target.expression, SAMPLE), labels_of)
    assert set(re.findall(r"{{(\w+)}}", legend)) <= carried


@pytest.mark.parametrize("uid", UIDS)
def test_columns_of_tables_come_from_their_queries(uid: str) -> None:
    for panel in panels(load()[uid]):
        steps = {step["id"]: step["options"] for step in panel.get("transformations", [])}
        if "filterFieldsByName" not in steps:
            continue
        fields: set[str] = set()
        for target in panel["targets"]:
            fields |= promql.available(substituted(target["expr"], SAMPLE), labels_of)
            fields.add(f"Value #{target['refId']}" if len(panel["targets"]) > 1 else "Value")
        wanted = steps["filterFieldsByName"]["include"]["names"]
        assert set(wanted) <= fields, f"{panel['title']}: {set(wanted) - fields}"
        titles = set(steps["organize"]["renameByName"].values())
        assert {each["matcher"]["options"] for each in panel["fieldConfig"]["overrides"]} <= titles
