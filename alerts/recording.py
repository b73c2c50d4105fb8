"""Recording rules: facts of runs, budgets with their defaults, and ratios over service levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from expressions import (
    CLIP_BUDGET,
    CLIP_RATE,
    FACTS,
    GAP,
    GAP_BUDGET,
    LOSS,
    LOSS_BEST,
    LOSS_WORST,
    PLACE,
    PRODUCTION_MODEL,
    PRODUCTION_RUN,
    RUN,
    RUNNING,
    SCORE_BUDGET,
    SCORE_DROP,
    by_run,
    series,
)

Values = Mapping[str, Any]


def recordings(values: Values) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Groups of (record, expression), each in the order in which one builds on another."""
    yield "gradwatch-runs", list(_runs(values))
    yield "gradwatch-models", list(_models(values))
    yield "gradwatch-service-levels", list(_service_levels(values))


def _runs(values: Values) -> Iterator[tuple[str, str]]:
    tiers, clipping, budgets = values["selectors"]["page_tiers"], values["clipping"], values["budgets"]
    one_each = f"max by ({RUN}, run_name, team, tier) ({series('run')})"
    yield FACTS, f"topk by ({RUN}) (1, {one_each})"
    seen = f"topk by (model, run) (1, max by (model, run, namespace, team) (last_over_time({FACTS}[1d])))"
    told = f"group by (model, run) ({series('run_heartbeat_timestamp_seconds')})"
    yield PLACE, f"({seen})\nand on (model, run) {told}\nor on (model, run) {told}"
    yield RUNNING, by_run("run_state", 'state="running"')
    tier = f'tier=~"{tiers}"'
    yield PRODUCTION_RUN, f"max by ({RUN}) ({series('run', tier)}) or 0 * group by ({RUN}) ({series('run')})"
    yield CLIP_BUDGET, f"{by_run('clip_rate_budget')} or {budgets['clip_rate']} * {by_run('recent_steps', how='group')}"
    steps = by_run("recent_steps", and_by="optimizer")
    yield (
        CLIP_RATE,
        f"{by_run('recent_clipped_steps', and_by='optimizer')} / ({steps} >= {clipping['minimum_steps']})",
    )
    yield GAP, by_run("generalization_gap", and_by="metric, slice")
    own, all_gaps = (
        by_run("generalization_gap_budget", and_by="metric"),
        by_run("generalization_gap", and_by="metric", how="group"),
    )
    yield GAP_BUDGET, f"{own} or {budgets['generalization_gap']} * {all_gaps}"
    yield LOSS, by_run("loss", 'split="train"')
    yield LOSS_BEST, f"min_over_time({LOSS}[1d])"
    yield LOSS_WORST, f"max_over_time({LOSS}[1d])"


def _models(values: Values) -> Iterator[tuple[str, str]]:
    selectors = values["selectors"]
    aliases = f'alias=~"{selectors["production_aliases"]}"'
    versions = series("model_version_info")
    yield (
        PRODUCTION_MODEL,
        f"max by (model) ({series('model_version_info', aliases)}) or 0 * group by (model) ({versions})",
    )
    no_cost = f'name!~"{selectors["costs"]}"'
    scores = f"group by (model, name) ({series('model_version_score', no_cost)})"
    yield (
        SCORE_BUDGET,
        f"max by (model, name) ({series('score_drop_budget')}) or {values['budgets']['score_drop']} * {scores}",
    )
    for version, alias in (("previous", 'alias="previous"'), ("current", 'alias!="previous"')):
        which = f"max by (model, version) ({series('model_version_info', alias)})"
        score = f"max by (model, version, name) ({series('model_version_score', no_cost)})"
        yield _score(version), f"max by (model, name) ({score} * on (model, version) group_left () {which})"
    lower = f"(.*[_./ -])?(?i:{selectors['lower_is_better']})([_./ -].*)?"
    # Positive where it is worse, whichever way is better.
    falls, rises = _change(f'name!~"{lower}"'), _change(f'name=~"{lower}"')
    yield SCORE_DROP, f"-({falls})\nor\n{rises}"


def _score(version: str, matcher: str = "") -> str:
    return f"model:gradwatch_score_{version}:max{{{matcher}}}" if matcher else f"model:gradwatch_score_{version}:max"


def _change(matcher: str) -> str:
    """Relative change of a score from the previous version to the current one."""
    previous, current = _score("previous", matcher), _score("current", matcher)
    return f"({current} - {previous}) / abs({previous})"


def _service_levels(values: Values) -> Iterator[tuple[str, str]]:
    windows = values["slo"]["windows"]
    spans = dict.fromkeys(span for window in windows for span in (window["long"], window["short"]))
    for span in spans:
        bad, every = _events(span, 'result="bad"'), _events(span)
        yield bad_share(span), f"{bad} / ({every} > 0)"
    for span in dict.fromkeys(window["short"] for window in windows):
        yield events(span), _events(span, function="increase")
    for result in ("bad", ""):
        matcher = [f'result="{result}"'] if result else []
        now = f"last_over_time({series('slo_events', *matcher)}[3d])"
        before = f"last_over_time({series('slo_events', *matcher)}[1h] offset 3d)"
        # Not increase(): it would miss what a run had counted before it was scraped for the first time.
        yield count_of_three_days(result), f"sum by (namespace, model, slo) ({now} - ({before} or 0 * {now}))"


def _events(span: str, *matchers: str, function: str = "rate") -> str:
    return f"sum by (namespace, model, slo) ({function}({series('slo_events', *matchers)}[{span}]))"


def bad_share(span: str) -> str:
    return f"model:gradwatch_slo_bad:ratio_rate{span}"


def events(span: str) -> str:
    return f"model:gradwatch_slo_events:increase{span}"


def count_of_three_days(result: str) -> str:
    return f"model:gradwatch_slo_{result or 'events'}:count3d"
