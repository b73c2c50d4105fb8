"""Gradient norms, clipping, non-finite steps. All norms are pre-clip, unscaled and global."""

from __future__ import annotations

from grafana_foundation_sdk.builders import heatmap, timeseries

import queries
from common import SERIES_LINKS, Query, budget
from panels import dashed, graph, right_axis, rows_heatmap

WHO = "{{run_name}} {{optimizer}}"


def quantiles() -> timeseries.Panel:
    return dashed(
        graph(
            "Pre-clip gradient norm and threshold",
            "Median, p95 and p99 of the pre-clip gradient norm over the last 1,000 steps; dashed: the clip "
            "threshold. Healthy: the threshold near p99, so that clipping catches outliers only. A median at "
            "the threshold means that clipping, not the learning rate, sets the step size.",
            *(Query(queries.grad_norm_quantile(q), f"p{round(100 * float(q))} {WHO}") for q in ("0.5", "0.95", "0.99")),
            Query(queries.CLIP_THRESHOLD, f"threshold {WHO}"),
            unit="none",
            log=True,
            links=SERIES_LINKS,
        ),
        "/^threshold/",
    )


def clip_rate() -> timeseries.Panel:
    return dashed(
        graph(
            "Clip rate against its budget",
            "Share of recent steps (30 minutes, at least 200 steps) whose norm was above the threshold; "
            "dashed: the run's budget. Healthy: below it. Above 50 %, look at loss scale, data and learning "
            "rate before the threshold.",
            Query(queries.named(queries.CLIP_RATE), WHO),
            Query(queries.named(queries.CLIP_BUDGET), "budget {{run_name}}"),
            unit="percentunit",
            minimum=0,
            maximum=1,
            thresholds=budget(0.1, 0.5),
            links=SERIES_LINKS,
        ),
        "/^budget/",
    )


def clip_rate_of_range() -> timeseries.Panel:
    return graph(
        "Clip rate since each start of the window",
        "Clipped steps over all steps, within the selected range before each point. Healthy: below the run's "
        "budget (default 10 %) and steady.",
        Query(queries.named(queries.CLIP_RATE_OVER_ALL), "{{run_name}}"),
        unit="percentunit",
        minimum=0,
        thresholds=budget(0.1, 0.5),
        links=SERIES_LINKS,
    )


def distribution() -> heatmap.Panel:
    return rows_heatmap(
        "Distribution of the pre-clip gradient norm",
        "Steps by norm, over time, of all chosen runs together. Healthy: one band that narrows and sinks "
        "slowly. Two bands are two kinds of batches; a smear upwards comes before a divergence.",
        Query(queries.GRAD_NORM_HEATMAP, "{{le}}"),
        unit="short",
        y_unit="none",
    )


def last_norm() -> timeseries.Panel:
    return graph(
        "Last and largest gradient norm",
        "The norm at the last step and the largest of the last 60 seconds, pre-clip. Healthy: the two lie "
        "within a factor of ten; spikes that quantiles swallow are seen here.",
        Query(queries.named(queries.of_run("grad_norm", by="optimizer")), f"last {WHO}"),
        Query(queries.named(queries.of_run("grad_norm_max", by="optimizer")), f"largest {WHO}"),
        Query(queries.named(queries.of_run("grad_norm_q", 'q="0.9"', by="optimizer")), f"p90 {WHO}"),
        unit="none",
        log=True,
        links=SERIES_LINKS,
    )


def coefficient() -> timeseries.Panel:
    return graph(
        "Clip coefficient",
        "Factor that the last clip put on the gradients. Healthy: 1 nearly always. Below 0.1 the step is a "
        "tenth of what the rate says.",
        Query(queries.named(queries.of_run("clip_coefficient", by="optimizer")), WHO),
        unit="percentunit",
        minimum=0,
        maximum=1,
        links=SERIES_LINKS,
    )


def nonfinite() -> timeseries.Panel:
    return graph(
        "Non-finite and skipped steps",
        "Share of steps with NaN or infinite gradients, the recent count and the present unbroken series, and the "
        "share that a GradScaler skipped. Healthy: no non-finite step at all; a few skipped ones while the "
        "loss scale searches.",
        Query(queries.named(queries.NONFINITE_SHARE), f"non-finite share {WHO}"),
        Query(queries.named(queries.SKIPPED_SHARE), f"skipped share {WHO}"),
        Query(queries.named(queries.NONFINITE), f"recent {WHO}"),
        Query(queries.named(queries.NONFINITE_IN_A_ROW), f"in a row {WHO}"),
        unit="percentunit",
        minimum=0,
        links=SERIES_LINKS,
    ).override_by_regexp("/^(recent|in a row)/", right_axis("short"))


def loss_scale() -> timeseries.Panel:
    return graph(
        "Loss scale",
        "Scale of the GradScaler, on a logarithmic axis. Healthy: it climbs by doublings and halves now and "
        "then. A scale that only falls means that gradients overflow whatever it does.",
        Query(queries.named(queries.of_run("loss_scale")), "{{run_name}}"),
        unit="none",
        log=True,
        links=SERIES_LINKS,
    )
