"""What all panels share: data source, budget colours, words for codes, queries and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import (
    dashboard,
    prometheus,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
GREEN, YELLOW, RED, BLUE, GREY, PURPLE = "green", "yellow", "red", "blue", "#8e8e8e", "purple"
FROM_BRIDGE = "Comes from the bridge alone: without it, this panel is empty."

#: State of a run → colour. ``abrupt`` is an end that nobody announced.
STATE_COLOURS = {
    "starting": BLUE, "running": GREEN, "stalled": YELLOW, "finished": GREY,
    "failed": RED, "killed": PURPLE, "abrupt": RED,
}  # fmt: skip
SEVERITY_COLOURS = {"info": BLUE, "ticket": YELLOW, "page": RED}


@dataclass(frozen=True)
class Query:
    """One PromQL expression of a panel, and how its series are called."""

    expression: str
    legend: str = ""


def budget(*steps: float, falling: bool = False) -> dashboard.ThresholdsConfig:
    """Green, yellow, red from the given bounds; ``falling`` where low values are the bad ones."""
    colours = [GREEN, YELLOW, RED] if len(steps) == 2 else [GREEN, RED]
    colours = colours[::-1] if falling else colours
    bounds = [None, *steps]
    return (
        dashboard.ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value=bound, color=colour) for bound, colour in zip(bounds, colours, strict=True)])
    )


NEUTRAL = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(value=None, color=BLUE)])


def words(colours: Mapping[str, str]) -> list[ValueMapping]:
    """Colour the words of a text column."""
    return [
        ValueMap(
            options={
                word: ValueMappingResult(text=word, color=colour, index=index)
                for index, (word, colour) in enumerate(colours.items())
            }
        )
    ]


def codes(colours: Mapping[str, str]) -> list[ValueMapping]:
    """Colour and name numbers that stand for words, in their order."""
    return [
        ValueMap(
            options={
                str(code): ValueMappingResult(text=word, color=colour, index=code)
                for code, (word, colour) in enumerate(colours.items())
            }
        )
    ]


# -- queries of a panel


def _ref(index: int) -> str:
    return chr(ord("A") + index)


def over_time(
    queries: Sequence[Query], format_: PromQueryFormat = PromQueryFormat.TIME_SERIES
) -> list[Builder[Dataquery]]:
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .format(format_)
        .legend_format(query.legend or "__auto")
        .range()
        .ref_id(_ref(index))
        .datasource(SOURCE)
        for index, query in enumerate(queries)
    ]


def at_end(queries: Sequence[Query], *, rows: bool = False) -> list[Builder[Dataquery]]:
    """The values at the end of the range; ``rows`` for a table, one row a series."""
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .legend_format(query.legend or "__auto")
        .instant()
        .format(PromQueryFormat.TABLE if rows else PromQueryFormat.TIME_SERIES)
        .ref_id(_ref(index))
        .datasource(SOURCE)
        for index, query in enumerate(queries)
    ]


# -- links


def link(title: str, url: str, *, new_tab: bool = False) -> dict[str, object]:
    return {"title": title, "url": url, "targetBlank": new_tab}


KEEP = "${datasource:queryparam}&${namespace:queryparam}&${__url_time_range}"


def to_mlflow(run: str) -> dict[str, object]:
    return link("MLflow run", f"${{mlflow:raw}}/#/runs/{run}", new_tab=True)


def to_dashboard(title: str, uid: str, run: str) -> dict[str, object]:
    return link(title, f"/d/{uid}?var-run={run}&{KEEP}")


#: Of a series that carries the labels ``run`` and ``mlflow_run_id``.
SERIES_LINKS = [
    to_mlflow("${__field.labels.mlflow_run_id}"),
    to_dashboard("Debug this run", "gradwatch-debug", "${__field.labels.run}"),
]
