"""Service levels of training: error budgets, retrains, goodput, work that was lost."""

from __future__ import annotations

from grafana_foundation_sdk.builders import bargauge, stat, timeseries

import queries
from common import FROM_BRIDGE, Query, budget
from panels import bars, graph, number


def goodput_now() -> stat.Panel:
    return number(
        "Goodput",
        "Time progressing over time allocated, less the steps that were trained again after restarts. Healthy: "
        "above 95 %. The rest was start-up, stalls and lost work.",
        Query(queries.GOODPUT_ALL),
        unit="percentunit",
        thresholds=budget(0.8, 0.95, falling=True),
        nothing="no runs",
        decimals=1,
    )


def goodput() -> bargauge.Panel:
    return bars(
        "Goodput by model",
        "Time in which a model's runs progressed over the time for which they held machines (starting, running, "
        "stalled), times the share of steps that had not to be repeated. Healthy: above 95 %.",
        Query(queries.GOODPUT, "{{model}}"),
        unit="percentunit",
        thresholds=budget(0.8, 0.95, falling=True),
        maximum=1,
    )


def lost_steps() -> timeseries.Panel:
    return graph(
        "Lost steps",
        "Steps trained again because a restart resumed from an older checkpoint. Healthy: none; a bar as high "
        "as the checkpoint interval at each restart says: save more often.",
        Query(queries.LOST_STEPS, "{{model}}"),
        unit="short",
        bars=True,
        minimum=0,
    ).interval("5m")


def budget_least() -> stat.Panel:
    return number(
        "Least error budget left",
        "Of all service levels, what the worst has left of its error budget in this range. Healthy: above 50 %. "
        "Below 0 the promise is broken.",
        Query(f"min({queries.BUDGET_LEFT})"),
        unit="percentunit",
        thresholds=budget(0, 0.5, falling=True),
        nothing="no events",
        decimals=0,
    )


def budgets() -> bargauge.Panel:
    return bars(
        "Error budget left",
        "1 − (bad share) / (1 − target) over the selected range, by model and service level. Healthy: above "
        "50 %. Below 0 more went bad than was promised.",
        Query(queries.BUDGET_LEFT, "{{model}} {{slo}}"),
        unit="percentunit",
        thresholds=budget(0, 0.5, falling=True),
        minimum=-1,
        maximum=1,
    )


def burn() -> timeseries.Panel:
    return graph(
        "Error budget burn",
        "How many times faster than allowed the budget is used; 1 uses it up exactly by the end of its period. "
        "Healthy: below 1. At 14.4 a month's budget is gone in two days.",
        Query(queries.BURN_RATE, "{{model}} {{slo}}"),
        unit="none",
        thresholds=budget(1, 14.4),
        minimum=0,
    ).interval("1h")


def retrain_success_now() -> stat.Panel:
    return number(
        "Retrain success",
        f"Share of retrains in the bridge's look-back that finished. Healthy: above 90 %. {FROM_BRIDGE}",
        Query(queries.RETRAIN_SUCCESS_ALL),
        unit="percentunit",
        thresholds=budget(0.6, 0.9, falling=True),
        nothing="no bridge",
        decimals=0,
    )


def retrain_success() -> bargauge.Panel:
    return bars(
        "Retrain success by model",
        f"Share of a model's retrains that finished. Healthy: above 90 %. {FROM_BRIDGE}",
        Query(queries.RETRAIN_SUCCESS, "{{model}}"),
        unit="percentunit",
        thresholds=budget(0.6, 0.9, falling=True),
        maximum=1,
    )


def retrains() -> timeseries.Panel:
    return graph(
        "Retrains by outcome",
        "Runs of each model in the bridge's look-back, by outcome, and how many of its last five ended badly. "
        f"Healthy: finished alone grows, and at most one bad in five. {FROM_BRIDGE}",
        Query(queries.RETRAINS, "{{model}} {{outcome}}"),
        Query(queries.RECENT_BAD, "{{model}} bad of the last 5"),
        unit="short",
        minimum=0,
    )


def retrain_time() -> timeseries.Panel:
    return graph(
        "Duration of the last retrain",
        f"How long the last ended run of each model took. Healthy: steady from one to the next. {FROM_BRIDGE}",
        Query(queries.RETRAIN_SECONDS, "{{model}}"),
        unit="s",
        minimum=0,
    )
