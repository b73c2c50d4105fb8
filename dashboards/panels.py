"""A function a kind of panel, with the defaults that all panels of the kind share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import (
    bargauge,
    dashboard,
    heatmap,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import common as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as model
from grafana_foundation_sdk.models.dashboard import (
    DashboardLink,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    ValueMapping,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from common import NEUTRAL, RED, SOURCE, Query, at_end, over_time


def _links(given: Sequence[Mapping[str, object]]) -> list[Builder[DashboardLink]]:
    return [
        dashboard.DashboardLink(str(each["title"])).url(str(each["url"])).target_blank(bool(each["targetBlank"]))
        for each in given
    ]


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    thresholds: dashboard.ThresholdsConfig | None = None,
    log: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    bars: bool = False,
    links: Sequence[Mapping[str, object]] = (),
) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(over_time(queries))
        .unit(unit)
        .line_width(1)
        .fill_opacity(60 if bars else 8)
        .draw_style(model.GraphDrawStyle.BARS if bars else model.GraphDrawStyle.LINE)
        .show_points(model.VisibilityMode.AUTO)
        .span_nulls(False)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC_BY_NAME))
        .thresholds(thresholds or NEUTRAL)
        .thresholds_style(
            build.GraphThresholdsStyleConfig().mode(
                model.GraphThresholdsStyleMode.DASHED if thresholds else model.GraphThresholdsStyleMode.OFF
            )
        )
        .legend(
            build.VizLegendOptions()
            .display_mode(model.LegendDisplayMode.TABLE)
            .placement(model.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
            .show_legend(True)
        )
        .tooltip(build.VizTooltipOptions().mode(model.TooltipDisplayMode.MULTI).sort(model.SortOrder.DESCENDING))
        .span(12)
        .height(9)
    )
    if log:
        panel.scale_distribution(build.ScaleDistributionConfig().type(model.ScaleDistribution.LOG).log(10))
    if minimum is not None:
        panel.min(minimum)
    if maximum is not None:
        panel.max(maximum)
    if bars:
        panel.stacking(build.StackingConfig().mode(model.StackingMode.NORMAL).group("A"))
    if links:
        panel.data_links(_links(links))
    return panel


def dashed(panel: timeseries.Panel, pattern: str, colour: str = RED) -> timeseries.Panel:
    """Draw the series whose names match as a dashed line without fill: a bound, not a measurement."""
    return panel.override_by_regexp(
        pattern,
        [
            DynamicConfigValue("color", {"mode": "fixed", "fixedColor": colour}),
            DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
            DynamicConfigValue("custom.fillOpacity", 0),
        ],
    )


def right_axis(unit: str) -> list[DynamicConfigValue]:
    """For series of another unit than the panel's."""
    return [DynamicConfigValue("unit", unit), DynamicConfigValue("custom.axisPlacement", "right")]


def number(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    thresholds: dashboard.ThresholdsConfig | None = None,
    nothing: str = "no data",
    decimals: float | None = None,
) -> stat.Panel:
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(at_end(queries))
        .unit(unit)
        .thresholds(thresholds or NEUTRAL)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .color_mode(model.BigValueColorMode.VALUE)
        .graph_mode(model.BigValueGraphMode.NONE)
        .text_mode(model.BigValueTextMode.AUTO)
        .reduce_options(build.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .no_value(nothing)
        .span(4)
        .height(4)
    )
    if decimals is not None:
        panel.decimals(decimals)
    return panel


@dataclass(frozen=True)
class Column:
    """How a table shows one field: under which title, in which unit and colours, linked whither."""

    field: str
    title: str
    unit: str = ""
    thresholds: dashboard.ThresholdsConfig | None = None
    mappings: Sequence[ValueMapping] = ()
    links: Sequence[Mapping[str, object]] = ()
    width: int | None = None
    decimals: int | None = None

    def properties(self) -> list[DynamicConfigValue]:
        values = [DynamicConfigValue("unit", self.unit)] if self.unit else []
        if self.thresholds is not None:
            values.append(DynamicConfigValue("thresholds", self.thresholds.build()))
        if self.mappings:
            values.append(DynamicConfigValue("mappings", list(self.mappings)))
        if self.thresholds is not None or self.mappings:
            values.append(DynamicConfigValue("custom.cellOptions", {"type": "color-text"}))
        if self.links:
            values.append(DynamicConfigValue("links", [dict(each) for each in self.links]))
        if self.width is not None:
            values.append(DynamicConfigValue("custom.width", self.width))
        if self.decimals is not None:
            values.append(DynamicConfigValue("decimals", self.decimals))
        return values


def rows(
    title: str,
    description: str,
    queries: Sequence[Query],
    columns: Sequence[Column],
    *,
    sort: str,
    descending: bool = True,
    unit: str = "short",
) -> table.Panel:
    """A table of series: the queries' rows merged by their common labels.

    Only fields named by ``columns`` are shown, in their order; the value of
    query A is the field ``Value #A``, or ``Value`` where there is one query.
    """
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(at_end(queries, rows=True))
        .unit(unit)
        .thresholds(NEUTRAL)
        .show_header(True)
        .cell_height(model.TableCellHeight.SM)
        .filterable(True)
        .sort_by([build.TableSortByFieldState().display_name(sort).desc(descending)])
        .transformations(
            [
                *([DataTransformerConfig(id_val="merge", options={})] if len(queries) > 1 else []),
                DataTransformerConfig(
                    id_val="filterFieldsByName",
                    options={"include": {"names": [column.field for column in columns]}},
                ),
                DataTransformerConfig(
                    id_val="organize",
                    options={
                        "indexByName": {column.field: index for index, column in enumerate(columns)},
                        "renameByName": {column.field: column.title for column in columns},
                    },
                ),
            ]
        )
        .span(24)
        .height(9)
    )
    for column in columns:
        if column.properties():
            panel.override_by_name(column.title, column.properties())
    return panel


def rows_heatmap(title: str, description: str, query: Query, *, unit: str, y_unit: str = "short") -> heatmap.Panel:
    """One row a series, coloured by value: a bucket of a histogram, or whatever the legend names."""
    by_name = y_unit == "string"
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(over_time([query], PromQueryFormat.TIME_SERIES if by_name else PromQueryFormat.HEATMAP))
        .unit(unit)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Turbo")
            .steps(64)
            .exponent(0.5)
            .fill("dark-blue")
            .reverse(False)
        )
        .y_axis(heatmap.YAxisConfig().unit(y_unit))
        .cell_values(heatmap.CellValues().unit(unit))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(model.HeatmapCellLayout.AUTO))
        .tooltip(heatmap.HeatmapTooltip().mode(model.TooltipDisplayMode.SINGLE).y_histogram(False))
        .cell_gap(1)
        .show_legend()
        .span(12)
        .height(9)
    )


def bars(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    thresholds: dashboard.ThresholdsConfig,
    minimum: float = 0,
    maximum: float | None = None,
) -> bargauge.Panel:
    panel = (
        bargauge.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(at_end([query]))
        .unit(unit)
        .thresholds(thresholds)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .orientation(model.VizOrientation.HORIZONTAL)
        .display_mode(model.BarGaugeDisplayMode.BASIC)
        .value_mode(model.BarGaugeValueMode.TEXT)
        .show_unfilled(True)
        .reduce_options(build.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .min(minimum)
        .span(8)
        .height(8)
    )
    return panel.max(maximum) if maximum is not None else panel


def timeline(
    title: str, description: str, query: Query, *, mappings: Sequence[ValueMapping], unit: str = "none"
) -> statetimeline.Panel:
    return (
        statetimeline.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .targets(over_time([query]))
        .unit(unit)
        .mappings(list(mappings))
        .thresholds(NEUTRAL)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .merge_values(True)
        .show_value(model.VisibilityMode.AUTO)
        .row_height(0.8)
        .fill_opacity(75)
        .line_width(0)
        .legend(
            build.VizLegendOptions()
            .display_mode(model.LegendDisplayMode.LIST)
            .placement(model.LegendPlacement.BOTTOM)
            .calcs([])
            .show_legend(True)
        )
        .span(12)
        .height(7)
    )


def matrix(panel: table.Panel, *, row: str, column: str, value: str = "Value") -> table.Panel:
    """Lay a table out as a matrix: one row a ``row``, one column a ``column``."""
    options = {"rowField": row, "columnField": column, "valueField": value}
    return panel.transformations([DataTransformerConfig(id_val="groupingToMatrix", options=options)])
