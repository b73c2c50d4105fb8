"""Compose the three dashboards and write them as classic (v1) JSON.

    python dashboards/generate.py            write dashboards/generated/*.json
    python dashboards/generate.py --check    exit 1 where a committed file differs from what would be written

A dashboard is a list of rows, a row a list of panels from the topic modules.
The SDK lays panels out from left to right; ids and what it leaves out are set
here, so that the same sources always give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as Built
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, RowPanel

import attention
import blindness
import gradients
import layers
import learning
import queries
import rates
import reliability
import speed
import variables
import versions

OUT = Path(__file__).parent / "generated"


@dataclass(frozen=True)
class Row:
    """A row of panels; ``of_all_runs`` where it says which run to choose, and so must see them all."""

    title: str
    panels: Sequence[Any]
    of_all_runs: bool = False


def fleet() -> dashboard.Dashboard:
    """For leads: are models getting better, and what does getting there cost?"""
    top = [
        attention.running(),
        attention.open_findings(),
        attention.firing(),
        reliability.goodput_now(),
        reliability.retrain_success_now(),
        reliability.budget_least(),
    ]
    return _dashboard(
        "gradwatch / Fleet",
        "gradwatch-fleet",
        "For leads: are the models getting better, do retrains keep their promises, and what is lost on the way?",
        "now-7d",
        "5m",
        [variables.slo_target()],
        [
            Row("At a glance", top),
            Row(
                "Are the models getting better?",
                [
                    versions.scores().span(12),
                    learning.gap_of_models().span(12),
                    versions.recent().span(16),
                    versions.gaps().span(8).height(9),
                    versions.costs().span(16).height(8),
                    versions.drop_budgets().span(8),
                ],
            ),
            Row(
                "Do retrains keep their promises?",
                [
                    reliability.budgets(),
                    reliability.burn().span(16).height(8),
                    reliability.retrain_success(),
                    reliability.retrains().span(8).height(8),
                    reliability.retrain_time().span(8).height(8),
                ],
            ),
            Row(
                "What is lost on the way?",
                [
                    reliability.goodput(),
                    reliability.lost_steps().span(16).height(8),
                ],
            ),
            Row(
                "What is open?",
                [
                    attention.findings().span(8),
                    attention.alerts_a_day().span(8).height(8),
                    versions.drift(),
                ],
            ),
        ],
        one_run=False,
    )


def oncall() -> dashboard.Dashboard:
    """For whoever was paged: which runs need me, and what happened to them?"""
    return _dashboard(
        "gradwatch / On call",
        "gradwatch-oncall",
        "For whoever was paged: which runs need me, what happened to them, what changed, and is gradwatch blind?",
        "now-6h",
        "1m",
        [],
        [
            Row(
                "Which runs need me?",
                [
                    attention.firing(),
                    attention.open_findings(),
                    attention.by_state().span(16),
                    attention.runs(),
                    attention.alerts(),
                    attention.findings(),
                ],
                of_all_runs=True,
            ),
            Row("Is gradwatch itself blind?", blindness.strip(), of_all_runs=True),
            Row(
                "Do they learn?",
                [
                    learning.loss(),
                    learning.gap(),
                    gradients.quantiles(),
                    gradients.clip_rate(),
                    speed.throughput(),
                    speed.step_time(),
                ],
            ),
            Row("What changed?", [versions.changed().span(10), versions.recent()]),
            Row(
                "States, heartbeats and the pipeline",
                [
                    attention.states().span(12).height(8),
                    blindness.heartbeats(),
                    blindness.sinks(),
                    blindness.bridge(),
                ],
            ),
        ],
    )


def debug() -> dashboard.Dashboard:
    """For whoever mends a run: everything that was measured, layer by layer and rank by rank."""
    by_layer = [
        make(name)
        for name in ("layer_grad_norm", "layer_weight_norm", "layer_update_ratio")
        for make in (layers.heat, layers.top)
    ]
    return _dashboard(
        "gradwatch / Debug",
        "gradwatch-debug",
        "For whoever mends a run: everything that was measured, layer by layer, rank by rank, run beside run.",
        "now-6h",
        "30s",
        [variables.rank(), variables.layer()],
        [
            Row(
                "Losses",
                [
                    learning.loss(),
                    learning.score(),
                    learning.gap(),
                    learning.gap_in_a_row(),
                ],
            ),
            Row(
                "Gradient norms and clipping",
                [
                    gradients.distribution(),
                    gradients.quantiles(),
                    gradients.last_norm(),
                    gradients.clip_rate(),
                    gradients.coefficient().span(8).height(8),
                    gradients.clip_rate_of_range().span(8).height(8),
                    gradients.nonfinite().span(8).height(8),
                ],
            ),
            Row("Layers", by_layer),
            Row(
                "Rates, decay and scale",
                [
                    rates.learning_rate(),
                    rates.weight_decay(),
                    rates.update_ratio().span(8).height(8),
                    rates.weight_norm().span(8).height(8),
                    gradients.loss_scale().span(8).height(8),
                ],
            ),
            Row("Runs compared", [versions.compared(), versions.outcomes()]),
            Row(
                "Ranks side by side",
                [
                    speed.rank_norm(),
                    speed.rank_local_norm(),
                    speed.rank_step_time(),
                    speed.rank_behind(),
                ],
            ),
            Row(
                "Findings, states and speed",
                [
                    attention.findings_over_time(),
                    attention.states(),
                    attention.findings_raised(),
                    attention.violations(),
                    speed.throughput(),
                    speed.step_time(),
                    blindness.agent_versions().span(24),
                ],
            ),
        ],
    )


def _dashboard(
    title: str,
    uid: str,
    description: str,
    since: str,
    refresh: str,
    own: Sequence[Any],
    rows: Sequence[Row],
    *,
    one_run: bool = True,
) -> dashboard.Dashboard:
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["gradwatch", "generated"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time(since, "now")
        .refresh(refresh)
        .timezone("browser")
        .links(variables.links())
        .annotations(variables.marks(of_runs=one_run))
        .variables(
            [
                variables.data_source(),
                variables.namespace(),
                variables.model(),
                variables.run(one=one_run),
                *own,
                variables.mlflow(),
                variables.scrape("job"),
                variables.scrape("instance"),
            ]
        )
    )
    for row in rows:
        made.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            if row.of_all_runs or not one_run:
                for target in panel.build().targets:
                    target.expr = queries.of_all_runs(target.expr)
            made.with_panel(panel)
    return made


def build() -> dict[str, Built]:
    """The dashboards by uid, panels numbered in reading order."""
    built = {}
    for compose in (fleet, oncall, debug):
        one = compose().build()
        for number, panel in enumerate(one.panels or [], start=1):
            panel.id_val = number
            if isinstance(panel, RowPanel):
                panel.panels = []
        built[str(one.uid)] = one
    return built


def render(one: Built) -> str:
    """The JSON of a dashboard, without what the SDK adds and we did not say.

    Three of its defaults change what is seen or have left Grafana's types:
    ``placement`` moves links and annotations into a menu, every variable gets
    the settings of an interval, and every table gets the footer of old tables.
    """
    said = json.loads(JSONEncoder().encode(one))
    for placed in (*said["links"], *said["annotations"]["list"]):
        placed.pop("placement", None)
    for variable in said["templating"]["list"]:
        for setting in ("auto", "auto_count", "auto_min"):
            variable.pop(setting, None)
    for panel in said["panels"]:
        panel.get("options", {}).pop("footer", None)
        for placed in panel.get("fieldConfig", {}).get("defaults", {}).get("links", ()):
            placed.pop("placement", None)
    return json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    check = parser.parse_args(arguments).check
    wanted = {OUT / f"{uid}.json": render(one) for uid, one in build().items()}
    stale = [path for path in OUT.glob("*.json") if path not in wanted]
    differing = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if check:
        for path in (*differing, *stale):
            print(f"{path.name} differs from its sources: run python dashboards/generate.py", file=sys.stderr)
        return 1 if differing or stale else 0
    OUT.mkdir(exist_ok=True)
    for path in stale:
        path.unlink()
    for path in differing:
        path.write_text(wanted[path])
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
