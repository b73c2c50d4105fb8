"""Every alert and every recording rule, by promtool: what fires, what does not, in the kinds of runs there are."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import services
from tests.ops.alert_support.cases import CASES, Case, Fired
from tests.ops.alert_support.recordings import RECORDED, Recorded
from tests.ops.alert_support.world import Series, document

pytestmark = pytest.mark.services

RULES = sorted((Path(__file__).parents[2] / "alerts" / "rules").glob("*.yaml"))
LISTED: list[dict[str, Any]] = [
    rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
]
FIRING = 'ALERTS{alertstate="firing", alertname!="GradwatchWatchdog"}'


def promtool(directory: Path, inputs: Sequence[Series], **checks: Any) -> str:
    """What ``promtool test rules`` finds wrong; empty where all is well."""
    path = directory / "case.yaml"
    path.write_text(yaml.safe_dump(document([str(rule) for rule in RULES], inputs, **checks), width=100_000))
    command = [services.program("promtool"), "test", "rules", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def detail_of(rule: dict[str, Any]) -> Fired:
    labels = rule["labels"]
    return rule["alert"], labels.get("severity", ""), labels.get("window", labels.get("cause", ""))


def told(fired: Fired) -> dict[str, str]:
    name, severity, detail = fired
    key = "window" if name == "GradwatchErrorBudgetBurn" else "cause"
    return {"alertname": name, "severity": severity, **({key: detail} if detail else {})}


def selector(labels: dict[str, str]) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{','.join(case.about)}: {case.sentence}")
def test_what_fires_and_nothing_else(case: Case, tmp_path: Path) -> None:
    expected = [{"labels": selector(told(fired)), "value": case.count.get(fired, 1)} for fired in case.fires]
    check = {
        "expr": f"count by (alertname, severity, window, cause) ({FIRING})",
        "eval_time": case.at,
        "exp_samples": expected,
    }
    assert promtool(tmp_path, case.world, promql_expr_test=[check]) == ""


def test_every_alert_has_a_case_that_fires_it_and_one_that_does_not() -> None:
    severities = Counter(detail_of(rule) for rule in LISTED if "alert" in rule)
    for rule in severities:
        name, severity, detail = rule
        if name == "GradwatchWatchdog":
            continue  # always fires; see below
        about = [case for case in CASES if name in case.about]
        wanted = [fired for case in about for fired in case.fires]
        hits = [each for each in wanted if each[0] == name and severity in ("", each[1]) and each[2] == detail]
        assert hits, f"no case fires {rule}"
        assert any(all(each not in case.fires for each in hits) for case in about), f"no case is silent on {rule}"
    assert max(severities.values()) == 1, "two rules with the same labels"


def test_the_watchdog_fires_with_nothing_there(tmp_path: Path) -> None:
    check = {"expr": 'count(ALERTS{alertname="GradwatchWatchdog", alertstate="firing"})', "eval_time": "1m"}
    expected = [{"labels": "{}", "value": 1}]
    assert promtool(tmp_path, [("some", "1x5")], promql_expr_test=[{**check, "exp_samples": expected}]) == ""
    assert "got" in promtool(tmp_path, [("some", "1x5")], promql_expr_test=[{**check, "exp_samples": []}])


# -- recording rules


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case.record}: {case.sentence}")
def test_what_is_recorded(case: Recorded, tmp_path: Path) -> None:
    expected = [{"labels": selector(dict(labels)), "value": value} for labels, value in case.samples.items()]
    # Rounded: the values of rate() carry errors of the last binary digits.
    check = {"expr": f"round({case.record}, 1e-6)", "eval_time": case.at}
    assert promtool(tmp_path, case.world, promql_expr_test=[{**check, "exp_samples": expected}]) == ""


def test_every_recording_rule_has_a_case_with_a_sample() -> None:
    recorded = {rule["record"] for rule in LISTED if "record" in rule}
    assert recorded == {case.record for case in RECORDED if case.samples}


# -- what an alert tells


def rendered(case: Case, fired: Fired, directory: Path) -> str:
    """Labels and annotations as promtool shows what it did not expect."""
    return promtool(
        directory, case.world, alert_rule_test=[{"eval_time": case.at, "alertname": fired[0], "exp_alerts": []}]
    )


FIRST = {fired: case for case in reversed(CASES) for fired in case.fires}


@pytest.mark.parametrize("fired", sorted(FIRST), ids="-".join)
def test_an_alert_names_model_run_value_and_budget(fired: Fired, tmp_path: Path) -> None:
    text = rendered(FIRST[fired], fired, tmp_path)
    assert "got:[" in text, text
    assert "error expanding" not in text
    assert "no value" not in text
    assert "budget" in text
    for empty in (r"budget of [^0-9]", r"budget is[ .;,]*[.;,]"):
        assert not re.search(empty, text), text
    if 'run="' in text:
        assert "lstm, run swift-fox (r1)" in text
    elif 'model="' in text:
        assert 'summary="lstm' in text
    assert "/d/gradwatch-" in text
    assert re.search(r"from=-?\d+&to=\d+", text), text


def test_an_alert_tells_exactly_this(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.sentence == "fires at 10.1 % clipped")
    labels = {"severity": "ticket", "alert_family": "clip-rate", "namespace": "ml", "model": "lstm", "run": "r1"}
    labels |= {"optimizer": "adamw", "run_name": "swift-fox", "team": "vision"}
    who = "lstm, run swift-fox (r1)"
    annotations = {
        "summary": f"{who} clips 10.1% of its recent steps",
        "description": f"{who}: the pre-clip gradient norm was above the threshold in 10.1% of the recent steps "
        "(optimizer adamw); the budget is 10%.",
        "runbook_url": "https://github.com/gradwatch/gradwatch/blob/main/alerts/runbooks/clip-rate.md",
        "dashboard_url": "https://grafana.example.com/d/gradwatch-oncall?orgId=1&var-namespace=ml&var-model=lstm"
        "&var-run=r1&from=-19800000&to=1800000",
    }
    check = {"eval_time": "30m", "alertname": "GradwatchClipRateHigh"}
    expected = [{"exp_labels": labels, "exp_annotations": annotations}]
    assert promtool(tmp_path, case.world, alert_rule_test=[{**check, "exp_alerts": expected}]) == ""


def test_the_death_of_a_run_is_told_to_its_team(tmp_path: Path) -> None:
    """The bridge's series have the bridge's own namespace and no team: both are remembered from when the run lived."""
    case = next(case for case in CASES if case.sentence == "pages where the node of a production run dies")
    check = {
        "expr": f'count by (namespace, team, severity) ({FIRING[:-1]}, alertname="GradwatchRunDied"}})',
        "eval_time": case.at,
        "exp_samples": [
            {"labels": f'{{namespace="ml", team="vision", severity="{severity}"}}', "value": 1}
            for severity in ("ticket", "page")
        ],
    }
    assert promtool(tmp_path, case.world, promql_expr_test=[check]) == ""
