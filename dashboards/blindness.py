"""Whether gradwatch itself is blind: a watcher that sees nothing must not look healthy."""

from __future__ import annotations

from grafana_foundation_sdk.builders import stat, table, timeseries

import queries
from common import FROM_BRIDGE, Query, budget, to_dashboard
from panels import Column, graph, number, right_axis, rows

NO_AGENT, NO_BRIDGE = "no agent", "no bridge"


def strip() -> list[stat.Panel]:
    """Eight small numbers; "no agent" and "no bridge" are answers too, and no good ones."""
    strip = [
        number(
            "Agents seen",
            "Agents that are scraped now, and the runs that they show. Healthy: one agent a rank (or one a node).",
            Query(queries.AGENTS_SEEN, "agents"),
            Query(queries.RUNS_SHOWN, "runs"),
            unit="short",
            nothing=NO_AGENT,
        ),
        number(
            "Agents gone",
            "Targets that were an agent within the last hour and do not answer now. Healthy: 0.",
            Query(queries.AGENTS_GONE),
            unit="short",
            thresholds=budget(1),
            nothing=NO_AGENT,
        ),
        number(
            "Rows missed",
            "Journal rows overwritten or torn before an agent read them, last quarter of an hour. Healthy: 0.",
            Query(queries.ROWS_MISSED),
            unit="short",
            thresholds=budget(1, 1000),
            nothing=NO_AGENT,
            decimals=0,
        ),
        number(
            "Sink errors",
            "Failed deliveries in the last quarter of an hour, by sink. Healthy: 0; they are retried.",
            Query(queries.SINK_ERRORS, "{{sink}}"),
            unit="short",
            thresholds=budget(1, 100),
            nothing=NO_AGENT,
            decimals=0,
        ),
        number(
            "Dropped",
            "Items that fell out of a full backlog in the last quarter of an hour: lost for good. Healthy: 0.",
            Query(queries.SINK_DROPPED, "{{sink}}"),
            unit="short",
            thresholds=budget(1),
            nothing=NO_AGENT,
            decimals=0,
        ),
        number(
            "Bridge polled",
            "Time since the bridge last read MLflow. Healthy: below two minutes. " + FROM_BRIDGE,
            Query(queries.BRIDGE_POLL_AGE),
            unit="s",
            thresholds=budget(120, 600),
            nothing=NO_BRIDGE,
        ),
        number(
            "Ghost runs",
            "MLflow runs that stand at RUNNING without a heartbeat. Healthy: 0. " + FROM_BRIDGE,
            Query(queries.GHOST_RUNS),
            unit="short",
            thresholds=budget(1, 5),
            nothing=NO_BRIDGE,
        ),
        number(
            "Probe on the thread",
            "Largest share of wall time that a probe spends on its training thread. Healthy: below 1 %.",
            Query(queries.PROBE_SHARE),
            unit="percentunit",
            thresholds=budget(0.01, 0.03),
            nothing=NO_AGENT,
            decimals=2,
        ),
    ]
    # The interval is the window of the increases: long enough for a slow scrape, short enough to be now.
    return [panel.interval("15m").span(3).height(4) for panel in strip]


def heartbeats() -> table.Panel:
    return (
        rows(
            "Heartbeats of running runs",
            "Age of the last heartbeat that each RUNNING run's agent wrote to MLflow. Healthy: about a minute. Ten "
            f"minutes, and no live series, is a run that died with its node. {FROM_BRIDGE}",
            [Query(queries.of_all_runs(queries.HEARTBEAT_AGE))],
            [
                Column("run_name", "Name"),
                Column("model", "Model"),
                Column("tier", "Tier", width=110),
                Column("Value", "Heartbeat", "s", budget(180, 600), width=110),
                Column("run", "Run id", links=[to_dashboard("Debug this run", "gradwatch-debug", "${__value.raw}")]),
            ],
            sort="Heartbeat",
            unit="s",
        )
        .span(12)
        .height(8)
    )


def sinks() -> timeseries.Panel:
    return (
        graph(
            "Backlog of the sinks",
            "Items that agents have still to deliver, in the last hour. Healthy: near 0, or falling after an outage; "
            "a backlog at its bound drops the oldest.",
            Query(queries.SINK_BACKLOG, "{{sink}}"),
            unit="short",
            minimum=0,
        )
        .interval("5m")
        .time_from("1h")
        .span(12)
        .height(8)
    )


def bridge() -> timeseries.Panel:
    return (
        graph(
            "The bridge at work",
            "Duration of a poll of MLflow, and (right axis) webhooks from Alertmanager and annotations by result, "
            "ghost runs closed, and runs by the state that their last heartbeat told. Healthy: polls well below their "
            f"interval, no failed webhook. {FROM_BRIDGE}",
            Query(queries.BRIDGE_POLL_SECONDS, "poll"),
            Query(queries.WEBHOOKS, "webhooks {{result}}"),
            Query(queries.ANNOTATIONS, "annotations {{result}}"),
            Query(queries.REAPED_RUNS, "ghost runs closed"),
            Query(queries.HEARTBEAT_STATES, "runs {{state}}"),
            unit="s",
            minimum=0,
        )
        .override_by_regexp("/^(webhooks|annotations|ghost|runs)/", right_axis("short"))
        .span(12)
        .height(8)
    )


def agent_versions() -> stat.Panel:
    return number(
        "Versions of the agents",
        "How many agents of each gradwatch version are scraped. Healthy: one version, or two during a roll-out.",
        Query(queries.AGENT_VERSIONS, "{{version}}"),
        unit="short",
        nothing=NO_AGENT,
    )
