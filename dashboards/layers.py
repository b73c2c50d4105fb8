"""Layer by layer: gradient norm, weight norm and update ratio, as rows over time and as the top five."""

from __future__ import annotations

from grafana_foundation_sdk.builders import heatmap, timeseries

import queries
from common import SERIES_LINKS, Query
from panels import graph, rows_heatmap

_WHAT = {
    "layer_grad_norm": (
        "gradient norm",
        "Pre-clip L2 gradient norm. Healthy: all layers within two or three decades, and steady. One that goes "
        "dark has vanishing gradients, one that glows alone is where a spike starts.",
    ),
    "layer_weight_norm": (
        "weight norm",
        "L2 norm of the weights at the last sample. Healthy: it settles. Growth without end wants weight decay, "
        "a steady fall has too much of it.",
    ),
    "layer_update_ratio": (
        "update ratio",
        "Norm of an update over the norm of the weights. Healthy: near 0.001. Above 0.01 a layer is rewritten in "
        "a hundred steps; below 0.00001 it does not learn.",
    ),
}


def heat(name: str) -> heatmap.Panel:
    what, healthy = _WHAT[name]
    return rows_heatmap(
        f"Layers: {what}",
        f"{healthy} Where several runs are chosen, the largest of them.",
        Query(queries.layer_rows(name), "{{layer}}"),
        unit="none",
        y_unit="string",
    ).span(14)


def top(name: str) -> timeseries.Panel:
    what, healthy = _WHAT[name]
    return graph(
        f"Top 5 layers: {what}",
        f"{healthy} The five layers that were largest within the range.",
        Query(queries.named(queries.top_layers(name)), "{{layer}} · {{run_name}}"),
        unit="none",
        log=True,
        links=SERIES_LINKS,
    ).span(10)
