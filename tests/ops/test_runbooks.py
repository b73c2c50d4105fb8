"""Runbooks: one a family, with the same five headings, whose queries, commands and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradwatch import cli
from gradwatch.catalog import METRICS
from tests.ops.alert_support.expressions import labels_of
from tests.ops.dashboard_support import promql
from tests.ops.test_alerts_cases import LISTED

ROOT = Path(__file__).parents[2]
RUNBOOKS = sorted((ROOT / "alerts" / "runbooks").glob("*.md"))
HEADINGS = ["Meaning", "Impact", "Diagnosis", "Mitigation", "Escalation"]
ALERTS = [rule for rule in LISTED if "alert" in rule]
BASE = "https://github.com/gradwatch/gradwatch/blob/main/"
COMMANDS = {command.name for group in cli.COMMANDS.values() for command in group}


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_one_runbook_a_family() -> None:
    assert {path.stem for path in RUNBOOKS} == {rule["labels"]["alert_family"] for rule in ALERTS}


def test_every_link_of_an_alert_leads_to_a_file() -> None:
    for rule in ALERTS:
        url = rule["annotations"]["runbook_url"]
        assert url.startswith(BASE)
        assert (ROOT / url.removeprefix(BASE)).is_file(), url
        uid = re.search(r"/d/([a-z-]+)\?", rule["annotations"]["dashboard_url"])
        assert uid is not None
        assert (ROOT / "dashboards" / "generated" / f"{uid[1]}.json").is_file()


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_has_five_headings_with_something_below_each(path: Path) -> None:
    found = sections(path.read_text())
    assert list(found) == HEADINGS
    assert all(len(text.split()) >= 3 for text in found.values())
    names = {rule["alert"] for rule in ALERTS if rule["labels"]["alert_family"] == path.stem}
    assert all(f"`{name}`" in path.read_text() for name in names)


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_diagnosis_has_queries_that_parse_on_metrics_that_exist(path: Path) -> None:
    blocks = re.findall(r"```promql\n(.*?)```", sections(path.read_text())["Diagnosis"], flags=re.DOTALL)
    queries = [line for block in blocks for line in block.splitlines() if line]
    assert queries
    for query in queries:
        # Raises where a metric, or a label that is matched or grouped by, does not exist.
        promql.available(query, labels_of)


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_a_runbook_names_commands_that_exist(path: Path) -> None:
    named = set(re.findall(r"`gradwatch ([a-z]+)", path.read_text()))
    assert named, "no command of gradwatch helps here?"
    assert named <= COMMANDS


@pytest.mark.parametrize("path", RUNBOOKS, ids=lambda path: path.stem)
def test_metrics_and_alerts_that_the_text_names_exist(path: Path) -> None:
    text = path.read_text()
    known = {metric.exposed for metric in METRICS}
    for name in re.findall(r"(?<![:\w.])gradwatch_[a-z_0-9]+", text):
        assert name in known, name
    for name in re.findall(r"\bGradwatch[A-Z]\w+", text):
        assert name in {rule["alert"] for rule in ALERTS}, name
