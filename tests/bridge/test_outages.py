"""The bridge as a process between a real Alertmanager and a real MLflow, each of which goes away for a while."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.bridge.conftest import (
    TOKEN,
    BridgeProcess,
    Postgres,
    PostgresMlflow,
    Resumable,
    ResumableBridge,
    World,
    alert,
    post,
)  # fmt: skip
from tests.services import Alertmanager, Server, eventually, fetch, free_port

pytestmark = pytest.mark.services

#: Since when alerts fire; without it, Alertmanager takes the time of the end.
STARTED = datetime.now(UTC) - timedelta(minutes=1)


class ResumableAlertmanager(Resumable, Alertmanager):
    """An Alertmanager that can be gone for a while."""


def send(url: str, document: Any, token: str = "") -> tuple[int, Any]:
    """POST JSON; status and answer."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, json.dumps(document).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
            return answer.status, json.loads(body or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def raise_alert(alertmanager: Server, run: str, name: str = "GradwatchNonFinite", *, over: bool = False) -> None:
    """As Prometheus does, tell an alert; an alert that is over ends now."""
    now = datetime.now(UTC)
    ends = now if over else now + timedelta(hours=1)
    times = {"startsAt": STARTED.isoformat(), "endsAt": ends.isoformat()}
    document = [{"labels": {"alertname": name, "run": run}, **times}]
    assert send(f"{alertmanager.url}/api/v2/alerts", document)[0] == 200


def config(bridge_url: str) -> dict[str, Any]:
    """An Alertmanager that posts each alert to the bridge, and tries again soon."""
    return {
        "route": {
            "receiver": "bridge", "group_by": ["..."],
            "group_wait": "100ms", "group_interval": "1s", "repeat_interval": "1h",
        },
        "receivers": [
            {
                "name": "bridge",
                "webhook_configs": [
                    {
                        "url": f"{bridge_url}/webhooks/alertmanager",
                        "http_config": {"authorization": {"credentials": TOKEN}},
                    }
                ],
            }
        ],
    }  # fmt: skip


def stands(world: World, run_id: str, start: str, name: str = "GradwatchNonFinite") -> Callable[[], bool]:
    return lambda: world.alerts_of(run_id).get(name, "").startswith(start)


def test_alerts_arrive_through_outages_of_mlflow_of_the_bridge_and_of_alertmanager(
    tmp_path: Path, own_mlflow: Resumable
) -> None:
    world = World(own_mlflow.url)
    runs = {name: world.add_run(name) for name in ("calm", "outage", "restart", "short", "after")}
    # The bridge wants to know Alertmanager's address and the other way round.
    port = free_port()
    with ResumableBridge(tmp_path / "bridge", own_mlflow.url, "--alertmanager", f"http://127.0.0.1:{port}") as bridge:
        eventually(bridge.is_ready, "the bridge has read MLflow", 60)
        alertmanager = ResumableAlertmanager(tmp_path / "alertmanager", config(bridge.url))
        alertmanager.url = f"http://127.0.0.1:{port}"
        alertmanager.resume()
        try:
            raise_alert(alertmanager, "calm")
            eventually(stands(world, runs["calm"], "firing"), "it fires in MLflow")
            raise_alert(alertmanager, "calm", over=True)
            eventually(stands(world, runs["calm"], "resolved"), "it is resolved in MLflow")

            # MLflow is away: 503, in words, and the alert arrives afterwards.
            own_mlflow.stop()
            eventually(lambda: not bridge.is_ready(), "the bridge says that it is not ready", 60)
            status, answer = send(bridge.webhook, post(alert("outage")), TOKEN)
            assert status == 503
            assert answer["error"]
            raise_alert(alertmanager, "outage")
            # This one fires and is over within the outage: nobody keeps it, and nothing claims otherwise.
            raise_alert(alertmanager, "short")
            raise_alert(alertmanager, "short", over=True)
            assert send(bridge.webhook, post(alert("outage")), TOKEN)[0] == 503
            own_mlflow.resume()
            eventually(stands(world, runs["outage"], "firing"), "the alert of the outage stands in MLflow", 90)
            assert not stands(world, runs["short"], "firing")()

            # The bridge is away: Alertmanager keeps what it could not tell.
            bridge.stop()
            raise_alert(alertmanager, "restart")
            bridge.resume()
            eventually(stands(world, runs["restart"], "firing"), "the alert of the restart stands in MLflow", 90)

            # Alertmanager is away: the bridge lives on, and takes what comes afterwards.
            alertmanager.stop()
            eventually(bridge.is_ready, "the bridge is ready without Alertmanager")
            alertmanager.resume()
            raise_alert(alertmanager, "after")
            eventually(stands(world, runs["after"], "firing"), "a new alert stands in MLflow", 60)
            raise_alert(alertmanager, "after", over=True)
            eventually(stands(world, runs["after"], "resolved"), "its end stands in MLflow", 60)
        finally:
            alertmanager.stop()


def test_an_mlflow_whose_database_is_away_is_an_outage_too(tmp_path: Path, own_postgres: Postgres) -> None:
    """MLflow's own page of health stays green then; the bridge asks for runs."""
    with PostgresMlflow(tmp_path / "mlflow", own_postgres.uri) as mlflow:
        world = World(mlflow.url)
        run_id = world.add_run("behind")
        with BridgeProcess(tmp_path / "bridge", mlflow.url) as bridge:
            eventually(bridge.is_ready, "the bridge has read MLflow", 60)
            own_postgres.stop()
            eventually(lambda: not bridge.is_ready(), "the bridge says that it is not ready", 60)
            assert fetch(f"{mlflow.url}/health") is not None
            assert fetch(f"{bridge.url}/healthz") is not None
            status, answer = send(bridge.webhook, post(alert("behind")), TOKEN)
            assert status == 503
            assert answer["error"]
            own_postgres.resume()
            eventually(bridge.is_ready, "the bridge reads MLflow again", 60)
            assert send(bridge.webhook, post(alert("behind")), TOKEN)[0] == 200
            assert stands(world, run_id, "firing", "GradwatchClipRateHigh")()


def test_what_alertmanager_holds_is_written_after_an_outage_without_a_webhook(
    tmp_path: Path, own_mlflow: Resumable
) -> None:
    """No receiver posts anything: the comparison with ``/api/v2/alerts`` alone brings the alert."""
    silent = {"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}
    world = World(own_mlflow.url)
    with Alertmanager(tmp_path / "alertmanager", silent) as alertmanager:
        run_id = world.add_run("kept")
        with BridgeProcess(tmp_path / "bridge", own_mlflow.url, "--alertmanager", alertmanager.url) as bridge:
            eventually(bridge.is_ready, "the bridge has read MLflow", 60)
            own_mlflow.stop()
            eventually(lambda: not bridge.is_ready(), "the outage is noticed", 60)
            raise_alert(alertmanager, "kept")
            own_mlflow.resume()
            eventually(stands(world, run_id, "firing"), "the alert stands in MLflow", 60)


def test_a_bridge_that_is_told_to_stop_ends_in_good_order_and_answers_what_is_under_way(
    tmp_path: Path, sqlite_world: World
) -> None:
    run_id = sqlite_world.add_run("leaving")
    with BridgeProcess(tmp_path / "bridge", sqlite_world.client.tracking_uri) as bridge:
        eventually(bridge.is_ready, "the bridge has read MLflow", 60)
        assert send(bridge.webhook, post(alert("leaving")), TOKEN)[0] == 200
        assert bridge._handle is not None
        bridge._handle.send_signal(signal.SIGTERM)
        assert bridge._handle.wait(30) == 0
        assert "Traceback" not in bridge.log.read_text()
    assert sqlite_world.alerts_of(run_id)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "which MLflow?"),
        (["--mlflow", "x", "--reap", "maybe"], "choose off, dry-run or on"),
        (["--mlflow", "x", "--reap", "on"], "--reap on needs --prometheus"),
        (["--mlflow", "x", "--grafana", "http://g"], "needs a token"),
        (["--mlflow", "x", "--alertmanager", "am:9093"], "http://"),
        (["--mlflow", "x", "--listen", "9465x"], "host:port"),
        (["--mlflow", "x", "--webhook-token-file", "/nonexistent"], "No such file"),
    ],
)
def test_wrong_usage_is_said_in_words(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradwatch.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["bridge", *options])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
