# ruff: noqa: E501  (a table reads better with one row a line)
"""What must fire, and what must not: one sentence a case, and *everything* that fires in it.

``fires`` is the whole set of alerts that fire at ``at``, each with the labels that tell two rules of one name apart,
and how many there are; so each case also says that nothing else fires. ``about`` are the alerts it was written for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.ops.alert_support.world import Series, bridge, finding, heartbeat, run, series, slo, versions

CLIP, MOST, GAP = "GradwatchClipRateHigh", "GradwatchClippingDominates", "GradwatchGeneralizationGap"
NONFINITE, LOSS, FINDING = "GradwatchNonFinite", "GradwatchLossDiverging", "GradwatchFindingActive"
STALLED, DIED, SCORE = "GradwatchRunStalled", "GradwatchRunDied", "GradwatchScoreDropped"
DRIFT, METADATA, RETRAINS = "GradwatchHyperparameterDrift", "GradwatchMetadataIncomplete", "GradwatchRetrainFailures"
BURN, DOWN, BLIND = "GradwatchErrorBudgetBurn", "GradwatchAgentDown", "GradwatchBlind"

#: (alertname, severity, window or cause or "").
Fired = tuple[str, str, str]


def ticket(name: str, detail: str = "") -> Fired:
    return name, "ticket", detail


def page(name: str, detail: str = "") -> Fired:
    return name, "page", detail


@dataclass(frozen=True)
class Case:
    sentence: str
    about: Sequence[str]
    world: Sequence[Series]
    fires: Sequence[Fired] = ()
    at: str = "30m"
    count: dict[Fired, int] = field(default_factory=dict)


def clipped(share: float, steps: int = 1000, **more: object) -> list[Series]:
    return run(recent_steps=steps, recent_clipped_steps=round(share * steps), **more)  # type: ignore[arg-type]


def gap(value: float | str, validations: float | str = 3, **more: object) -> list[Series]:
    return run(generalization_gap=value, gap_over_budget_validations=validations, **more)  # type: ignore[arg-type]


BOTH = [ticket(CLIP), ticket(MOST)]
ENDED = {"running": "1x9 0x300", "finished": "0x9 1x300"}

CLIPPING = [
    Case("fires at 10.1 % clipped", [CLIP], clipped(0.101), [ticket(CLIP)]),
    Case("does not fire at 9.9 %", [CLIP, MOST], clipped(0.099)),
    Case("does not dominate at 49.9 %", [MOST], clipped(0.499), [ticket(CLIP)]),
    Case("dominates at 50.1 %", [MOST], clipped(0.501), BOTH),
    Case("pages where a production run is dominated", [MOST], clipped(0.501, tier="production"), [*BOTH, page(MOST)]),
    Case("does not page for production at 49.9 %", [MOST], clipped(0.499, tier="production"), [ticket(CLIP)]),
    Case("waits for five minutes", [CLIP], clipped(0.2), at="4m"),
    Case("follows the run's own budget upwards", [CLIP], clipped(0.2, clip_rate_budget=0.25)),
    Case("follows the run's own budget downwards", [CLIP], clipped(0.06, clip_rate_budget=0.05), [ticket(CLIP)]),
    Case("takes the default where the run has no budget", [CLIP], clipped(0.101, clip_rate_budget=""), [ticket(CLIP)]),
    Case("is silent by default at 9.9 % without a budget", [CLIP], clipped(0.099, clip_rate_budget="")),
    Case("does not judge a run of two minutes", [CLIP, MOST], clipped(1.0, steps=150)),
    Case("is silent once the run has ended", [CLIP, MOST], clipped(0.9, state=ENDED), at="40m"),
    Case("did not fire yet when the run ended after three minutes", [CLIP],
         clipped(0.9, state={"running": "1x2 0x300", "finished": "0x2 1x300"}), at="15m"),
    Case("fires with a step every five minutes", [CLIP], clipped(0.15, steps=200), [ticket(CLIP)], at="20m"),
    Case("fires for an online learner with 5,000 steps a second", [CLIP], clipped(0.101, 9_000_000), [ticket(CLIP)]),
    Case("does not fire for an online learner within budget", [CLIP], clipped(0.099, 9_000_000)),
    Case("goes on over a restart", [CLIP],
         run(recent_clipped_steps="200x20 _x3 200x60", recent_steps="1000x20 _x3 1000x60"), [ticket(CLIP)], at="26m"),
    Case("is silent in a scrape gap of an hour", [CLIP], clipped(0.2, minutes=20, lasts="_x60 _x60"), at="70m"),
    Case("fires again behind a scrape gap of an hour", [CLIP],
         [(name, f"{values} _x60 {values}") for name, values in clipped(0.2, minutes=20)], [ticket(CLIP)], at="95m"),
    Case("is healthy behind a scrape gap of an hour", [CLIP],
         [(name, f"{values} _x60 {values}") for name, values in clipped(0.05, minutes=20)], at="95m"),
    Case("is one alert for sixty-four pods that export one run", [CLIP],
         [each for pod in range(64) for each in clipped(0.2, pod=f"p{pod}")], [ticket(CLIP)], at="12m"),
    Case("is silent for sixty-four healthy pods", [CLIP],
         [each for pod in range(64) for each in clipped(0.05, pod=f"p{pod}")], at="12m"),
    Case("is not confused by a second rank that exports the budget", [CLIP],
         [*clipped(0.2), series("clip_rate_budget", 0.1, model="lstm", run="r1", namespace="ml", pod="b")],
         [ticket(CLIP)]),
    Case("is two alerts for two runs", [CLIP], clipped(0.2) + clipped(0.2, run="r2"), [ticket(CLIP)],
         count={ticket(CLIP): 2}),
    Case("works without a namespace, as on a laptop", [CLIP], clipped(0.2, namespace="", pod=""), [ticket(CLIP)]),
    Case("keeps runs of one name in two namespaces apart", [CLIP],
         clipped(0.2) + clipped(0.05, namespace="other"), [ticket(CLIP)]),
]  # fmt: skip

LEARNING = [
    Case("fires over budget in three validations", [GAP], gap(0.15), [ticket(GAP)]),
    Case("does not fire with the second", [GAP], gap(0.15, 2)),
    Case("fires where it grows", [GAP], gap("0.05x9 0.11x9 0.13x9 0.16x300", "0x9 1x9 2x9 3x300"), [ticket(GAP)], at="45m"),
    Case("is silent on its way back", [GAP], gap("0.4x20 0.15x300", 4), at="50m"),
    Case("fires for a series first seen at 3", [GAP], gap("_x20 0.15x300", "_x20 3x300"), [ticket(GAP)]),
    Case("stays a ticket for production below twice the budget", [GAP], gap(0.19, tier="production"), [ticket(GAP)]),
    Case("pages for production at twice the budget", [GAP], gap(0.21, tier="production"), [ticket(GAP), page(GAP)]),
    Case("follows the run's own budget", [GAP], gap(0.35, tier="production", generalization_gap_budget=0.2),
         [ticket(GAP)]),
    Case("takes the default where the run has no budget", [GAP],
         gap(0.21, tier="production", generalization_gap_budget=""), [ticket(GAP), page(GAP)]),
    Case("does not judge a run of two minutes without validations", [GAP], run(), at="2m"),
    Case("is silent once the run has ended", [GAP], gap(0.3, state=ENDED), at="20m"),
    Case("fires with a validation every few hours", [GAP], gap("0.11x120 0.12x120 0.13x60", "1x120 2x120 3x60"),
         [ticket(GAP)], at="250m"),
    Case("fires for an online learner", [GAP], gap(0.15, recent_steps=9_000_000), [ticket(GAP)]),
    Case("goes on over a restart", [GAP], gap("0.15x20 _x3 0.15x60", "3x20 _x3 3x60"), [ticket(GAP)], at="26m"),
    Case("is silent in a scrape gap of an hour", [GAP], gap(0.15, minutes=20, lasts="_x60 _x60"), at="70m"),
    Case("fires again behind a scrape gap of an hour", [GAP],
         [(name, f"{values} _x60 {values}") for name, values in gap(0.15, minutes=20)], [ticket(GAP)], at="95m"),
    Case("is one alert for sixty-four pods that export one run", [GAP],
         [each for pod in range(64) for each in gap(0.15, pod=f"p{pod}")], [ticket(GAP)], at="12m"),
    Case("is not confused by a second pod that exports the budget", [GAP],
         [*gap(0.21, tier="production"), series("generalization_gap_budget", 0.1, model="lstm", run="r1", namespace="ml", pod="b", metric="loss")],
         [ticket(GAP), page(GAP)]),
    Case("opens a ticket with the first step that is not finite", [NONFINITE], run(recent_nonfinite_steps=1),
         [ticket(NONFINITE)]),
    Case("fires for a count first seen at 3", [NONFINITE], run(recent_nonfinite_steps="_x20 3x300"), [ticket(NONFINITE)]),
    Case("does not fire for steps that a GradScaler skipped", [NONFINITE], run(skipped_steps="0+1x300")),
    Case("does not page at nine in a row", [NONFINITE],
         run(tier="production", recent_nonfinite_steps=9, nonfinite_steps_in_a_row=9), [ticket(NONFINITE)]),
    Case("pages at ten in a row", [NONFINITE],
         run(tier="production", recent_nonfinite_steps=10, nonfinite_steps_in_a_row=10),
         [ticket(NONFINITE), page(NONFINITE)]),
    Case("pages where the loss is not finite", [NONFINITE],
         run(tier="production") + finding("nonfinite-loss", "ticket"), [ticket(NONFINITE), page(NONFINITE)]),
    Case("never pages for an experiment", [NONFINITE],
         run(recent_nonfinite_steps=10, nonfinite_steps_in_a_row=10) + finding("nonfinite-loss", "page"),
         [ticket(NONFINITE)]),
    Case("fires where the loss climbs back", [LOSS], run(loss="3x5 0.5x20 2.5x300"), [ticket(LOSS)], at="50m"),
    Case("pages where a production run diverges", [LOSS], run(loss="3x5 0.5x20 2.5x300", tier="production"),
         [ticket(LOSS), page(LOSS)], at="50m"),
    Case("does not fire for noise near the best loss", [LOSS], run(loss="3x5 0.01x20 0.04x300", tier="production"), at="50m"),
    Case("does not fire while the loss falls", [LOSS], run(loss="3-0.01x290"), at="70m"),
    Case("does not judge a run of few steps", [LOSS], run(loss="3x5 0.5x20 2.5x300", recent_steps=100), at="50m"),
    Case("is silent once the diverged run has ended", [LOSS], run(loss="3x2 0.5x4 2.5x300", state=ENDED), at="50m"),
    Case("tells a finding without an alert of its own", [FINDING],
         run() + finding("clip-missing", "ticket"), [ticket(FINDING)]),
    Case("is as severe as the finding", [FINDING],
         run(tier="production") + finding("gradient-spike", "info") + finding("clip-missing", "ticket")
         + finding("decay-coupled", "page"), [(FINDING, "info", ""), ticket(FINDING), page(FINDING)]),
    Case("never pages for an experiment, whatever the finding says", [FINDING],
         run() + finding("gradient-spike", "info") + finding("decay-coupled", "page"),
         [(FINDING, "info", ""), ticket(FINDING)]),
    Case("leaves findings to their own alerts", [FINDING],
         run() + finding("clip-rate-high", "ticket") + finding("generalization-gap", "ticket")),
    Case("does not tell findings that are over", [FINDING], run() + finding("clip-missing", "ticket", 0)),
    Case("does not tell findings of a run that has ended", [FINDING],
         run(state="finished") + finding("clip-missing", "ticket")),
]  # fmt: skip

LIFE = [
    Case("fires where the agent says stalled", [STALLED], run(state="stalled", last_step_timestamp_seconds=1),
         [ticket(STALLED)]),
    Case("pages where a production run stalls", [STALLED],
         run(state="stalled", tier="production", last_step_timestamp_seconds=1), [ticket(STALLED), page(STALLED)]),
    Case("does not fire for a run with a step every five minutes", [STALLED],
         run(tier="production", last_step_timestamp_seconds="0x4 300x4 600x4 900x4 1200x4 1500x9")),
    Case("does not fire for a stalled run that was killed", [STALLED],
         run(state={"stalled": "1x4 0x300", "killed": "0x4 1x300"}, last_step_timestamp_seconds=1)),
    Case("fires where a node dies", [DIED],
         bridge() + heartbeat("0+60x10 600x300") + run(minutes=10, lasts="stale"), [ticket(DIED)], at="25m"),
    Case("pages where the node of a production run dies", [DIED],
         bridge() + heartbeat("0+60x10 600x300", tier="production") + run(minutes=10, tier="production", lasts="stale"),
         [ticket(DIED), page(DIED)], at="25m"),
    Case("is silent on a clean end between two scrapes", [DIED],
         bridge() + heartbeat("0+60x10 stale") + run(minutes=10, lasts="stale"), at="40m"),
    Case("is silent while MLflow is away", [DIED],
         bridge(poll="0+60x10 600x300") + heartbeat("0+60x10 600x300", tier="production") + run(tier="production"),
         [ticket(BLIND, "bridge")]),
    Case("is silent right after MLflow was away, while the agents show their runs", [DIED],
         bridge(poll="0+60x10 600x29 2400+60x200") + heartbeat("0+60x10 600x300", tier="production")
         + run(tier="production"), at="55m"),
    # The agents' next heartbeats come up to two minutes after the first good poll.
    Case("is silent right after MLflow was away, though nothing of the run is scraped here", [DIED],
         bridge(poll="0+60x10 600x29 2400+60x200") + heartbeat("0+60x10 600x32 2580+60x200", tier="production"),
         at="43m"),
    Case("is silent right after the bridge itself was away", [DIED],
         bridge(poll="0+60x10 stale _x28 2400+60x200")
         + heartbeat("0+60x10 stale _x28 600x3 2580+60x200", tier="production"), at="42m"),
    Case("fires where a node died while MLflow was away, ten minutes after that", [DIED],
         bridge(poll="0+60x10 600x29 2400+60x200") + heartbeat("0+60x10 600x300") + run(minutes=20, lasts="stale"),
         [ticket(DIED)], at="55m"),
    Case("is silent on a clean end during an outage of MLflow", [DIED],
         bridge(poll="0+60x10 600x300") + heartbeat("0+60x10 600x300", tier="production")
         + run(minutes=10, lasts="stale"), [ticket(BLIND, "bridge")]),
    Case("is silent on a preemption that is back within eight minutes", [DIED],
         bridge() + heartbeat("0+60x10 600x7 1080+60x200", tier="production")
         + run(minutes=10, lasts="stale") + [(name, f"_x19 {values}") for name, values in run(pod="b")], at="18m"),
    Case("is silent once the preempted run is back", [DIED],
         bridge() + heartbeat("0+60x10 600x7 1080+60x200", tier="production")
         + run(minutes=10, lasts="stale") + [(name, f"_x19 {values}") for name, values in run(pod="b")], at="25m"),
    Case("is silent, and gradwatch blind, where the bridge is down", [DIED],
         bridge(poll="0+60x10 stale") + heartbeat("0+60x10 stale", tier="production") + run(minutes=10, lasts="stale"),
         [ticket(BLIND, "bridge")]),
]  # fmt: skip

PLACE = {"model": "lstm", "namespace": "monitoring"}
SCORED = {"accuracy": 0.90, "loss": 0.50}
VERSIONS = [
    Case("fires where a score falls by more than its budget", [SCORE],
         versions({"accuracy": 0.87}, SCORED), [ticket(SCORE)]),
    Case("fires where a loss rises by more than its budget", [SCORE], versions({"loss": 0.52}, SCORED), [ticket(SCORE)]),
    Case("pages where the version is in production", [SCORE], versions({"accuracy": 0.87}, SCORED, alias="champion"),
         [ticket(SCORE), page(SCORE)]),
    Case("does not fire within the budget", [SCORE],
         versions({"accuracy": 0.885, "loss": 0.505}, SCORED, alias="champion")),
    Case("does not fire where scores improve", [SCORE], versions({"accuracy": 0.99, "loss": 0.2}, SCORED, alias="prod")),
    Case("follows the model's budget", [SCORE],
         [*versions({"accuracy": 0.87}, SCORED), series("score_drop_budget", 0.05, name="accuracy", **PLACE)]),
    Case("does not take the cost of an inference for a score", [SCORE],
         versions({"latency_p95_seconds": 0.5}, {"latency_p95_seconds": 1.0})),
    Case("does not fire for a first version", [SCORE],
         [series("model_version_info", 1, alias="latest", version="1", run="r1", **PLACE),
          series("model_version_score", 0.1, version="1", name="accuracy", **PLACE)]),
    Case("fires where the decay changed", [DRIFT],
         [series("hyperparameter_drift", 0.5, name="weight_decay", **PLACE)], [ticket(DRIFT)]),
    Case("does not fire within the tolerance", [DRIFT],
         [series("hyperparameter_drift", 0.04, name="weight_decay", **PLACE)]),
    Case("fires where the current version lacks metadata", [METADATA],
         [*versions({}, {}), series("metadata_complete", 0, version="2", **PLACE)], [ticket(METADATA)]),
    Case("does not fire for what an earlier version lacks", [METADATA],
         [*versions({}, {}), series("metadata_complete", 0, version="1", **PLACE),
          series("metadata_complete", 1, version="2", **PLACE)]),
    Case("fires at two bad retrains of five", [RETRAINS], [series("retrains_recent_bad", 2, **PLACE)], [ticket(RETRAINS)]),
    Case("pages for a model in production", [RETRAINS],
         [series("retrains_recent_bad", 2, **PLACE), *versions({}, {}, alias="production")],
         [ticket(RETRAINS), page(RETRAINS)]),
    Case("does not fire at one", [RETRAINS],
         [series("retrains_recent_bad", 1, **PLACE), *versions({}, {}, alias="production")]),
]  # fmt: skip

DAYS = 4400
HEALTHY = slo("0+100x300", 0)
BUDGETS = [
    Case("burns at 14.4 and at 6 times the pace where a fifth of the events is bad", [BURN],
         run(tier="production") + slo("0+80x300", "0+20x300"),
         [page(BURN, "1h"), page(BURN, "6h"), ticket(BURN, "1d"), ticket(BURN, "3d")], at="70m"),
    Case("burns at 6 times, not at 14.4, at ten percent", [BURN],
         run(tier="production") + slo("0+90x300", "0+10x300"),
         [page(BURN, "6h"), ticket(BURN, "1d"), ticket(BURN, "3d")], at="70m"),
    Case("opens tickets at four percent", [BURN], run(tier="production") + slo("0+96x300", "0+4x300"),
         [ticket(BURN, "1d"), ticket(BURN, "3d")], at="70m"),
    Case("opens one ticket at two percent", [BURN], run(tier="production") + slo("0+98x300", "0+2x300"),
         [ticket(BURN, "3d")], at="70m"),
    Case("does not burn within the budget", [BURN], run(tier="production") + slo("0+995x300", "0+5x300"), at="70m"),
    Case("does not page for experiments", [BURN], run() + slo("0+80x300", "0+20x300"),
         [ticket(BURN, "1d"), ticket(BURN, "3d")], at="70m"),
    Case("does not page once the short window is well again", [BURN],
         run(tier="production") + slo("0+80x60 4880+100x300", "0+20x60 1220x300"),
         [ticket(BURN, "1d"), ticket(BURN, "3d")], at="110m"),
    Case("is judged over all runs of the model", [BURN],
         run(tier="production") + [each for i in range(40) for each in slo("0+100x300", 0, run=f"g{i}")]
         + slo(0, "0+20x300", run="bad"), at="70m"),
    Case("counts few events one by one", [BURN], run() + slo("0x5 3x300", "0x5 2x300"), [ticket(BURN, "few")], at="20m"),
    Case("counts few events that were first seen at 3", [BURN], run() + slo("3x300", "3x300"), [ticket(BURN, "few")],
         at="20m"),
    Case("does not fire at one bad event of a few", [BURN], run() + slo("0x5 3x300", "0x5 1x300"), at="20m"),
]  # fmt: skip

AGENT = {"namespace": "ml", "pod": "a", "instance": "10.0.0.1:9464"}
WATCHER = [
    Case("fires where an agent does not answer", [DOWN], [series("up", 0, job="gradwatch", **AGENT)], [ticket(DOWN)]),
    Case("does not fire for a scrape that failed twice", [DOWN],
         [series("up", "1x8 0x1 1x300", job="gradwatch", **AGENT)], at="12m"),
    Case("does not fire for somebody else's target", [DOWN], [series("up", 0, job="node", **AGENT)]),
    Case("is blind where rows were missed", [BLIND], run(journal_rows_missed="0x20 7x300"), [ticket(BLIND, "rows-missed")]),
    Case("is blind where missed rows are first seen at 3", [BLIND], run(journal_rows_missed="_x20 3x300"),
         [ticket(BLIND, "rows-missed")]),
    Case("sees again twenty minutes later", [BLIND], run(journal_rows_missed="0x20 7x300"), at="45m"),
    Case("does not count missed rows again behind a gap of an hour", [BLIND],
         run(journal_rows_missed="0x20 7x40 _x60 7x100"), at="125m"),
    Case("is blind where a sink fails and its backlog stands", [BLIND],
         [series("sink_errors", "0x5 1+1x300", sink="mlflow", **AGENT), series("sink_backlog", 9, sink="mlflow", **AGENT)],
         [ticket(BLIND, "sink")]),
    Case("is blind where a sink dropped something", [BLIND],
         [series("sink_dropped", "0x15 1+1x300", sink="mlflow", **AGENT)], [ticket(BLIND, "sink")]),
    Case("is not blind where a sink failed and caught up", [BLIND],
         [series("sink_errors", "0x5 1+1x300", sink="mlflow", **AGENT), series("sink_backlog", 0, sink="mlflow", **AGENT)]),
    Case("is blind where the bridge does not poll", [BLIND], bridge(poll="0+60x10 600x300"), [ticket(BLIND, "bridge")]),
    Case("is not blind where the bridge polls", [BLIND], bridge()),
    Case("is not blind without a bridge", [BLIND], run()),
]  # fmt: skip

HEALTH = [
    Case("a healthy run is silent", [], run(loss="3-0.01x290", generalization_gap=0.02, gap_over_budget_validations=0)),
    Case("a healthy production run with bridge and service level is silent", [],
         run(tier="production") + bridge() + heartbeat("0+60x300", tier="production") + HEALTHY),
]  # fmt: skip

CASES = [*CLIPPING, *LEARNING, *LIFE, *VERSIONS, *BUDGETS, *WATCHER, *HEALTH]
