"""Whether a run learns: losses, validation scores and the generalization gap."""

from __future__ import annotations

from grafana_foundation_sdk.builders import timeseries

import queries
from common import SERIES_LINKS, Query
from panels import dashed, graph


def loss() -> timeseries.Panel:
    return graph(
        "Loss, training and validation",
        "Training loss (mean of the last window) and validation loss. Healthy: both fall and flatten together. "
        "Validation turning up while training falls is overfitting; a jump at a blue mark is a restart from an "
        "older checkpoint.",
        Query(queries.named(queries.TRAIN_LOSS), "train · {{run_name}}"),
        Query(queries.named(queries.VALIDATION_LOSS), "{{split}} · {{run_name}}"),
        unit="none",
        links=SERIES_LINKS,
    )


def score() -> timeseries.Panel:
    return graph(
        "Validation scores",
        "Every validation metric, cohorts (slices) too. Healthy: it moves in the good direction and flattens; "
        "a cohort that parts from the rest is the one that a mean hides.",
        Query(queries.named(queries.SCORE), "{{name}} {{slice}} · {{run_name}}"),
        unit="none",
        links=SERIES_LINKS,
    )


def gap() -> timeseries.Panel:
    return dashed(
        graph(
            "Generalization gap against its budget",
            "Relative gap between validation and training, positive when validation is worse; dashed: the "
            "run's budget. Healthy: below the budget. Above it in three validations running is an alert.",
            Query(queries.named(queries.GAP), "{{metric}} {{slice}} · {{run_name}}"),
            Query(queries.named(queries.GAP_BUDGET), "budget {{metric}} · {{run_name}}"),
            unit="percentunit",
            links=SERIES_LINKS,
        ),
        "/^budget/",
    )


def gap_in_a_row() -> timeseries.Panel:
    return graph(
        "Validations over the gap budget, in a row",
        "How many validations running were above the gap's budget. Healthy: 0; the alert wants 3.",
        Query(queries.named(queries.GAP_IN_A_ROW), "{{metric}} {{slice}} · {{run_name}}"),
        Query(queries.named(queries.VALIDATIONS), "validations in this range · {{run_name}}"),
        unit="short",
        minimum=0,
        links=SERIES_LINKS,
    )


def gap_of_models() -> timeseries.Panel:
    return graph(
        "Generalization gap by model",
        "Largest gap among a model's live runs. Healthy: below the budget of its runs (default 20 %), and not "
        "rising from retrain to retrain.",
        Query(queries.GAP_OF_MODEL, "{{model}}"),
        unit="percentunit",
    )
