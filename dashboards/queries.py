"""Every PromQL expression of the dashboards, apart from the panels that show them.

Selectors are made from the catalogue: a metric that it does not list is a
``KeyError`` while generating, and each scope gets the matchers that its series
can have. A run's series are filtered by namespace, model and run. The bridge's
are not filtered by namespace: theirs is the bridge's own and says nothing about
the run. Every aggregation is by run and never by pod, so that a restarted or
second pod adds no second line.
"""

from __future__ import annotations

from gradwatch.catalog import BY_NAME, END_STATES, RUN_STATES

RUN = "namespace, model, run"
OURS = 'alertname=~"Gradwatch.+", alertname!="GradwatchWatchdog", severity=~"page|ticket"'
HAS_MLFLOW_RUN = 'mlflow_run_id!=""'
#: The validations of all data, not of a cohort.
ALL_DATA = 'slice=""'
TRAIN, NOT_TRAIN = 'split="train"', 'split!="train"'
STATE = 'state="{}"'
RUNNING = STATE.format("running")
STATES = 'state=~"{}"'
#: States in which a run holds its machines.
HOLDING = STATES.format("|".join(state for state in RUN_STATES if state not in END_STATES))
GOOD, BAD = 'outcome="finished"', 'result="bad"'
#: Names under which a version may carry what an inference costs; see docs/dashboards.md.
NO_COST = 'name!~"model_size_bytes|latency_p95_seconds|cost_per_inference"'
NAMED = 'name=~"{}"'
#: The current version, whatever its alias; the one before it is "previous".
CURRENT = 'alias!="previous"'


def series(name: str, *matchers: str, suffix: str = "") -> str:
    """Selector of a catalogued metric, with the dashboard's variables as matchers."""
    metric = BY_NAME[name]
    labels = metric.all_labels
    chosen = [] if metric.scope == "bridge" else ['namespace=~"$namespace"']
    chosen += [f'{label}=~"${label}"' for label in ("model", "run") if label in labels]
    chosen += [*matchers, 'job=~"$job"', 'instance=~"$instance"']
    return f"{metric.exposed}{suffix}{{{', '.join(chosen)}}}"


def of_run(name: str, *matchers: str, by: str = "", how: str = "max") -> str:
    """One series a run (and ``by``), whichever pods export it."""
    return f"{how} by ({_by(by)}) ({series(name, *matchers)})"


def last_of_run(name: str, *matchers: str, by: str = "") -> str:
    """As :func:`of_run`, but the last value in the selected range, so that ended runs are seen."""
    return f"max by ({_by(by)}) (last_over_time({series(name, *matchers)}[$__range]))"


def named(expression: str) -> str:
    """Give per-run series the labels ``run_name`` and ``mlflow_run_id``.

    The facts are those at the end of the range: steady over the whole graph,
    and computed once. A series that knows its MLflow run wins over an earlier
    one that did not, and ``topk`` leaves one a run, since two would be an error.
    """
    info = "last_over_time({}[$__range] @ end())"
    facts = f"{RUN}, run_name, mlflow_run_id"
    known = f"2 * max by ({facts}) ({info.format(series('run', HAS_MLFLOW_RUN))})"
    every = f"max by ({facts}) ({info.format(series('run'))})"
    one = f"(topk by ({RUN}) (1, {known} or {every}) > bool 0)"
    return f"({expression}) * on ({RUN}) group_left (run_name, mlflow_run_id) {one}"


def titled(expression: str) -> str:
    """Add the label ``title``, name and start of the id: names alone may repeat among runs."""
    short = f'label_replace({expression}, "short", "$1", "run", "(.{{0,8}}).*")'
    return f'label_join({short}, "title", " · ", "run_name", "short")'


_INFO = f'last_over_time({BY_NAME["run"].exposed}{{namespace=~"$namespace", model=~"$model"}}[$__range])'
_TITLES = f"max by (run, title) ({titled(_INFO)})"
#: For the variable: ids of runs with what people call them, ``{run="5f2a91c0…", title="nightly · 5f2a91c0"}``.
RUN_TITLES = f"query_result({_TITLES})"
_ACTIVE = f'{BY_NAME["finding_active"].exposed}{{namespace=~"$namespace", model=~"$model"}}'
#: The same, the run with most open findings first, which is the one that a dashboard opens with.
RUN_TITLES_BY_NEED = (
    f"query_result(sort_desc({_TITLES} + on (run) group_left () sum by (run) ({_ACTIVE}) or {_TITLES}))"
)


def of_all_runs(expression: str) -> str:
    """The same without the choice of a run: what says which run to choose must see them all."""
    return expression.replace(', run=~"$run"', "").replace(', run=~"$run|"', "")


def ratio(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def _by(extra: str) -> str:
    return f"{RUN}, {extra}" if extra else RUN


def increase(name: str, *matchers: str, by: str, window: str = "$__range") -> str:
    """Growth of a counter, summed ``by``."""
    return f"sum by ({by}) (increase({series(name, *matchers)}[{window}]))"


def rate(name: str, *matchers: str, by: str, suffix: str = "") -> str:
    return f"sum by ({by}) (rate({series(name, *matchers, suffix=suffix)}[$__rate_interval]))"


# -- runs and their state

RUN_FACTS = (
    f"max by ({RUN}, run_name, tier, team, optimizer, mlflow_run_id) (last_over_time({series('run')}[$__range]))"
)


def run_state() -> str:
    """The state of each run as a label: the live one, else the last that was seen."""
    live = of_run("run_state", by="state") + " == 1"
    last = f"topk by ({RUN}) (1, {last_of_run('run_state', by='state')} == 1)"
    return f"({live}) or on ({RUN}) ({last})"


RUN_STATE_CODE = " or ".join(
    f"({of_run('run_state', STATE.format(state))} == 1) * {code}" for code, state in enumerate(RUN_STATES)
)
RUNS_BY_STATE = f"count by (state) ({of_run('run_state', by='state')} == 1)"
RUNS_RUNNING = f"sum({of_run('run_state', RUNNING)})"
STEP_AGE = f"time() - {last_of_run('last_step_timestamp_seconds')}"
ENDED = STATES.format("|".join(END_STATES))
_ENDED = f"{last_of_run('run_state', ENDED)} == 1 unless on ({RUN}) {of_run('run_state', HOLDING)} == 1"
#: None for a run that ended, unless it lives again.
STEP_AGE_OF_LIVE = f"{STEP_AGE} unless on ({RUN}) ({_ENDED})"
RUN_AGE = f"time() - {last_of_run('run_start_timestamp_seconds')}"
ATTEMPTS = last_of_run("run_attempt")
RESTARTED = f"{of_run('run_attempt')} > max by ({RUN}) (max_over_time({series('run_attempt')}[1h] offset 1m))"

# -- gradients and clipping


def grad_norm_quantile(q: str) -> str:
    return named(of_run("grad_norm_q", f'q="{q}"', by="optimizer"))


CLIP_THRESHOLD = named(of_run("clip_threshold", by="optimizer"))
CLIP_RATE = ratio(of_run("recent_clipped_steps", by="optimizer"), of_run("recent_steps", by="optimizer"))
CLIP_RATE_OF_RUN = f"max by ({RUN}) ({CLIP_RATE})"
CLIP_RATE_OVER_ALL = ratio(increase("clipped_steps", by=RUN), increase("steps", by=RUN))
CLIP_BUDGET = of_run("clip_rate_budget")
NONFINITE = of_run("recent_nonfinite_steps", by="optimizer")
NONFINITE_SHARE = ratio(rate("nonfinite_steps", by=_by("optimizer")), rate("steps", by=_by("optimizer")))
NONFINITE_IN_A_ROW = of_run("nonfinite_steps_in_a_row", by="optimizer")
SKIPPED_SHARE = ratio(
    rate("skipped_steps", by=_by("optimizer")),
    f"({rate('steps', by=_by('optimizer'))} + {rate('skipped_steps', by=_by('optimizer'))})",
)
GRAD_NORM_HEATMAP = f"sum by (le) (increase({series('grad_norm_distribution', suffix='_bucket')}[$__rate_interval]))"


OF_LAYER, OF_RANK = 'layer=~"$layer"', 'rank=~"$rank"'


def layer(name: str) -> str:
    """A layer metric, for the layers chosen above."""
    return of_run(name, OF_LAYER, by="layer")


def layer_rows(name: str) -> str:
    """One row a layer for a heatmap: the largest among the chosen runs."""
    return f"max by (layer) ({series(name, OF_LAYER)})"


def top_layers(name: str, k: int = 5) -> str:
    """The layers with the largest values of the range: the same ``k`` over the whole graph."""
    peak = f"max by (layer) (max_over_time({series(name, OF_LAYER)}[$__range] @ end()))"
    return f"{layer(name)} and on (layer) topk({k}, {peak})"


# -- losses and validation

TRAIN_LOSS = of_run("loss", TRAIN, ALL_DATA)
VALIDATION_LOSS = of_run("loss", NOT_TRAIN, ALL_DATA, by="split")
SCORE = of_run("score", NOT_TRAIN, by="name, slice")
GAP = of_run("generalization_gap", by="metric, slice")
GAP_BUDGET = of_run("generalization_gap_budget", by="metric")
GAP_IN_A_ROW = of_run("gap_over_budget_validations", by="metric, slice")
GAP_OF_RUN = f"max by ({RUN}) ({last_of_run('generalization_gap')})"
GAP_OF_MODEL = f"max by (model) ({series('generalization_gap')})"
VALIDATIONS = increase("validations", by=RUN)

# -- speed

STEPS_PER_SECOND = rate("steps", by=_by("optimizer"))
SAMPLES_PER_SECOND = rate("samples", by=RUN)


def step_seconds(q: float) -> str:
    buckets = rate("step_duration_seconds", by=_by("le"), suffix="_bucket")
    return f"histogram_quantile({q}, {buckets})"


def of_rank(name: str) -> str:
    return f"max by ({RUN}, rank) ({series(name, OF_RANK)})"


RANK_STEPS_BEHIND = f"max by ({RUN}) ({series('rank_step')}) - on ({RUN}) group_right () {of_rank('rank_step')}"
RANK_STEP_AGE = f"time() - {of_rank('rank_last_step_timestamp_seconds')}"
#: Replicas are in these shares already: each adds its part, and agents of several nodes theirs.
NORM_OVER_NODES = f"sqrt(sum by ({RUN}) ({of_rank('rank_grad_norm_squares')}))"
RANK_NORM_SPREAD = (
    f"(max by ({RUN}) ({series('rank_grad_norm')}) - min by ({RUN}) ({series('rank_grad_norm')}))"
    f" / max by ({RUN}) ({series('rank_grad_norm')})"
)

# -- work and what is lost

PROGRESSING = f"sum by (model) (sum_over_time({series('run_state', RUNNING)}[$__range]))"
HELD = f"sum by (model) (sum_over_time({series('run_state', HOLDING)}[$__range]))"
REPEATED = f"{increase('replayed_steps', by='model')} / {increase('steps', by='model')}"
GOODPUT = f"({PROGRESSING} / {HELD}) / (1 + {REPEATED})"
GOODPUT_ALL = GOODPUT.replace("sum by (model) ", "sum ")
LOST_STEPS = increase("replayed_steps", by="model", window="$__rate_interval")

# -- service levels: bad / total against 1 - target

BAD_SHARE = ratio(increase("slo_events", BAD, by="model, slo"), increase("slo_events", by="model, slo"))
BUDGET_LEFT = f"1 - ({BAD_SHARE}) / (1 - $slo_target)"
BURN_RATE = (
    ratio(
        increase("slo_events", BAD, by="model, slo", window="$__rate_interval"),
        increase("slo_events", by="model, slo", window="$__rate_interval"),
    )
    + " / (1 - $slo_target)"
)

# -- findings and alerts

OPEN_FINDINGS = f"sum({of_run('finding_active', by='code')})"
FINDINGS_OF_RUN = f"sum by ({RUN}) ({of_run('finding_active', by='code')})"
FINDINGS_BY_CODE = f"count by (code, severity) ({of_run('finding_active', by='code, severity')} == 1)"
FINDINGS_RAISED = increase("findings", by="code, severity")
FINDING_OPEN = of_run("finding_active", by="code, severity") + " == 1"
VIOLATIONS = increase("violations", by="contract")
#: ``$run|`` lets alerts through that are about a model and name no run.
ALERTS = f'ALERTS{{alertstate="firing", {OURS}, model=~"$model|", run=~"$run|"}}'
ALERT_AGE = (
    f"time() - max by (alertname, severity, namespace, model, run) "
    f'(ALERTS_FOR_STATE{{{OURS}, model=~"$model|", run=~"$run|"}} '
    f"and on (alertname, namespace, model, run) {ALERTS})"
)
#: Zero only where the rules are loaded: else "no data", since silence is no health.
ALERTS_FIRING = f'count({ALERTS}) or 0 * count(ALERTS{{alertname="GradwatchWatchdog", alertstate="firing"}})'
ALERTS_A_DAY = (
    "count by (model) (count by (alertname, namespace, model, run) "
    f'(count_over_time(ALERTS{{alertstate="firing", {OURS}, model=~"$model|"}}[1d])))'
)

# -- versions and retrains, all from the bridge

#: Of the model, whichever run trained it: the run under watch has no version of its own yet.
VERSION = of_all_runs(f"max by (model, alias, version, run) ({series('model_version_info')})")
VERSION_SCORE = f"max by (model, version, name) ({series('model_version_score', NO_COST)})"
VERSION_GAP = f"max by (model, version) ({series('model_version_gap')})"
VERSION_COMPLETE = f"min by (model, version) ({series('metadata_complete')})"


def version_hyperparameter(pattern: str) -> str:
    return f"max by (model, version) ({series('model_version_hyperparameter', NAMED.format(pattern))})"


def version_cost(name: str) -> str:
    """Size, latency or cost of a version, logged as a score or given as a hyperparameter."""
    scored = series("model_version_score", NAMED.format(name))
    given = series("model_version_hyperparameter", NAMED.format(name))
    return f"max by (model, version) ({scored} or {given})"


SCORE_DROP_BUDGET = f"max by (model, name) ({series('score_drop_budget')})"
DRIFT = f"max by (model, name) ({series('hyperparameter_drift')})"
REGISTERED = of_all_runs(
    f"max by (model, name) ({series('model_version_hyperparameter')}"
    f" * on (model, version) group_left () max by (model, version) ({series('model_version_info', CURRENT)}))"
)
PRESENT = f"max by (model, name) ({series('hyperparameter')})"
RETRAINS = f"sum by (model, outcome) ({series('retrains')})"
RETRAIN_SUCCESS = f"sum by (model) ({series('retrains', GOOD)}) / sum by (model) ({series('retrains')})"
RETRAIN_SUCCESS_ALL = f"sum({series('retrains', GOOD)}) / sum({series('retrains')})"
RECENT_BAD = f"max by (model) ({series('retrains_recent_bad')})"
RETRAIN_SECONDS = f"max by (model) ({series('retrain_duration_seconds')})"

# -- hyperparameters of runs

#: One label for name and group, to be a row of a matrix.
HYPERPARAMETERS_TITLED = (
    f"max by (hyperparameter, title) (label_join({titled(named(last_of_run('hyperparameter', by='name, group')))}, "
    '"hyperparameter", " ", "name", "group"))'
)


def of_group(name: str) -> str:
    return of_run(name, by="optimizer, group")


# -- gradwatch about itself

AGENTS_SEEN = f"count({series('agent')})"
AGENTS_GONE = (
    'count(up{job=~"$job", instance=~"$instance"} == 0 and on (job, instance) '
    f"last_over_time({series('agent')}[1h]))"
    f" or 0 * count({series('agent')})"
)
AGENT_VERSIONS = f"count by (version) ({series('agent')})"
RUNS_SHOWN = f"sum({series('agent_runs')})"
ROWS_MISSED = f"sum(increase({series('journal_rows_missed')}[$__rate_interval]))"
SINK_ERRORS = f"sum by (sink) (increase({series('sink_errors')}[$__rate_interval]))"
SINK_BACKLOG = f"max by (sink) ({series('sink_backlog')})"
SINK_DROPPED = f"sum by (sink) (increase({series('sink_dropped')}[$__rate_interval]))"
BRIDGE_POLL_AGE = f"time() - max({series('bridge_last_poll_timestamp_seconds')})"
BRIDGE_POLL_SECONDS = f"max({series('bridge_poll_seconds')})"
GHOST_RUNS = f"max({series('bridge_ghost_runs')})"
WEBHOOKS = f"sum by (result) (increase({series('bridge_webhooks')}[$__range]))"
ANNOTATIONS = f"sum by (result) (increase({series('bridge_annotations')}[$__range]))"
REAPED_RUNS = f"sum(increase({series('bridge_reaped_runs')}[$__range]))"
HEARTBEAT_STATES = f"count by (state) ({series('run_heartbeat_state')} == 1)"
HEARTBEAT_AGE = f"time() - max by (model, run, run_name, tier) ({series('run_heartbeat_timestamp_seconds')})"
PROBE_SHARE = f"max(rate({series('probe_seconds')}[$__rate_interval]))"
