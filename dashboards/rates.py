"""What steers the weights: learning rate, decay, update ratio, weight norm."""

from __future__ import annotations

from grafana_foundation_sdk.builders import timeseries

import queries
from common import SERIES_LINKS, Query
from panels import dashed, graph

WHO = "{{optimizer}} {{group}} · {{run_name}}"


def learning_rate() -> timeseries.Panel:
    return dashed(
        graph(
            "Learning rate, set and effective",
            "Set rate, and rate × clip coefficient (dashed) where the step is linear in the gradient. Healthy: "
            "the two lie on each other; where they part, clipping lowers the rate for you.",
            Query(queries.named(queries.of_group("learning_rate")), f"set {WHO}"),
            Query(queries.named(queries.of_group("effective_learning_rate")), f"effective {WHO}"),
            unit="sci",
            minimum=0,
            links=SERIES_LINKS,
        ),
        "/^effective/",
        "orange",
    )


def weight_decay() -> timeseries.Panel:
    return graph(
        "Weight decay",
        "Decay of each parameter group at the last step. Healthy: what you set, and 0 for biases and "
        "normalisation scales. Two chosen runs with different decay are seen beside each other here.",
        Query(queries.named(queries.of_group("weight_decay")), WHO),
        unit="sci",
        minimum=0,
        links=SERIES_LINKS,
    )


def update_ratio() -> timeseries.Panel:
    return graph(
        "Update ratio",
        "Norm of the last sampled update over the norm of the weights. Healthy: near 0.001.",
        Query(queries.named(queries.of_run("update_ratio", by="optimizer")), "{{optimizer}} · {{run_name}}"),
        unit="sci",
        log=True,
        links=SERIES_LINKS,
    )


def weight_norm() -> timeseries.Panel:
    return graph(
        "Weight norm",
        "Global L2 norm of the weights at the last sample. Healthy: it settles.",
        Query(queries.named(queries.of_run("weight_norm", by="optimizer")), "{{optimizer}} · {{run_name}}"),
        unit="none",
        links=SERIES_LINKS,
    )
