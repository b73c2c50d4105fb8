"""Webhooks against a real MLflow server: what stands there afterwards, and what is refused in words."""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gradwatch.bridge.openapi import WEBHOOK_PATH
from gradwatch.bridge.service import Bridge
from gradwatch.bridge.web import application
from tests.bridge.conftest import TOKEN, World, alert, post, samples, settings
from tests.services import MlflowServer, eventually


@pytest.fixture
def bridge(sqlite_world: World) -> Bridge:
    return Bridge(settings(sqlite_world.client.tracking_uri, interval=3600, max_body_bytes=16 * 2**20))


@pytest.fixture
def client(bridge: Bridge) -> Iterator[TestClient]:
    with TestClient(application(bridge)) as client:
        eventually(lambda: bridge.ready, "MLflow was read")
        yield client


def tell(client: TestClient, *alerts: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answer = client.post(WEBHOOK_PATH, json=post(*alerts), headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == status, answer.text
    told: dict[str, Any] = answer.json()
    return told


def counts(answer: dict[str, Any]) -> tuple[int, int, int, int]:
    return answer["applied"], answer["unchanged"], answer["unknown"], answer["refused"]


def test_an_alert_tags_the_run_and_leaves_an_artifact(world: World) -> None:
    """Over sqlite and over PostgreSQL."""
    run_id = world.add_run(f"run of {world.model}")
    bridge = Bridge(settings(world.client.tracking_uri, interval=3600))
    with TestClient(application(bridge)) as client:
        eventually(lambda: bridge.ready, "MLflow was read")
        assert counts(tell(client, alert(f"run of {world.model}", severity="page"))) == (1, 0, 0, 0)
        text = "firing since 2026-01-31T12:00:00.000Z, step 1200 [00000000000000aa]"
        assert world.alerts_of(run_id) == {"GradwatchClipRateHigh": text}
        assert counts(tell(client, alert(f"run of {world.model}", firing=False, severity="page"))) == (1, 0, 0, 0)
    text = "resolved 2026-01-31T12:00:00.000Z to 2026-01-31T12:05:00.000Z, step 1200 to step 1200 [00000000000000aa]"
    assert world.alerts_of(run_id) == {"GradwatchClipRateHigh": text}
    [path] = world.artifacts(run_id)
    assert path == "alerts/00000000000000aa-20260131T120000.000Z.json"
    written = json.loads(Path(world.client.download_artifacts(run_id, path)).read_text(encoding="utf-8"))
    assert (written["status"], written["endsAt"], written["labels"]["severity"]) == (
        "resolved",
        "2026-01-31T12:05:00.000Z",
        "page",
    )


def test_telling_twice_changes_nothing_also_over_a_restart(sqlite_world: World, client: TestClient) -> None:
    run_id = sqlite_world.add_run("twice")
    assert counts(tell(client, alert("twice"), alert("twice"))) == (2, 0, 0, 0)
    before = sqlite_world.alerts_of(run_id)
    assert counts(tell(client, alert("twice"))) == (0, 1, 0, 0)
    with TestClient(application(Bridge(settings(sqlite_world.client.tracking_uri, interval=3600)))) as restarted:
        eventually(lambda: restarted.get("/readyz").status_code == 200, "MLflow was read")
        sqlite_world.client.set_tag(run_id, "gradwatch.step", "9999")
        assert counts(tell(restarted, alert("twice"))) == (0, 1, 0, 0)
    assert sqlite_world.alerts_of(run_id) == before
    assert len(sqlite_world.artifacts(run_id)) == 1


def test_resolved_before_firing_and_an_older_life_after_a_newer_one(sqlite_world: World, client: TestClient) -> None:
    run_id = sqlite_world.add_run("order")
    tell(client, alert("order", firing=False))
    tell(client, alert("order"))
    assert sqlite_world.alerts_of(run_id)["GradwatchClipRateHigh"].startswith("resolved")
    later = {"starts": "2026-01-31T13:00:00Z"}
    tell(client, alert("order", **later))
    tell(client, alert("order", starts="2026-01-31T11:00:00Z", firing=False, ends="2026-01-31T11:30:00Z"))
    text = sqlite_world.alerts_of(run_id)["GradwatchClipRateHigh"]
    assert text.startswith("firing since 2026-01-31T13:00:00.000Z")
    # Each life keeps its own artifact, with its own last word.
    assert {path.rpartition("-")[2] for path in sqlite_world.artifacts(run_id)} == {
        "20260131T110000.000Z.json", "20260131T120000.000Z.json", "20260131T130000.000Z.json",
    }  # fmt: skip


def test_a_late_first_word_does_not_replace_the_last_one_after_a_restart(sqlite_world: World) -> None:
    """The tag knows a newer life only; the artifact of the older one says resolved, and keeps saying so."""
    run_id = sqlite_world.add_run("late")
    url = sqlite_world.client.tracking_uri
    for told in (
        [alert("late", firing=False), alert("late", starts="2026-01-31T13:00:00Z")],
        [alert("late")],
    ):
        bridge = Bridge(settings(url, interval=3600))
        with TestClient(application(bridge)) as client:
            eventually(lambda: bridge.ready, "MLflow was read")  # noqa: B023
            tell(client, *told)
    path = "alerts/00000000000000aa-20260131T120000.000Z.json"
    local = sqlite_world.client.download_artifacts(run_id, path)
    assert json.loads(Path(local).read_text(encoding="utf-8"))["status"] == "resolved"


def test_unknown_runs_and_bad_alerts_do_not_hold_up_the_others(sqlite_world: World, client: TestClient) -> None:
    run_id = sqlite_world.add_run("known")
    bad = alert("known") | {"startsAt": "soon"}
    answer = tell(client, alert("nobody"), bad, alert("known"), alert("quo\"te's"))
    assert counts(answer) == (1, 0, 2, 1)
    assert "alerts[1]: startsAt" in answer["reasons"][0]
    assert sqlite_world.alerts_of(run_id)


def test_a_run_made_after_the_last_poll_is_found(sqlite_world: World, client: TestClient) -> None:
    later = World(sqlite_world.client.tracking_uri)
    run_id = later.add_run("made later")
    assert counts(tell(client, alert("made later"))) == (1, 0, 0, 0)
    assert later.alerts_of(run_id)


def test_the_version_of_a_run_is_tagged_and_a_model_without_a_run_by_its_current_version(
    sqlite_world: World, bridge: Bridge, client: TestClient
) -> None:
    run_id = sqlite_world.add_run("behind", status="FINISHED", state="finished")
    sqlite_world.client.create_registered_model(sqlite_world.model)
    sqlite_world.add_version(run_id)
    bridge.poll()
    tell(client, alert("behind"), alert("", name="GradwatchScoreDropped", model=sqlite_world.model))
    assert sqlite_world.alerts_of(run_id)["GradwatchClipRateHigh"].startswith("firing")
    tags = sqlite_world.client.get_model_version(sqlite_world.model, "1").tags
    assert tags["gradwatch.alert.GradwatchClipRateHigh"].startswith("firing since 2026-01-31T12:00:00.000Z, step 1200")
    assert tags["gradwatch.alert.GradwatchScoreDropped"].startswith("firing since 2026-01-31T12:00:00.000Z [")
    tell(client, alert("", name="GradwatchScoreDropped", model=sqlite_world.model, firing=False))
    tags = sqlite_world.client.get_model_version(sqlite_world.model, "1").tags
    assert tags["gradwatch.alert.GradwatchScoreDropped"].startswith("resolved")


def test_ten_thousand_alerts_in_one_post(sqlite_world: World, client: TestClient) -> None:
    """Of which most are about runs that MLflow does not have; the others are all written."""
    runs = {f"many-{index}": sqlite_world.add_run(f"many-{index}") for index in range(3)}
    alerts = [
        alert(f"many-{index % 3}" if index < 60 else "absent", name=f"A{index % 5}", fingerprint=f"{index:016x}")
        for index in range(10_000)
    ]
    assert counts(tell(client, *alerts)) == (60, 0, 9940, 0)
    for run_id in runs.values():
        assert len(sqlite_world.artifacts(run_id)) == 20
        assert set(sqlite_world.alerts_of(run_id)) == {f"A{n}" for n in range(5)}


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Authorization": TOKEN}, 401),
     ({"Authorization": "Bearer caf\xe9"}, 401)],
)  # fmt: skip
def test_without_the_token_nothing_is_read(client: TestClient, headers: dict[str, str], status: int) -> None:
    latin = {key: value.encode("latin-1") for key, value in headers.items()}
    answer = client.post(WEBHOOK_PATH, content=b"{", headers=latin)  # type: ignore[arg-type]
    assert answer.status_code == status
    assert "bearer token" in answer.json()["error"]


def test_the_token_is_compared_in_constant_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def watched(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", watched)
    tell(client)
    assert compared == [(f"Bearer {TOKEN}".encode(),) * 2]


def test_a_bridge_without_a_token_takes_no_webhooks(mlflow_server: MlflowServer) -> None:
    bridge = Bridge(replace(settings(mlflow_server.url), webhook_token=None))
    with TestClient(application(bridge)) as client:
        answer = client.post(WEBHOOK_PATH, json=post(), headers={"Authorization": "Bearer None"})
    assert answer.status_code == 403
    assert "without a token" in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"version": "3"}', 400, "version"),
        (b'{"version": "4", "alerts": [1]}', 400, "no alert of 1"),
        (b" " * (16 * 2**20 + 1), 413, "longer than"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_words(client: TestClient, body: bytes, status: int, words: str) -> None:
    answer = client.post(WEBHOOK_PATH, content=body, headers={"Authorization": f"Bearer {TOKEN}"})
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text


def test_a_body_that_does_not_say_its_length_is_limited_too(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 2**20

    answer = client.post(WEBHOOK_PATH, content=chunks(), headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 413


def test_pages_answer_and_webhooks_are_counted(client: TestClient, bridge: Bridge) -> None:
    tell(client)
    client.post(WEBHOOK_PATH)
    assert client.get("/healthz").text == client.get("/readyz").text == "ok\n"
    text = client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    assert 'gradwatch_bridge_webhooks_total{result="accepted"} 1.0' in text.text
    assert samples(bridge)[("gradwatch_bridge_webhooks_total", frozenset({("result", "refused")}))] == 1
    open_metrics = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert open_metrics.text.endswith("# EOF\n")
    assert client.get("/nothing").json() == {"error": "Not Found"}
    assert client.get(WEBHOOK_PATH).status_code == 405
