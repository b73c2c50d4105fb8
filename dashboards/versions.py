"""Models from retrain to retrain: versions with their decay, what changed, what an inference costs."""

from __future__ import annotations

from grafana_foundation_sdk.builders import bargauge, table, timeseries

import queries
from common import FROM_BRIDGE, Query, budget, to_dashboard, to_mlflow
from panels import Column, bars, graph, matrix, rows


def scores() -> timeseries.Panel:
    return graph(
        "Validation score by model and version",
        "Score that each version's run last recorded. Healthy: a new version is no worse than the one before "
        f"it by more than the model's budget. {FROM_BRIDGE}",
        Query(queries.VERSION_SCORE, "{{model}} v{{version}} {{name}}"),
        unit="none",
    )


def recent() -> table.Panel:
    return rows(
        "Recent versions with their decay",
        "Each version's hyperparameters beside what came of them. Healthy: gap and score no worse than one "
        f"line below; where they are, look which of decay, threshold, rate or batch moved. {FROM_BRIDGE}",
        [
            Query(queries.VERSION),
            Query(queries.version_hyperparameter("weight_decay")),
            Query(queries.version_hyperparameter("max_norm")),
            Query(queries.version_hyperparameter("lr|learning_rate")),
            Query(queries.version_hyperparameter("batch_size")),
            Query(queries.VERSION_GAP),
            Query(queries.VERSION_COMPLETE),
        ],
        [
            Column("model", "Model"),
            Column("version", "Version", width=80),
            Column("alias", "Alias", width=100),
            Column("Value #B", "Decay", "sci", width=100),
            Column("Value #C", "Threshold", "none", width=100),
            Column("Value #D", "Rate", "sci", width=100),
            Column("Value #E", "Batch", "none", width=80),
            Column("Value #F", "Gap", "percentunit", budget(0.2, 0.4), width=90, decimals=1),
            Column("Value #G", "Audit data", "bool_yes_no", budget(1, falling=True), width=100),
            Column("run", "Run id", links=[to_dashboard("Debug this run", "gradwatch-debug", "${__value.raw}")]),
        ],
        sort="Version",
    ).span(14)


def changed() -> table.Panel:
    return rows(
        "What changed since the last good run",
        "Hyperparameters of the live runs beside the registered version's, and the relative change. Healthy: 0 "
        "everywhere, or a change that somebody made on purpose. Registered and Change come from the bridge alone.",
        [Query(queries.DRIFT), Query(queries.REGISTERED), Query(queries.PRESENT)],
        [
            Column("model", "Model"),
            Column("name", "Hyperparameter"),
            Column("Value #B", "Registered", "none"),
            Column("Value #C", "Now", "none"),
            Column("Value #A", "Change", "percentunit", budget(0.01, 0.5), decimals=1),
        ],
        sort="Change",
    ).span(10)


def drift() -> bargauge.Panel:
    return bars(
        "Hyperparameter drift",
        f"Relative change against the last registered version. Healthy: 0, or a change made on purpose. {FROM_BRIDGE}",
        Query(queries.DRIFT, "{{model}} {{name}}"),
        unit="percentunit",
        thresholds=budget(0.01, 0.5),
        maximum=1,
    )


def gaps() -> bargauge.Panel:
    return bars(
        "Generalization gap by version",
        "Last gap that each version's run recorded. Healthy: below 20 %, and not above the version before. "
        f"{FROM_BRIDGE}",
        Query(queries.VERSION_GAP, "{{model}} v{{version}}"),
        unit="percentunit",
        thresholds=budget(0.2, 0.4),
        maximum=1,
    )


def drop_budgets() -> bargauge.Panel:
    return bars(
        "Tolerated score drop",
        "Relative drop of a score that a model tolerates from one version to the next. Healthy: set on purpose, "
        f"and small. {FROM_BRIDGE}",
        Query(queries.SCORE_DROP_BUDGET, "{{model}} {{name}}"),
        unit="percentunit",
        thresholds=budget(0.05, 0.2),
        maximum=0.3,
    )


def costs() -> table.Panel:
    return rows(
        "Size, latency and cost of an inference",
        "For versions that carry them under the names model_size_bytes, latency_p95_seconds and "
        "cost_per_inference, as a score or a hyperparameter. Healthy: no worse than the version before, unless "
        f"the score pays for it. {FROM_BRIDGE}",
        [
            Query(queries.version_cost("model_size_bytes")),
            Query(queries.version_cost("latency_p95_seconds")),
            Query(queries.version_cost("cost_per_inference")),
        ],
        [
            Column("model", "Model"),
            Column("version", "Version", width=90),
            Column("Value #A", "Size", "bytes"),
            Column("Value #B", "Latency p95", "s"),
            Column("Value #C", "Cost of one", "none"),
        ],
        sort="Version",
    ).span(12)


def compared() -> table.Panel:
    return matrix(
        rows(
            "Hyperparameters of the chosen runs, side by side",
            "One column a run: choose two in Run above to compare them. Healthy: they differ where you meant "
            "them to (decay, threshold, rate, batch), and nowhere else.",
            [Query(queries.HYPERPARAMETERS_TITLED)],
            [],
            sort="hyperparameter\\title",
            descending=False,
            unit="none",
        ),
        row="hyperparameter",
        column="title",
    ).span(12)


def outcomes() -> table.Panel:
    return rows(
        "What came of them",
        "The chosen runs beside each other: decay and threshold, then losses, gap, clip rate and steps. "
        "Healthy: the run with the better validation loss also has the smaller gap.",
        [
            Query(queries.RUN_FACTS),
            Query(f"max by ({queries.RUN}) ({queries.last_of_run('weight_decay')})"),
            Query(f"max by ({queries.RUN}) ({queries.last_of_run('clip_threshold')})"),
            Query(queries.last_of_run("loss", queries.TRAIN, queries.ALL_DATA)),
            Query(queries.last_of_run("loss", queries.NOT_TRAIN, queries.ALL_DATA)),
            Query(queries.GAP_OF_RUN),
            Query(queries.CLIP_RATE_OVER_ALL),
            Query(queries.last_of_run("step")),
        ],
        [
            Column("run_name", "Name"),
            Column("optimizer", "Optimizer", width=100),
            Column("Value #B", "Decay", "sci", width=90),
            Column("Value #C", "Threshold", "none", width=90),
            Column("Value #D", "Train loss", "none", decimals=4),
            Column("Value #E", "Validation loss", "none", decimals=4),
            Column("Value #F", "Gap", "percentunit", budget(0.2, 0.4), decimals=1),
            Column("Value #G", "Clip rate", "percentunit", budget(0.1, 0.5), decimals=1),
            Column("Value #H", "Step", "none"),
            Column("mlflow_run_id", "MLflow run", links=[to_mlflow("${__value.raw}")]),
        ],
        sort="Validation loss",
        descending=False,
    ).span(12)
