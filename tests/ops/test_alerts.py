"""The committed rules: generated identically, linted, on metrics and labels that exist; and their generator."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradwatch.catalog import BY_NAME, FINDING, METRICS
from gradwatch.collect.validations import is_better_high
from tests import services
from tests.ops.alert_support.expressions import labels_of, metric_of, rules
from tests.ops.dashboard_support import promql

ROOT = Path(__file__).parents[2]
GENERATOR, VALUES = ROOT / "alerts" / "generate.py", ROOT / "alerts" / "values.yaml"
RULES = rules()
ALERTS = [rule for rule in RULES if "alert" in rule]
#: Metrics that no rule and no panel needs, and why they are there all the same.
NOT_SHOWN = "## Metrics that no rule and no panel uses"


def name_of(rule: dict[str, Any]) -> str:
    labels = rule.get("labels", {})
    return "-".join([rule.get("alert", rule.get("record", "")), *(str(value) for value in labels.values())])


# -- the generator


def generate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(GENERATOR), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_committed_rules_and_their_table_are_what_the_values_generate() -> None:
    check = generate("--check")
    assert (check.returncode, check.stderr) == (0, "")


def changed(tmp_path: Path, **sections: Any) -> tuple[str, ...]:
    """Arguments that generate from values with some sections changed."""
    values = yaml.safe_load(VALUES.read_text())
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    return "--values", str(path), "--out", str(tmp_path / "rules")


def test_an_edited_file_fails_the_check(tmp_path: Path) -> None:
    arguments = changed(tmp_path)
    assert generate(*arguments).returncode == 0
    assert generate(*arguments, "--check").returncode == 0
    path = tmp_path / "rules" / "gradwatch-clipping.yaml"
    path.write_text(path.read_text().replace("0.5", "0.6", 1))
    done = generate(*arguments, "--check")
    assert done.returncode == 1
    assert "gradwatch-clipping.yaml differs" in done.stderr


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        # 14.4 × (1 − 0.9) = 1.44: more than all events would have to be bad.
        ({"slo": {"target": 0.9}}, "can never be exceeded"),
        ({"slo": {"targets": {"freshness": 0.9}}}, "can never be exceeded"),
        ({"slo": {"target": 1.0}}, "between 0 and 1"),
        ({"died": {"heartbeat": 480}}, "8 minutes"),
        ({"budgets": {"clip_rate": 1.5}}, "between 0 and 1"),
    ],
)
def test_values_that_could_never_alert_are_refused(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    done = generate(*changed(tmp_path, **sections))
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "rules").exists()


def test_the_factor_scales_every_for_and_nothing_else(tmp_path: Path) -> None:
    assert generate("--for-factor", "0.01", "--out", str(tmp_path / "rules")).returncode == 0
    seconds = {"0s": 0, "1m": 60, "2m": 120, "5m": 300, "10m": 600}
    count = 0
    for path in sorted((tmp_path / "rules").glob("*.yaml")):
        before = yaml.safe_load((ROOT / "alerts" / "rules" / path.name).read_text())
        after = yaml.safe_load(path.read_text())
        for old, new in zip(before["groups"][0]["rules"], after["groups"][0]["rules"], strict=True):
            if "alert" in old:
                assert new.pop("for") == f"{seconds[old.pop('for')] * 10}ms"
                count += 1
            assert new == old
    assert count == len(ALERTS)


def test_targets_of_single_service_levels_leave_the_others_to_the_default(tmp_path: Path) -> None:
    arguments = changed(tmp_path, slo={"targets": {"freshness": 0.95}})
    assert generate(*arguments).returncode == 0
    path = tmp_path / "rules" / "gradwatch-error-budget.yaml"
    expressions = [rule["expr"] for rule in yaml.safe_load(path.read_text())["groups"][0]["rules"]]
    assert sum('slo="freshness"' in each for each in expressions) == 5
    assert sum('slo!~"freshness"' in each for each in expressions) == 5
    assert any("> 14.4 * 0.05" in each for each in expressions)
    check = [services.program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(path)]
    assert subprocess.run(check, capture_output=True, timeout=30, check=False).returncode == 0


@pytest.mark.services
def test_promtool_finds_nothing_to_say() -> None:
    files = sorted(str(path) for path in (ROOT / "alerts" / "rules").glob("*.yaml"))
    command = [services.program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SUCCESS") == len(files)


def test_a_score_is_low_or_high_as_the_agent_judges() -> None:
    """Names are split between the two halves of the rule exactly as the agent splits them."""
    drop = next(rule["expr"] for rule in RULES if rule.get("record") == "model:gradwatch_score_drop:ratio")
    lower = next(
        value
        for selector in promql.selectors(drop)
        for label, operator, value in selector.matchers
        if label == "name" and operator == "=~"
    )
    names = ["loss", "val_loss", "Loss", "accuracy", "f1", "mae", "eval/rmse", "glossary", "auc", "perplexity", "error"]
    for name in names:
        assert (re.fullmatch(lower, name) is None) == is_better_high(name, {}), name


# -- what every alert must have


@pytest.mark.parametrize("rule", ALERTS, ids=name_of)
def test_an_alert_says_how_severe_what_where_and_how_long(rule: dict[str, Any]) -> None:
    labels, annotations = rule["labels"], rule["annotations"]
    assert rule["alert"].startswith("Gradwatch")
    # GradwatchFindingActive takes the severity that its series carry.
    carried = {"severity"} & promql.available(rule["expr"], labels_of)
    assert labels.get("severity") in ({None} if carried else {"page", "ticket", "info"})
    assert set(annotations) == {"summary", "description", "runbook_url", "dashboard_url"}
    assert rule["for"]
    assert labels["alert_family"] in annotations["runbook_url"]
    if rule["alert"] != "GradwatchWatchdog":
        assert "budget" in annotations["description"]
    if "run" in promql.available(rule["expr"], labels_of):
        for text in (annotations["summary"], annotations["description"]):
            assert all(f"$labels.{label} " in text for label in ("model", "run_name", "run"))


# -- metrics and labels


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_every_metric_and_label_of_a_rule_exists(rule: dict[str, Any]) -> None:
    """Also that ``by``, ``on`` and ``group_left`` name labels that are there, and what annotations print."""
    result = promql.available(rule["expr"], labels_of)
    printed = set()
    for text in rule.get("annotations", {}).values():
        printed |= set(re.findall(r"\$labels\.(\w+)", text))
    # The link to a dashboard prints a label only where the alert has it.
    assert printed - {"namespace", "model", "run"} <= result | set(rule.get("labels", {}))


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_functions_fit_the_types_of_their_metrics(rule: dict[str, Any]) -> None:
    for selector in promql.selectors(rule["expr"]):
        if not selector.metric.startswith("gradwatch_"):
            continue
        metric, around = metric_of(selector.metric), set(selector.around)
        counting = around & {"rate", "increase", "irate", "resets"}
        assert not counting or metric.type == "counter", f"{counting} of the gauge {selector.metric}"
        assert not around & {"deriv", "delta", "predict_linear"}, "silent between validations and at slow steps"
        if selector.range is not None and counting:
            assert selector.range >= 300, "a range that one missed scrape empties"
        # Every series that is joined was aggregated: a second pod or rank is no second series.
        assert around & {"max", "min", "sum", "group", "count", "topk"}, f"{selector.metric} is not aggregated"
        if metric.scope == "run" and any(each in around for each in ("deriv", "rate", "increase")):
            assert metric.name == "slo_events", "windows of runs are counted in steps, by the agent"


#: That a run runs, or is in production, is no reason to alert.
GATES = {"run:gradwatch_running:max", "run:gradwatch_production:max", "model:gradwatch_production:max"}


def compares(node: Any) -> bool:
    """Whether an expression leaves out series by a comparison that is more than a gate."""
    if type(node).__name__ == "ParenExpr":
        return compares(node.expr)
    if type(node).__name__ == "Call" and node.func.name == "label_replace":
        return compares(node.args[0])
    if type(node).__name__ != "BinaryExpr":
        return False
    if str(node.op) in (">", ">=", "<", "<=", "=="):
        return {each.metric for each in promql.selectors(str(node.lhs))} - GATES != set()
    if str(node.op) == "or":
        return compares(node.lhs) and compares(node.rhs)
    if str(node.op) == "unless":
        return compares(node.lhs)
    return compares(node.lhs) or (str(node.op) == "and" and compares(node.rhs))


@pytest.mark.parametrize("rule", ALERTS, ids=name_of)
def test_an_alert_compares(rule: dict[str, Any]) -> None:
    """An expression without a comparison fires on whatever exists."""
    assert rule["alert"] == "GradwatchWatchdog" or compares(promql.parse(rule["expr"]))


def test_a_gate_is_no_comparison() -> None:
    assert not compares(promql.parse("up and on () run:gradwatch_running:max == 1"))
    assert compares(promql.parse("(up and on () run:gradwatch_running:max == 1) > 1"))
    assert not compares(promql.parse("up > 1 or up"))


def test_regular_expressions_are_needed_and_findings_exist() -> None:
    for rule in RULES:
        for selector in promql.selectors(rule["expr"]):
            for label, operator, value in selector.matchers:
                if label == "code":
                    assert set(value.split("|")) <= set(FINDING), value
                if operator in ("=~", "!~") and label not in ("tier", "alias", "job", "name"):
                    assert "|" in value or ".*" in value, f"{label}{operator}{value} is a plain match"


def test_records_are_named_by_level_metric_and_operation() -> None:
    for rule in RULES:
        if "record" in rule:
            assert re.fullmatch(r"(run|model):gradwatch_[a-z_]+:[a-z]+(_[a-z]+)?\d*[mhd]?", rule["record"]), rule[
                "record"
            ]


def test_every_catalogued_metric_is_used_or_documented_as_not() -> None:
    used = {selector.metric for rule in RULES for selector in promql.selectors(rule["expr"])}
    for path in (ROOT / "dashboards" / "generated").glob("*.json"):
        used |= set(re.findall(r"\bgradwatch_[a-z_0-9]+", path.read_text()))
    used |= {name.removesuffix(suffix) for name in used for suffix in ("_bucket", "_count", "_sum")}
    unused = {metric.name for metric in METRICS if metric.exposed not in used}
    documented = (ROOT / "docs" / "alerts.md").read_text().partition(NOT_SHOWN)[2]
    listed = {name for name in BY_NAME if f"`{BY_NAME[name].exposed}`" in documented}
    assert unused == listed
