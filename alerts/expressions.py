"""PromQL from the catalogue: selectors, aggregation by run, and the joins that all rules share.

A metric that the catalogue does not list is a ``KeyError`` while generating. Every series is aggregated by
(namespace, model, run) before it is joined, so that a second rank or pod that exports the same run changes nothing.
``namespace`` and ``team`` are attached by Prometheus in a cluster and absent elsewhere; PromQL treats both alike.
"""

from __future__ import annotations

import re

from gradwatch.catalog import BY_NAME

RUN = "namespace, model, run"

#: Recording rules that others build on, by what they mean.
FACTS = "run:gradwatch_facts:one"
#: Where a run was seen last: namespace and team, which the bridge's series of it do not have.
PLACE = "run:gradwatch_place:one"
RUNNING = "run:gradwatch_running:max"
PRODUCTION_RUN = "run:gradwatch_production:max"
PRODUCTION_MODEL = "model:gradwatch_production:max"
CLIP_BUDGET = "run:gradwatch_clip_rate_budget:max"
CLIP_RATE = "run:gradwatch_clip_rate:max"
GAP = "run:gradwatch_generalization_gap:max"
GAP_BUDGET = "run:gradwatch_generalization_gap_budget:max"
SCORE_DROP = "model:gradwatch_score_drop:ratio"
SCORE_BUDGET = "model:gradwatch_score_drop_budget:max"
LOSS = "run:gradwatch_train_loss:max"
LOSS_BEST = "run:gradwatch_train_loss:min1d"
LOSS_WORST = "run:gradwatch_train_loss:max1d"


def series(name: str, *matchers: str) -> str:
    """Selector of a catalogued metric."""
    chosen = BY_NAME[name]
    for matcher in matchers:
        label = re.split(r"[=!]", matcher, maxsplit=1)[0]
        if label not in chosen.all_labels:
            raise KeyError(f"{name} has no label {label}")
    return f"{chosen.exposed}{{{', '.join(matchers)}}}" if matchers else chosen.exposed


def by_run(name: str, *matchers: str, and_by: str = "", how: str = "max") -> str:
    """One series a run (and what ``and_by`` names), whichever ranks and pods export it."""
    labels = f"{RUN}, {and_by}" if and_by else RUN
    return f"{how} by ({labels}) ({series(name, *matchers)})"


def while_running(condition: str) -> str:
    """A condition on a run, only while it runs: what has ended needs nobody."""
    return f"({condition})\nand on ({RUN}) {RUNNING} == 1"


def in_production(condition: str) -> str:
    """A condition on a run, only where the run may page."""
    return f"({condition})\nand on ({RUN}) {PRODUCTION_RUN} == 1"


def of_production_model(condition: str) -> str:
    """A condition on a model, only where the model may page."""
    return f"({condition})\nand on (model) {PRODUCTION_MODEL} == 1"


def with_facts(condition: str) -> str:
    """A condition on a run with the run's name and team as labels; the value stays."""
    return f"({condition})\n* on ({RUN}) group_left (run_name, team) {FACTS}"
