"""The variables, annotations and links at the top of every dashboard."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import DataSourceRef
from grafana_foundation_sdk.models.dashboard import (
    AnnotationQuery,
    AnnotationTarget,
    DashboardLink,
    DashboardLinkType,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

import queries
from common import SOURCE
from gradwatch.catalog import BY_NAME

ALL = VariableOption(selected=True, text=["All"], value=["$__all"])


def _query(name: str, label: str, description: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .description(description)
        .datasource(SOURCE)
        .query(query)
        .definition(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(ALL)
    )


def data_source() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus").multi(False)


def namespace() -> dashboard.QueryVariable:
    return _label("namespace", "Namespace", "Kubernetes namespace of the agents; All where there is none.", "")


def model() -> dashboard.QueryVariable:
    return _label("model", "Model", "Model names, as given to watch().", 'namespace=~"$namespace"')


def _label(
    name: str, label: str, description: str, matchers: str, metric: str = "run_state"
) -> dashboard.QueryVariable:
    exposed = BY_NAME[metric].exposed
    return _query(name, label, description, f"label_values({exposed}{{{matchers}}}, {name})")


def run(*, one: bool) -> dashboard.QueryVariable:
    """Runs by name over the selected range, ended ones too; the value is the run's id.

    ``label_values`` gives one label, and people know names while series carry
    ids, so this asks for both and takes text and value apart by a pattern.
    With ``one``, a dashboard opens with the run that has most open findings
    instead of all: graphs of two hundred runs tell nothing, and cost seconds.
    """
    query = queries.RUN_TITLES_BY_NEED if one else queries.RUN_TITLES
    variable = _query("run", "Run", "Runs of the selected time range by name, ended ones too.", query)
    variable.regex('/run="(?<value>[^"]+)".*title="(?<text>[^"]+)"/')
    if not one:
        return variable
    nothing = VariableOption(selected=False, text=[], value=[])
    return variable.include_all(False).sort(VariableSort.DISABLED).current(nothing)


def rank() -> dashboard.QueryVariable:
    return _label("rank", "Rank", "Ranks of the chosen runs.", 'model=~"$model", run=~"$run"', "rank_step").sort(
        VariableSort.NUMERICAL_ASC
    )


def layer() -> dashboard.QueryVariable:
    return _label(
        "layer",
        "Layer",
        "Layers of the chosen runs: the top ones, and 'other'.",
        'model=~"$model", run=~"$run"',
        "layer_grad_norm",
    ).sort(VariableSort.NATURAL_ASC)


def scrape(name: str) -> dashboard.QueryVariable:
    """``job`` and ``instance``: not in the bar, but a link may set them."""
    query = f'label_values({{__name__=~"gradwatch_agent_info|gradwatch_bridge_last_poll_timestamp_seconds"}}, {name})'
    return (
        _query(name, name.title(), f"Scrape {name} of the agents and the bridge.", query)
        .all_value(".+")
        .hide(VariableHide.HIDE_VARIABLE)
    )


def mlflow() -> dashboard.TextBoxVariable:
    address = "http://127.0.0.1:5000"
    return (
        dashboard.TextBoxVariable("mlflow")
        .label("MLflow")
        .description("Address of the MLflow server that data links open, without a slash at the end.")
        .default_value(address)
        .current(VariableOption(selected=True, text=address, value=address))
    )


def slo_target() -> dashboard.CustomVariable:
    targets = ["0.9", "0.95", "0.99", "0.995", "0.999"]
    return (
        dashboard.CustomVariable("slo_target")
        .label("SLO target")
        .description("Share of good events that is promised; the rest is the error budget.")
        .values(",".join(targets))
        .options([VariableOption(selected=each == "0.99", text=each, value=each) for each in targets])
        .current(VariableOption(selected=True, text="0.99", value="0.99"))
        .multi(False)
        .include_all(False)
    )


def marks(*, of_runs: bool) -> list[Builder[AnnotationQuery]]:
    """Alerts and the bridge's notes; where runs are chosen, their findings and restarts too."""
    notes = (
        dashboard.AnnotationQuery()
        .name("Notes from the bridge")
        .datasource(DataSourceRef(type_val="grafana", uid="-- Grafana --"))
        .enable(True)
        .hide(False)
        .icon_color("purple")
        .target(_Tagged())
    )
    where = "{{severity}} · {{model}} · {{run}}"
    if not of_runs:
        alerts = queries.of_all_runs(queries.ALERTS)
        return [_from_prometheus("Alerts", alerts, "red", "{{alertname}}", where), notes]
    return [
        _from_prometheus("Findings", queries.FINDING_OPEN, "yellow", "{{code}}", where),
        _from_prometheus("Alerts", queries.ALERTS, "red", "{{alertname}}", where),
        _from_prometheus("Restarts", queries.RESTARTED, "blue", "restarted", "{{model}} · {{run}}"),
        notes,
    ]


class _Tagged(prometheus.Dataquery):
    """Grafana's own annotations that carry our tag: no Prometheus query, yet it goes the same way."""

    def build(self) -> Any:
        return AnnotationTarget(limit=100, match_any=False, tags=["gradwatch"], type_val="tags")


def _from_prometheus(name: str, expression: str, colour: str, title: str, text: str) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name(name)
        .datasource(SOURCE)
        .enable(True)
        .hide(False)
        .icon_color(colour)
        .title_format(title)
        .text_format(text)
        .target(prometheus.Dataquery().expr(expression).interval("60s").range().ref_id("A").datasource(SOURCE))
    )


def links() -> list[Builder[DashboardLink]]:
    """To the other dashboards, keeping time, data source, model and run."""
    return [
        dashboard.DashboardLink("gradwatch")
        .type(DashboardLinkType.DASHBOARDS)
        .tags(["gradwatch"])
        .as_dropdown(False)
        .include_vars(True)
        .keep_time(True)
        .tooltip("The other gradwatch dashboards, with this time range and run"),
    ]
