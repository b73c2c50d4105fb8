"""Which runs need somebody: the table of runs, firing alerts, open findings, and the states over time."""

from __future__ import annotations

from grafana_foundation_sdk.builders import bargauge, stat, statetimeline, table, timeseries

import queries
from common import SEVERITY_COLOURS, STATE_COLOURS, Query, budget, codes, to_dashboard, to_mlflow, words
from panels import Column, bars, graph, number, rows, timeline

RUN_COLUMN = Column("run", "Run id", links=[to_dashboard("On call for this run", "gradwatch-oncall", "${__value.raw}")])


def runs() -> table.Panel:
    return rows(
        "Which runs need me",
        "One line a run of the selected range, those with open findings on top. Healthy: state running or "
        "finished, no findings, a last step no older than a few step times (ended runs show none). A red state "
        "ended badly; a running one with an old step lost its node or agent. Click a name to debug it.",
        [
            Query(queries.RUN_FACTS),
            Query(queries.run_state()),
            Query(queries.FINDINGS_OF_RUN),
            Query(queries.STEP_AGE_OF_LIVE),
            Query(queries.CLIP_RATE_OF_RUN),
            Query(queries.GAP_OF_RUN),
            Query(queries.ATTEMPTS),
            Query(queries.RUN_AGE),
        ],
        [
            Column(
                "run_name", "Name", links=[to_dashboard("Debug this run", "gradwatch-debug", "${__data.fields.run}")]
            ),
            Column("state", "State", mappings=words(STATE_COLOURS), width=90),
            Column("Value #C", "Findings", "short", budget(1, 2), width=90),
            Column("Value #D", "Last step", "s", budget(300, 900), width=110),
            Column("Value #E", "Clip rate", "percentunit", budget(0.1, 0.5), width=90, decimals=1),
            Column("Value #F", "Gap", "percentunit", budget(0.2, 0.4), width=90, decimals=1),
            Column("tier", "Tier", mappings=words({"production": "orange", "experiment": "#8e8e8e"}), width=110),
            Column("team", "Team", width=100),
            Column("model", "Model"),
            Column("namespace", "Namespace"),
            Column("Value #G", "Attempt", "short", budget(1, 3), width=90),
            Column("Value #H", "Age", "s", width=100),
            RUN_COLUMN,
            Column("mlflow_run_id", "MLflow run", links=[to_mlflow("${__value.raw}")]),
        ],
        sort="Findings",
    ).height(10)


def alerts() -> table.Panel:
    return (
        rows(
            "Firing alerts",
            "Pages and tickets that fire now, and for how long. Healthy: empty, while the number above says 0 and "
            "not 'no rules': without the rules nothing can fire.",
            [Query(queries.ALERT_AGE)],
            [
                Column("severity", "Severity", mappings=words(SEVERITY_COLOURS), width=90),
                Column("alertname", "Alert"),
                Column("model", "Model"),
                Column("run", "Run id", links=[to_dashboard("Debug this run", "gradwatch-debug", "${__value.raw}")]),
                Column("namespace", "Namespace"),
                Column("Value", "For", "s", width=110),
            ],
            sort="Severity",
            descending=False,
            unit="s",
        )
        .span(12)
        .height(8)
    )


def findings() -> table.Panel:
    return (
        rows(
            "Open findings",
            "Findings active now, and on how many runs. Healthy: empty. `gradwatch explain CODE` says what each "
            "means and what to do; contract findings are exact and come first.",
            [Query(queries.FINDINGS_BY_CODE)],
            [
                Column("severity", "Severity", mappings=words(SEVERITY_COLOURS), width=90),
                Column("code", "Finding"),
                Column("Value", "Runs", "short", budget(1, 5), width=90),
            ],
            sort="Runs",
        )
        .span(12)
        .height(8)
    )


def findings_raised() -> table.Panel:
    return (
        rows(
            "Findings raised in this range",
            "How often each finding was raised, closed ones included. Healthy: zeros.",
            [Query(queries.FINDINGS_RAISED)],
            [
                Column("severity", "Severity", mappings=words(SEVERITY_COLOURS), width=90),
                Column("code", "Finding"),
                Column("Value", "Raised", "short", budget(1, 5), width=100, decimals=0),
            ],
            sort="Raised",
        )
        .span(12)
        .height(8)
    )


def violations() -> bargauge.Panel:
    return bars(
        "Contract violations in this range",
        "Steps that broke a training contract, by contract: what the code does is wrong, whatever the data. "
        "Healthy: every bar empty.",
        Query(queries.VIOLATIONS, "{{contract}}"),
        unit="short",
        thresholds=budget(1),
    ).span(12)


def states() -> statetimeline.Panel:
    return timeline(
        "State of the runs",
        "Each run's state over time. Healthy: green from start to a grey end. Yellow is stalled; a green bar "
        "that breaks off without an end is a node or an agent that vanished.",
        Query(queries.named(queries.RUN_STATE_CODE), "{{run_name}}"),
        mappings=codes(STATE_COLOURS),
    )


def findings_over_time() -> statetimeline.Panel:
    return timeline(
        "Findings over time",
        "When each finding was active on a chosen run. Healthy: empty. The one that starts first is the cause "
        "more often than those behind it.",
        Query(queries.named(queries.FINDING_OPEN), "{{code}} · {{run_name}}"),
        mappings=codes({"": "green", "active": "orange"}),
    )


def running() -> stat.Panel:
    return number(
        "Runs running",
        "Runs whose state is running now. Healthy: as many as you started.",
        Query(queries.RUNS_RUNNING),
        unit="short",
        nothing="no agent",
    )


def by_state() -> stat.Panel:
    return number(
        "Runs by state",
        "How many runs are in each state now. Healthy: none stalled, failed, killed or abrupt.",
        Query(queries.RUNS_BY_STATE, "{{state}}"),
        unit="short",
        nothing="no agent",
    )


def open_findings() -> stat.Panel:
    return number(
        "Open findings",
        "Findings that are active now over all chosen runs. Healthy: 0.",
        Query(queries.OPEN_FINDINGS),
        unit="short",
        thresholds=budget(1, 5),
        nothing="no agent",
    )


def firing() -> stat.Panel:
    return number(
        "Firing alerts",
        "Pages and tickets that fire now. Healthy: 0. 'no rules' means that the watchdog alert is missing: the "
        "rules are not loaded, and no alert could fire.",
        Query(queries.ALERTS_FIRING),
        unit="short",
        thresholds=budget(1, 3),
        nothing="no rules",
    )


def alerts_a_day() -> timeseries.Panel:
    return graph(
        "Alerts per model and day",
        "Different alerts that fired within the day before each bar. Healthy: mostly none. A model that alerts "
        "daily needs a fix or another budget, since nobody reads its alerts any more.",
        Query(queries.ALERTS_A_DAY, "{{model}}"),
        unit="short",
        bars=True,
        minimum=0,
        links=[],
    ).interval("1d")
