"""Annotations, against a small stand-in that keeps them as Grafana's HTTP API describes: there is no Grafana here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from gradwatch.bridge.alerts import Alert, parse_alerts
from gradwatch.bridge.annotations import MAX_WAITING, Annotations
from tests.bridge.conftest import alert
from tests.services import eventually

NOON = 1_769_860_800_000
FIVE_PAST = NOON + 300_000


class StandIn(ThreadingHTTPServer):
    """``/api/annotations``: GET by tags (all of them), POST, PATCH by id; 401 without the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kept: list[dict[str, Any]] = []
        self.down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def _answer(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(503 if self.server.down else status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        if self.headers.get("Authorization") != "Bearer grafana-token":
            return self._answer(401, {"message": "Unauthorized"})
        path = urlsplit(self.path)
        if self.command == "GET":
            wanted = set(parse_qs(path.query)["tags"])
            return self._answer(200, [kept for kept in self.server.kept if wanted <= set(kept["tags"])])
        if self.server.down:
            return self._answer(503, {})
        if self.command == "POST":
            self.server.kept.append({"id": len(self.server.kept) + 1, **body})
            return self._answer(200, {"message": "Annotation added", "id": len(self.server.kept)})
        self.server.kept[int(path.path.rpartition("/")[2]) - 1] |= body
        return self._answer(200, {"message": "Annotation patched"})

    do_GET = do_POST = do_PATCH = _handle  # noqa: N815 (the standard library's names)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def grafana() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def told(**more: Any) -> Alert:
    [parsed], _ = parse_alerts([alert("run-1", severity="page", model="churn", **more)])
    return parsed


def test_an_alert_is_one_annotation_that_gets_its_end(grafana: StandIn) -> None:
    annotations = Annotations(grafana.url, "grafana-token")
    annotations.start()
    for one in (told(), told(), told(firing=False), told(firing=False)):
        annotations.put(one)
    annotations.stop(10)
    [kept] = grafana.kept
    assert (kept["time"], kept["timeEnd"]) == (NOON, FIVE_PAST)
    assert kept["tags"][:5] == ["gradwatch", "GradwatchClipRateHigh", "page", "churn", "run-1"]
    assert kept["text"] == "GradwatchClipRateHigh: too much is clipped"
    assert annotations.counts == {"written": 4}


def test_one_that_is_over_before_it_was_seen_has_both_times_and_another_life_is_another_annotation(
    grafana: StandIn,
) -> None:
    for one in (told(firing=False), told(starts="2026-01-31T13:00:00Z")):
        # Each from a bridge that was just started: nothing is remembered but in Grafana.
        Annotations(grafana.url, "grafana-token").write(one)
    assert [(kept["time"], kept.get("timeEnd")) for kept in grafana.kept] == [
        (NOON, FIVE_PAST), (NOON + 3_600_000, None),
    ]  # fmt: skip


def test_a_grafana_that_is_away_or_refuses_costs_a_count_and_nothing_else(grafana: StandIn) -> None:
    refused = Annotations(grafana.url, "wrong")
    grafana.down = True
    away = Annotations(grafana.url, "grafana-token")
    for writer in (refused, away):
        writer.start()
        writer.put(told())
        eventually(lambda writer=writer: writer.counts["failed"] == 1, "the failure is counted")
        writer.stop(10)


def test_what_waits_is_bounded() -> None:
    annotations = Annotations("http://127.0.0.1:9", "t")
    for _ in range(MAX_WAITING + 5):
        annotations.put(told())
    assert annotations.counts["failed"] == 5
