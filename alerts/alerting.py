"""The alerts: what each fires on, how severe it is, and what it tells whoever is woken.

Conditions count in steps and validations, which the agent does, and not in minutes, which mean nothing to a run with
a step every five minutes or five thousand a second. A rule on a run holds only while the run is running, but where
its end is the point. A page is a rule beside its ticket, with the same family: Alertmanager drops the ticket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from expressions import (
    CLIP_BUDGET,
    CLIP_RATE,
    GAP,
    GAP_BUDGET,
    LOSS,
    LOSS_BEST,
    LOSS_WORST,
    PLACE,
    PRODUCTION_RUN,
    RUN,
    SCORE_BUDGET,
    SCORE_DROP,
    by_run,
    in_production,
    of_production_model,
    series,
    while_running,
    with_facts,
)
from gradwatch.catalog import FINDING
from recording import bad_share, count_of_three_days, events

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Alert:
    """One alerting rule. ``budget`` is PromQL for what ``description`` calls the budget, asked when it fires."""

    name: str
    severity: str
    family: str
    expression: str
    fires_when: str
    summary: str
    description: str
    hold: str
    keep: str = ""
    dashboard: str = "oncall"
    labels: Mapping[str, str] = field(default_factory=dict)


PERCENT = "{{ $value | humanizePercentage }}"
WHO = "{{ $labels.model }}, run {{ $labels.run_name }} ({{ $labels.run }})"


def told(expression: str, *labels: str, percent: bool = True) -> str:
    """Template of the present value of a recording rule for the alert's own series."""
    chosen = ", ".join(f"{label}=%q" for label in labels)
    values = " ".join(f"$labels.{label}" for label in labels)
    shown = "humanizePercentage" if percent else "humanize"
    return (
        f"{{{{ with query (printf `{expression}{{{chosen}}}` {values}) }}}}"
        f"{{{{ . | first | value | {shown} }}}}{{{{ end }}}}"
    )


def of_run(expression: str, *more: str, percent: bool = True) -> str:
    return told(expression, "namespace", "model", "run", *more, percent=percent)


def alerts(values: Values) -> Iterator[tuple[str, list[Alert]]]:
    """Groups of alerting rules by topic."""
    yield "gradwatch-clipping", list(_clipping(values))
    yield "gradwatch-learning", list(_learning(values))
    yield "gradwatch-life", list(_life(values))
    yield "gradwatch-versions", list(_versions(values))
    yield "gradwatch-error-budget", list(_error_budget(values))
    yield "gradwatch-watcher", list(_watcher(values))


def _clipping(values: Values) -> Iterator[Alert]:
    over = f"{CLIP_RATE} > on ({RUN}) group_left () {CLIP_BUDGET}"
    yield Alert(
        "GradwatchClipRateHigh", "ticket", "clip-rate", with_facts(while_running(over)),
        "more of the recent steps were clipped than the run's budget allows",
        f"{WHO} clips {PERCENT} of its recent steps",
        f"{WHO}: the pre-clip gradient norm was above the threshold in {PERCENT} of the recent steps "
        f"(optimizer {{{{ $labels.optimizer }}}}); the budget is {of_run(CLIP_BUDGET)}.",
        "5m", "10m",
    )  # fmt: skip
    most = values["clipping"]["dominates"]
    condition = while_running(f"{CLIP_RATE} > {most}")
    for severity, expression in (("ticket", condition), ("page", in_production(condition))):
        yield Alert(
            "GradwatchClippingDominates", severity, "clipping-dominates", with_facts(expression),
            f"more than {most:.0%} of the recent steps were clipped",
            f"{WHO} clips {PERCENT} of its recent steps: clipping masks another problem",
            f"{WHO}: {PERCENT} of the recent steps were clipped (optimizer {{{{ $labels.optimizer }}}}); "
            f"the budget is {of_run(CLIP_BUDGET)}, and above {most:.0%} the cause is the loss scale, the data or "
            "the architecture, not the threshold.",
            "5m", "10m",
        )  # fmt: skip


def _learning(values: Values) -> Iterator[Alert]:
    gap, nonfinite, loss = values["gap"], values["nonfinite"], values["loss"]
    per_gap = f"{RUN}, metric, slice"
    rows = by_run("gap_over_budget_validations", and_by="metric, slice")
    lasting = (
        f"{GAP}\n"
        f"and on ({per_gap}) {rows} >= {gap['validations']}\n"
        f"and on ({per_gap}) {GAP} >= {gap['falling']} * max_over_time({GAP}[1d])"
    )
    twice = f"({lasting}) > on ({RUN}, metric) group_left () ({gap['page_factor']} * {GAP_BUDGET})"
    for severity, condition in (("ticket", while_running(lasting)), ("page", in_production(while_running(twice)))):
        more = f" by {gap['page_factor']} times the budget" if severity == "page" else ""
        yield Alert(
            "GradwatchGeneralizationGap", severity, "generalization-gap", with_facts(condition),
            f"the gap is over its budget in {gap['validations']} validations running and not falling{more}",
            f"{WHO}: the generalization gap of {{{{ $labels.metric }}}} is {PERCENT}",
            f"{WHO}: {{{{ $labels.metric }}}} is {PERCENT} worse on validation than in training"
            "{{ with $labels.slice }} on slice {{ . }}{{ end }}, over the budget of "
            f"{of_run(GAP_BUDGET, 'metric')} in {gap['validations']} validations running.",
            "2m",
        )  # fmt: skip
    in_a_row = by_run("nonfinite_steps_in_a_row")
    broken = while_running(f"{by_run('recent_nonfinite_steps')} > 0")
    bad_loss = f"{by_run('finding_active', 'code=' + quoted('nonfinite-loss'))} == 1"
    worse = in_production(while_running(f"{in_a_row} >= {nonfinite['in_a_row']} or {bad_loss}"))
    for severity, condition, hold in (
        ("ticket", f"{broken}\nor ({while_running(bad_loss)})", "0s"),
        ("page", worse, "0s"),
    ):
        why = f"{nonfinite['in_a_row']} or more in a row, or in the loss" if severity == "page" else "one is enough"
        yield Alert(
            "GradwatchNonFinite", severity, "non-finite", with_facts(condition),
            f"steps were taken with NaN or infinity that no GradScaler skipped: {why}",
            f"{WHO} takes steps with NaN or infinity",
            f"{WHO}: {of_run('gradwatch_recent_nonfinite_steps', percent=False)} of the recent steps had NaN or "
            "infinity in their gradients and were not skipped, "
            f"{of_run('gradwatch_nonfinite_steps_in_a_row', percent=False)} in a row up to now; the budget is 0.",
            hold, "10m", "debug",
        )  # fmt: skip
    diverging = (
        f"{LOSS} / ({LOSS_BEST} > 0) > {loss['rise']}\n"
        f"and on ({RUN}) {LOSS} > {LOSS_BEST} + {loss['way_back']} * ({LOSS_WORST} - {LOSS_BEST})\n"
        f"and on ({RUN}) {by_run('recent_steps')} >= {values['clipping']['minimum_steps']}"
    )
    if "loss-diverging" in FINDING:
        diverging = f"({diverging})\nor {by_run('finding_active', 'code=' + quoted('loss-diverging'))} == 1"
    for severity, condition in (
        ("ticket", while_running(diverging)),
        ("page", in_production(while_running(diverging))),
    ):
        yield Alert(
            "GradwatchLossDiverging", severity, "loss-diverging", with_facts(condition),
            f"the training loss is above {loss['rise']} times its best and back by half the way to its worst of a day",
            f"{WHO}: the training loss is {{{{ $value | humanize }}}} times its best",
            f"{WHO}: the training loss is {of_run(LOSS, percent=False)}, its best of the last day was "
            f"{of_run(LOSS_BEST, percent=False)}; the budget is {loss['rise']} times the best.",
            "10m", "10m", "debug",
        )  # fmt: skip
    own = "|".join(code for code in sorted(OWN_ALERT) if code in FINDING)
    others = "code!~" + quoted(own)
    mild, worst = (
        f"{by_run('finding_active', others, 'severity' + which + quoted('page'), and_by='code, severity')} == 1"
        for which in ("!=", "=")
    )
    # What the finding calls a page is a ticket where the run may not page.
    experiment = f"({worst})\nunless on ({RUN}) {PRODUCTION_RUN} == 1"
    active = (
        f'{mild}\nor {in_production(worst)}\nor label_replace({experiment}, "severity", "ticket", "severity", "page")'
    )
    alive = by_run("run_state", 'state=~"starting|running|stalled"')
    yield Alert(
        "GradwatchFindingActive", "", "finding", with_facts(f"({active})\nand on ({RUN}) {alive} == 1"),
        "a finding is active that has no alert of its own; as severe as the finding, and no page for experiments",
        f"{WHO}: {{{{ $labels.code }}}}",
        f"{WHO}: the finding {{{{ $labels.code }}}} is active; the budget is 0. What it means: "
        "gradwatch explain {{ $labels.code }}",
        "1m", "5m", "debug",
    )  # fmt: skip


#: Findings that an alert of this file tells already.
OWN_ALERT = frozenset(
    {"clip-rate-high", "generalization-gap", "loss-diverging", "nonfinite-gradient", "nonfinite-loss", "stalled"}
)


def quoted(text: str) -> str:
    return f'"{text}"'


def _life(values: Values) -> Iterator[Alert]:
    died = values["died"]

    def polled(ago: str = "") -> str:
        """The bridge's last good poll, also while a roll-out replaces its pod."""
        offset = f" offset {ago}" if ago else ""
        return f"max (last_over_time({series('bridge_last_poll_timestamp_seconds')}[{died['steady']}]{offset}))"

    age = f"time() - max by ({RUN}) ({series('last_step_timestamp_seconds')})"
    stalled = f"({age})\nand on ({RUN}) {by_run('run_state', 'state=' + quoted('stalled'))} == 1"
    for severity, condition in (("ticket", stalled), ("page", in_production(stalled))):
        yield Alert(
            "GradwatchRunStalled", severity, "run-stalled", with_facts(condition),
            "the agent sees no step for max(10 min, 20 median steps)",
            f"{WHO} has made no step for {{{{ $value | humanizeDuration }}}}",
            f"{WHO}: the process lives and its last step is {{{{ $value | humanizeDuration }}}} old; the budget is "
            "the run's own: 10 minutes, or 20 of its median steps where that is longer.",
            "1m", "2m",
        )  # fmt: skip
    tiers = values["selectors"]["page_tiers"]
    for severity, matcher in (("ticket", 'tier=~".*"'), ("page", f'tier=~"{tiers}"')):
        beat = f"max by (model, run, run_name) ({series('run_heartbeat_timestamp_seconds', matcher)})"
        dead = (
            f"time() - {beat} > {died['heartbeat']}\n"
            f"unless on (model, run) max by (model, run) ({series('run_state')})\n"
            f"and on () max_over_time((time() - {polled()})[{died['steady']}:1m]) < {died['bridge_poll']}\n"
            f"and on () {polled(died['steady'])}"
        )
        yield Alert(
            "GradwatchRunDied", severity, "run-died",
            f"({dead})\n* on (model, run) group_left (namespace, team) {PLACE}",
            "a run that stands at RUNNING in MLflow has no heartbeat, no live series, and the bridge has been polling",
            f"{WHO} is gone: no heartbeat for {{{{ $value | humanizeDuration }}}}",
            f"{WHO}: MLflow says RUNNING, the last heartbeat is {{{{ $value | humanizeDuration }}}} old and no agent "
            f"shows the run; the budget is {died['heartbeat']} seconds. The node or the pod is lost.",
            "2m",
        )  # fmt: skip


def _versions(values: Values) -> Iterator[Alert]:
    drop = f"{SCORE_DROP} > on (model, name) {SCORE_BUDGET}"
    for severity, condition in (("ticket", drop), ("page", of_production_model(drop))):
        yield Alert(
            "GradwatchScoreDropped", severity, "score-dropped", condition,
            "the current version's validation score is below the previous version's by more than its budget",
            f"{{{{ $labels.model }}}}: {{{{ $labels.name }}}} is {PERCENT} worse than in the version before",
            f"{{{{ $labels.model }}}}: the current version's {{{{ $labels.name }}}} is {PERCENT} worse than the "
            f"previous version's; the budget is {told(SCORE_BUDGET, 'model', 'name')}. Run name and number of both "
            "versions stand in the dashboard's table of versions.",
            "5m", dashboard="fleet",
        )  # fmt: skip
    tolerance = values["drift"]["tolerance"]
    yield Alert(
        "GradwatchHyperparameterDrift", "ticket", "hyperparameter-drift",
        f"max by (model, name) ({series('hyperparameter_drift')}) > {tolerance}",
        "a hyperparameter of the newest run differs from the current version's",
        "{{ $labels.model }}: {{ $labels.name }} of the newest run differs from the current version's",
        f"{{{{ $labels.model }}}}: {{{{ $labels.name }}}} of the newest run changed by {PERCENT} (100% for a name or "
        f"a schedule: another one) from the registered version; the budget is {tolerance:.0%}.",
        "5m", dashboard="fleet",
    )  # fmt: skip
    current = f"max by (model, version) ({series('model_version_info', 'alias!=' + quoted('previous'))})"
    yield Alert(
        "GradwatchMetadataIncomplete", "ticket", "metadata-incomplete",
        f"min by (model, version) ({series('metadata_complete')}) == 0\nand on (model, version) {current}",
        "the current version lacks metadata that an audit needs",
        "{{ $labels.model }} version {{ $labels.version }} lacks metadata that an audit needs",
        "{{ $labels.model }} version {{ $labels.version }}: the run behind it did not record everything that an audit "
        "asks for; the budget is nothing missing.",
        "5m", dashboard="fleet",
    )  # fmt: skip
    bad = f"max by (model) ({series('retrains_recent_bad')}) >= {values['retrains']['bad']}"
    for severity, condition in (("ticket", bad), ("page", of_production_model(bad))):
        yield Alert(
            "GradwatchRetrainFailures", severity, "retrain-failures", condition,
            f"at least {values['retrains']['bad']} of a model's last 5 retrains ended badly",
            "{{ $labels.model }}: {{ $value }} of the last 5 retrains ended badly",
            "{{ $labels.model }}: {{ $value }} of the last 5 runs failed, were killed or ended abruptly; the budget "
            f"is {values['retrains']['bad'] - 1}.",
            "1m", dashboard="fleet",
        )  # fmt: skip


def _error_budget(values: Values) -> Iterator[Alert]:
    slo = values["slo"]
    targets: dict[str, float] = {"": slo["target"], **slo["targets"]}
    for name, target in targets.items():
        # The default stands for every service level that is not named.
        chosen = f"slo={quoted(name)}" if name else f"slo!~{quoted('|'.join(slo['targets']))}" if slo["targets"] else ""
        where = f"{{{chosen}}}" if chosen else ""
        which = {"objective": name} if name else {}
        for window in slo["windows"]:
            factor, long, short = window["factor"], window["long"], window["short"]
            budget = 1 - target
            limit = f"{factor} * {budget:.6g}"
            condition = (
                f"{bad_share(long)}{where} > {limit}\n"
                f"and on (namespace, model, slo) {bad_share(short)} > {limit}\n"
                f"and on (namespace, model, slo) {events(short)} >= {slo['minimum_events']}"
            )
            if window["severity"] == "page":
                recent = f"max by (namespace, model) (max_over_time({PRODUCTION_RUN}[{long}]))"
                condition = f"({condition})\nand on (namespace, model) {recent} == 1"
            yield Alert(
                "GradwatchErrorBudgetBurn", window["severity"], "error-budget", condition,
                f"the share of bad events is above {factor} times the budget over {long} and over {short}",
                f"{{{{ $labels.model }}}}: {PERCENT} of the events of {{{{ $labels.slo }}}} are bad",
                f"{{{{ $labels.model }}}}: {PERCENT} of the events of {{{{ $labels.slo }}}} in {long} were bad; the "
                f"budget is {budget:.3%}, and it burns at {factor} times the pace at which it would last, over all "
                "runs of the model.",
                "2m", "5m", "fleet", {"window": long, **which},
            )  # fmt: skip
        few, bad, every = slo["few"], count_of_three_days("bad"), count_of_three_days("")
        yield Alert(
            "GradwatchErrorBudgetBurn", "ticket", "error-budget",
            f"{bad}{where} >= {few['bad']}\n"
            f"and on (namespace, model, slo) {every} < {few['below']}\n"
            f"and on (namespace, model, slo) {bad} > {1 - target:.6g} * {every}",
            f"a model with fewer than {few['below']} events in 3 days had {few['bad']} bad ones or more",
            "{{ $labels.model }}: {{ $value }} bad events of {{ $labels.slo }} in 3 days",
            "{{ $labels.model }}: {{ $value }} of "
            f"{told(every, 'namespace', 'model', 'slo', percent=False)} events of {{{{ $labels.slo }}}} in 3 days were "
            f"bad; the budget is {few['bad'] - 1}. Too few events for a burn rate.",
            "2m", "5m", "fleet", {"window": "few", **which},
        )  # fmt: skip


def _watcher(values: Values) -> Iterator[Alert]:
    jobs = values["selectors"]["jobs"]
    yield Alert(
        "GradwatchAgentDown", "ticket", "agent-down",
        f'max by (namespace, pod, job, instance) (up{{job=~"{jobs}"}}) == 0',
        "Prometheus cannot scrape an agent or the bridge",
        "{{ $labels.instance }} ({{ $labels.job }}) cannot be scraped",
        "{{ $labels.instance }} of {{ $labels.job }} has not answered for 5 minutes; the runs that it shows are not "
        "watched. The budget is 0.",
        "5m",
    )  # fmt: skip
    each_rank = f"max by ({RUN}, rank)"
    new = _news(f"sum by ({RUN}) ({each_rank}", "journal_rows_missed", ")")
    yield Alert(
        "GradwatchBlind", "ticket", "blind", with_facts(f"{new} > 0"),
        "rows of a journal were overwritten before the agent read them",
        f"{WHO}: the agent missed {{{{ $value }}}} steps",
        f"{WHO}: {{{{ $value }}}} rows of the journal were overwritten in 15 minutes before the agent read them; the "
        "budget is 0. Counts and findings of that time are incomplete.",
        "0s", labels={"cause": "rows-missed"},
    )  # fmt: skip
    sink = "namespace, pod, instance, sink"
    errors, dropped = (_news(f"max by ({sink})", name) for name in ("sink_errors", "sink_dropped"))
    backlog = f"max by ({sink}) ({series('sink_backlog')})"
    yield Alert(
        "GradwatchBlind", "ticket", "blind",
        f"({errors} > 0\nand on ({sink}) {backlog} > 0)\nor ({dropped} > 0)",
        "a sink fails and its backlog grows, or it dropped what it could not deliver",
        "the {{ $labels.sink }} sink of {{ $labels.instance }} fails",
        "The {{ $labels.sink }} sink of {{ $labels.instance }} failed {{ $value }} times in 15 minutes and holds "
        "items that it has not delivered, or has dropped some; the budget is 0.",
        "10m", labels={"cause": "sink"},
    )  # fmt: skip
    poll = f"max (last_over_time({series('bridge_last_poll_timestamp_seconds')}[1d]))"
    yield Alert(
        "GradwatchBlind", "ticket", "blind", f"time() - {poll} > {values['blind']['bridge_poll']}",
        "the bridge has not polled MLflow, or is gone",
        "the bridge has not polled MLflow for {{ $value | humanizeDuration }}",
        "The bridge's last good poll of MLflow is {{ $value | humanizeDuration }} old; the budget is "
        f"{values['blind']['bridge_poll']} seconds. GradwatchRunDied is silent until it polls again.",
        "2m", labels={"cause": "bridge"},
    )  # fmt: skip
    yield Alert(
        "GradwatchWatchdog", "info", "watchdog", "vector(1)",
        "always: it shows that rules, Alertmanager and its receivers work",
        "the alerting of gradwatch works",
        "This alert always fires. Where it stops to arrive, no other alert arrives either.",
        "0s",
    )  # fmt: skip


def _news(aggregate: str, name: str, end: str = "") -> str:
    """What a counter counted in 15 minutes, also where it is seen for the first time, or again after a gap."""
    now = f"{aggregate} ({series(name)}){end}"
    before = f"{aggregate} (last_over_time({series(name)}[1d] offset 15m)){end}"
    return f"{now} - ({before} or 0 * {now})"
