"""How fast training goes, and whether all ranks go together."""

from __future__ import annotations

from grafana_foundation_sdk.builders import timeseries

import queries
from common import SERIES_LINKS, Query
from panels import graph, right_axis


def throughput() -> timeseries.Panel:
    return graph(
        "Throughput",
        "Optimizer steps a second, and samples a second where the loop logs them (right axis). Healthy: flat, "
        "with dips at validations and checkpoints.",
        Query(queries.named(queries.STEPS_PER_SECOND), "steps · {{run_name}} {{optimizer}}"),
        Query(queries.named(queries.SAMPLES_PER_SECOND), "samples · {{run_name}}"),
        unit="cps",
        minimum=0,
        links=SERIES_LINKS,
    ).override_by_regexp("/^samples/", right_axis("cps"))


def step_time() -> timeseries.Panel:
    return graph(
        "Step time",
        "Median and p95 of the time from one optimizer step to the next, validation and checkpoints included. "
        "Healthy: p95 within twice the median. A median that creeps up is input or memory trouble.",
        Query(queries.named(queries.step_seconds(0.5)), "p50 · {{run_name}}"),
        Query(queries.named(queries.step_seconds(0.95)), "p95 · {{run_name}}"),
        unit="s",
        log=True,
        links=SERIES_LINKS,
    )


def _rank(title: str, description: str, expression: str, unit: str, log: bool = False) -> timeseries.Panel:
    query = Query(queries.named(expression), "rank {{rank}} · {{run_name}}")
    return graph(title, description, query, unit=unit, log=log, links=SERIES_LINKS)


def rank_norm() -> timeseries.Panel:
    return graph(
        "Gradient norm as each rank computed it",
        "Pre-clip global norm by rank, and the spread over all ranks. Healthy: one line, since all ranks must "
        "agree, and a spread of rounding only. Ranks that differ clip by different factors and drift apart.",
        Query(queries.named(queries.of_rank("rank_grad_norm")), "rank {{rank}} · {{run_name}}"),
        Query(queries.named(queries.RANK_NORM_SPREAD), "relative spread · {{run_name}}"),
        unit="none",
        links=SERIES_LINKS,
    )


def rank_local_norm() -> timeseries.Panel:
    return graph(
        "Local gradient norm by rank",
        "Norm of the shards that each rank holds, and the global norm that they add up to over all nodes. Healthy: "
        "ranks alike in size. A rank at 0 holds gradients that never arrive.",
        Query(queries.named(queries.of_rank("rank_grad_norm_local")), "rank {{rank}} · {{run_name}}"),
        Query(queries.named(queries.NORM_OVER_NODES), "all ranks · {{run_name}}"),
        unit="none",
        links=SERIES_LINKS,
    )


def rank_step_time() -> timeseries.Panel:
    return _rank(
        "Step time by rank",
        "Each rank's last step. Healthy: one band. With synchronous training all wait for the slowest, so look "
        "for the rank that is early, not late: it waits least.",
        queries.of_rank("rank_step_duration_seconds"),
        "s",
    )


def rank_behind() -> timeseries.Panel:
    return graph(
        "Ranks behind",
        "Steps that a rank is behind the foremost, and seconds since its last step (right axis). Healthy: 0 or 1 "
        "steps. One rank that falls behind and stays is a hang in the making.",
        Query(queries.named(queries.RANK_STEPS_BEHIND), "steps · rank {{rank}} · {{run_name}}"),
        Query(queries.named(queries.RANK_STEP_AGE), "age · rank {{rank}} · {{run_name}}"),
        unit="short",
        minimum=0,
        links=SERIES_LINKS,
    ).override_by_regexp("/^age/", right_axis("s"))
