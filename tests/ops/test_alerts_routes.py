"""Alertmanager's configuration: checked by amtool, and tried on a real Alertmanager with a webhook receiver."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradwatch import cli
from tests import services
from tests.ops.alert_support.receiver import Receiver, receiver
from tests.ops.test_alerts_cases import LISTED

pytestmark = pytest.mark.services

CONFIG = Path(__file__).parents[2] / "alerts" / "alertmanager" / "alertmanager.yaml"
RECEIVERS = {"page": "pager", "ticket": "tickets", "info": "nobody"}


def amtool(*arguments: str) -> str:
    done = subprocess.run(
        [services.program("amtool"), *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_is_valid() -> None:
    assert "SUCCESS" in amtool("check-config", str(CONFIG))


@pytest.mark.parametrize("team", ["", "vision", "example"])
def test_every_alert_goes_where_its_severity_and_team_say(team: str) -> None:
    seen = set()
    for rule in (rule for rule in LISTED if "alert" in rule):
        severities = [rule["labels"]["severity"]] if "severity" in rule["labels"] else list(RECEIVERS)
        for severity in severities:
            labels = {"alertname": rule["alert"], **rule["labels"], "severity": severity, "run": "r1", "team": team}
            if tuple(labels.items()) in seen:
                continue
            seen.add(tuple(labels.items()))
            last = RECEIVERS[severity]
            if team == "example" and severity in ("page", "ticket"):
                last = "example-pager" if severity == "page" else "example-tickets"
            expected = "watchdog" if rule["alert"] == "GradwatchWatchdog" else f"bridge,{last}"
            told = [f"{name}={value}" for name, value in labels.items() if value]
            verify = f"--verify.receivers={expected}"
            amtool("config", "routes", "test", f"--config.file={CONFIG}", verify, *told)
    assert len(seen) > 20


# -- on a real Alertmanager


def local(hook: Receiver) -> dict[str, Any]:
    """The committed configuration with local receivers, and waits of a second: nothing else changed."""
    config = yaml.safe_load(CONFIG.read_text())
    for each in config["receivers"]:
        for webhook in each.get("webhook_configs", ()):
            webhook["url"] = f"{hook.url}/{each['name']}"
            webhook.pop("http_config", None)
    config["route"] |= {"group_wait": "1s", "group_interval": "1s"}
    return dict(config)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[services.Alertmanager, Receiver]]:
    with (
        receiver() as hook,
        services.Alertmanager(tmp_path_factory.mktemp("alertmanager"), local(hook)) as alertmanager,
    ):
        yield alertmanager, hook


def send(alertmanager: services.Alertmanager, *labels: dict[str, str]) -> None:
    alerts = [{"labels": each, "annotations": {"summary": "s"}} for each in labels]
    headers = {"Content-Type": "application/json"}
    assert services.fetch(f"{alertmanager.url}/api/v2/alerts", json.dumps(alerts).encode(), headers) is not None


def labels(name: str, severity: str, family: str, run: str, **more: str) -> dict[str, str]:
    base = {"alertname": name, "severity": severity, "alert_family": family, "namespace": "ml", "model": "lstm"}
    return {**base, "run": run, **more}


def states(alertmanager: services.Alertmanager, **wanted: str) -> list[str]:
    """``active`` or ``suppressed``, for the alerts with these labels."""
    found = [alert for alert in alertmanager.alerts() if wanted.items() <= alert["labels"].items()]
    return [alert["status"]["state"] for alert in found]


def test_a_page_suppresses_the_ticket_of_its_family_and_run_and_no_other(
    served: tuple[services.Alertmanager, Receiver],
) -> None:
    alertmanager, hook = served
    dominates = "GradwatchClippingDominates"
    send(
        alertmanager,
        labels(dominates, "page", "clipping-dominates", "one"),
        labels(dominates, "ticket", "clipping-dominates", "one"),
        labels(dominates, "ticket", "clipping-dominates", "two"),
        labels("GradwatchClipRateHigh", "ticket", "clip-rate", "one"),
        labels(dominates, "ticket", "clipping-dominates", "one") | {"model": "other"},
    )

    def told() -> bool:
        return bool(hook.alerts("/pager")) and len(hook.alerts("/tickets")) >= 3

    services.eventually(told, "a page and three tickets")
    assert states(alertmanager, run="one", model="lstm", alertname=dominates, severity="ticket") == ["suppressed"]
    assert states(alertmanager, run="two", severity="ticket") == ["active"]
    assert states(alertmanager, run="one", alert_family="clip-rate") == ["active"]
    assert states(alertmanager, run="one", model="other") == ["active"]
    assert [each["severity"] for each in hook.alerts("/pager")] == ["page"]
    suppressed = labels(dominates, "ticket", "clipping-dominates", "one")
    assert suppressed not in hook.alerts("/tickets")


def test_forty_ranks_are_one_notification(served: tuple[services.Alertmanager, Receiver]) -> None:
    alertmanager, hook = served
    send(alertmanager, *(labels("GradwatchMany", "page", "many", "forty", rank=str(rank)) for rank in range(40)))

    def notified() -> list[dict[str, Any]]:
        return [post for post in hook.at("/pager") if post["groupLabels"].get("run") == "forty"]

    services.eventually(notified, "the notification")
    # A second group would have been flushed within the same second; another run's comes after it, and it has not.
    send(alertmanager, labels("GradwatchMany", "page", "many", "later"))
    services.eventually(lambda: [a for a in hook.alerts("/pager") if a["run"] == "later"], "the later notification")
    (post,) = notified()
    assert len(post["alerts"]) == 40


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["silence", *arguments])
    output, errors = capsys.readouterr()
    return int(ended.value.code or 0), output, errors


def test_the_command_silences_lists_and_expires(
    served: tuple[services.Alertmanager, Receiver], capsys: pytest.CaptureFixture[str]
) -> None:
    alertmanager, _ = served
    where = ("--alertmanager", alertmanager.url)
    send(
        alertmanager,
        labels("GradwatchClipRateHigh", "ticket", "clip-rate", "s1") | {"model": "quiet"},
        labels("GradwatchClipRateHigh", "ticket", "clip-rate", "s1") | {"model": "loud"},
        labels("NodeDown", "ticket", "node", "s1") | {"model": "quiet"},
        {"alertname": "GradwatchWatchdog", "severity": "info"},
    )
    arguments = ("--model", "quiet", "--for", "2h", "--reason", "a retrain", "--json", *where)
    code, output, _ = call(capsys, *arguments)
    assert code == 0
    made = json.loads(output)["id"]

    def silenced() -> bool:
        return states(alertmanager, model="quiet", alertname="GradwatchClipRateHigh") == ["suppressed"]

    services.eventually(silenced, "the alert to be silenced")
    assert states(alertmanager, model="loud") == ["active"]
    assert states(alertmanager, alertname="NodeDown") == ["active"]
    assert states(alertmanager, alertname="GradwatchWatchdog") == ["active"]
    code, output, _ = call(capsys, "--list", "--json", *where)
    (listed,) = json.loads(output)
    assert (code, listed["id"], listed["model"], listed["reason"]) == (0, made, "quiet", "a retrain")
    assert made in call(capsys, "--list", *where)[1]
    assert call(capsys, "--expire", made, *where)[0] == 0
    services.eventually(
        lambda: states(alertmanager, model="quiet", alertname="GradwatchClipRateHigh") == ["active"], ""
    )
    assert json.loads(call(capsys, "--list", "--json", *where)[1]) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of --model, --list and --expire"),
        (["--model", "m", "--list"], "one of --model, --list and --expire"),
        (["--model", "m", "--reason", "r"], "--for is needed"),
        (["--model", "m", "--for", "2 hours", "--reason", "r"], "write it like"),
        (["--model", "m", "--for", "8d", "--reason", "r"], "7d at most"),
        (["--model", "m", "--for", "2h"], "--reason is needed"),
        (["--expire", "../x"], "no id of a silence"),
        (["--list", "--alertmanager", "http://127.0.0.1:1"], "no Alertmanager at"),
        (["--list", "--alertmanager", "localhost:9093"], "http://"),
    ],
)
def test_wrong_usage_is_told_in_words(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, _, errors = call(capsys, *arguments)
    assert code == 2
    assert words in errors


def test_an_unknown_silence_is_told(
    served: tuple[services.Alertmanager, Receiver], capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = "00000000-0000-0000-0000-000000000000"
    code, _, errors = call(capsys, "--expire", unknown, "--alertmanager", served[0].url)
    assert code == 2
    assert errors.startswith("gradwatch silence: ")
