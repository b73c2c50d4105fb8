"""The smoke script for one's own Grafana, against a stand-in that answers its four requests.

No Grafana runs in the development environment, so this shows that the script
works and notices a difference, not that Grafana takes the dashboards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.ops.dashboard_support.panels import ROOT, UIDS, load


class StandIn(BaseHTTPRequestHandler):
    """Keeps dashboards by uid; with ``spoil``, gives them back with a panel less."""

    kept: dict[str, Any]
    tokens: set[str]
    spoil = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.kept[body["dashboard"]["uid"]] = body["dashboard"]
        self._answer({"status": "success"})

    def do_GET(self) -> None:
        if self.path.startswith("/api/dashboards/uid/"):
            dashboard = self.kept[self.path.rpartition("/")[2]]
            panels = dashboard["panels"][1:] if self.spoil else dashboard["panels"]
            self._answer({"dashboard": {**dashboard, "panels": panels}})
        elif self.path == "/api/datasources":
            self._answer([{"uid": "logs", "type": "loki"}, {"uid": "prom", "type": "prometheus"}])
        else:
            assert self.path.startswith("/api/datasources/proxy/uid/prom/"), self.path
            self._answer({"data": {"result": [{"metric": {}, "value": [0, "3"]}]}})

    def _answer(self, body: Any) -> None:
        self.tokens.add(self.headers.get("Authorization", ""))
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def grafana() -> Iterator[tuple[str, type[StandIn]]]:
    kind = type("OneStandIn", (StandIn,), {"kept": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", kind
    server.shutdown()
    server.server_close()
    thread.join(5)


def smoke(url: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("curl") is None:
        pytest.skip("needs curl: apt-get install curl")
    script = str(ROOT / "dashboards" / "smoke.sh")
    environment = {**os.environ, "GRAFANA_URL": url + "/", "GRAFANA_TOKEN": "secret"}
    return subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_it_imports_all_three_and_finds_runs(grafana: tuple[str, type[StandIn]]) -> None:
    url, kind = grafana
    told = smoke(url)
    assert told.returncode == 0, told.stderr
    assert kind.kept == load()
    assert kind.tokens == {"Bearer secret"}
    assert [line.split()[1] for line in told.stdout.splitlines() if line.startswith("ok")] == sorted(UIDS)
    assert "data source prom shows 3 runs" in told.stdout


def test_a_dashboard_that_comes_back_changed_fails(grafana: tuple[str, type[StandIn]]) -> None:
    url, kind = grafana
    kind.spoil = True
    told = smoke(url)
    assert told.returncode == 1
    assert "FAILED  gradwatch-fleet" in told.stderr
