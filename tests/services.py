"""Real servers for tests: Prometheus, Alertmanager, MLflow; each on a free loopback port, stopped by its handle.

Where a program is missing, a test is skipped with a line that says how to get it; with
``GRADWATCH_REQUIRE_SERVICES=1`` it fails instead.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

START_SECONDS = 60.0
STOP_SECONDS = 10.0
#: A free port may be taken by the time that a server binds it.
TRIES = 3

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "chromium": "chromium",
    "chromedriver": "chromium-driver",
    "node": "nodejs",
}

T = TypeVar("T")


def program(name: str) -> str:
    """The path of a program, or the end of this test with a line that says how to get it."""
    path = shutil.which(name)
    if path is not None:
        return path
    message = f"needs {name}: apt-get install {_PACKAGES.get(name, name)} (`make test` does where it can)"
    if os.environ.get("GRADWATCH_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{message}; GRADWATCH_REQUIRE_SERVICES=1 asks for it", pytrace=False)
    pytest.skip(message)


def free_port() -> int:
    """A loopback port on which nobody listens right now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def eventually(look: Callable[[], T | None], what: str, seconds: float = 30.0, pause: float = 0.05) -> T:
    """The first truthy answer of ``look``; fails the test where none comes in time. For real processes only."""
    deadline = time.monotonic() + seconds
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}; last: {answer!r}")
        time.sleep(pause)


def fetch(url: str, data: bytes | None = None, headers: Mapping[str, str] | None = None) -> str | None:
    """The body of an answer with status 200; None where there is none (yet)."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, dict(headers or {})), timeout=10) as answer:
            return answer.read().decode() if answer.status == 200 else None
    except (urllib.error.URLError, OSError):
        return None


class Server:
    """A server process of this test, ready to answer once the block is entered."""

    ready_path = "/"
    #: Set for the process, beside what this one has.
    environment: Mapping[str, str] = {}

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / "server.log"
        self.url = ""
        self._handle: subprocess.Popen[bytes] | None = None

    def arguments(self, port: int) -> Sequence[str]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        for _ in range(TRIES):
            port = free_port()
            self.url = f"http://127.0.0.1:{port}"
            with self.log.open("wb") as output:
                self._handle = subprocess.Popen(
                    self.arguments(port),
                    cwd=self.directory,
                    env={**os.environ, **self.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            deadline = time.monotonic() + START_SECONDS
            while self._handle.poll() is None and time.monotonic() < deadline:
                if fetch(self.url + self.ready_path) is not None:
                    return self
                time.sleep(0.05)
            self.stop()
        tail = self.log.read_text(errors="replace")[-2000:]
        pytest.fail(f"{type(self).__name__} did not start:\n{tail}")

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ask the process to leave, end it where it does not."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        handle.terminate()
        try:
            handle.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            handle.kill()
            handle.wait()

    def get_json(self, path: str, **parameters: str) -> Any:
        """The JSON answer to a GET, or None."""
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        body = fetch(f"{self.url}{path}{query}")
        return None if body is None else json.loads(body)


class Prometheus(Server):
    """A Prometheus that scrapes ``targets`` (``host:port``); rule files and an Alertmanager if given."""

    ready_path = "/-/ready"

    def __init__(
        self,
        directory: Path,
        targets: Sequence[str],
        *,
        rules: Sequence[Path] = (),
        alertmanager: str | None = None,
        interval: str = "250ms",
        job: str = "gradwatch",
    ) -> None:
        super().__init__(directory)
        self._program = program("prometheus")
        config: dict[str, Any] = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
            },
            "rule_files": [str(path.absolute()) for path in rules],
            "scrape_configs": [{"job_name": job, "static_configs": [{"targets": list(targets)}]}],
        }
        if alertmanager is not None:
            address = alertmanager.removeprefix("http://")
            config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [address]}]}]}
        # JSON is YAML.
        (directory / "prometheus.yml").write_text(json.dumps(config, indent=2))

    def arguments(self, port: int) -> Sequence[str]:
        return [
            self._program,
            f"--config.file={self.directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            # An alert that fires before the Alertmanager was discovered is sent again at once, not in a minute.
            "--rules.alert.resend-delay=1s",
        ]

    def query(self, expression: str, at: float | None = None) -> list[tuple[dict[str, str], float]]:
        """An instant query: (labels, value) of each series of the answer."""
        when = {} if at is None else {"time": repr(at)}
        answer = self.get_json("/api/v1/query", query=expression, **when)
        assert answer is not None, f"Prometheus refused: {expression}"
        return [(series["metric"], float(series["value"][1])) for series in answer["data"]["result"]]

    def alerts(self) -> list[dict[str, Any]]:
        """Active alerts as ``/api/v1/alerts`` lists them."""
        answer = self.get_json("/api/v1/alerts")
        return list(answer["data"]["alerts"]) if answer else []


class Alertmanager(Server):
    """An Alertmanager with the given configuration (a mapping, or YAML text), without clustering."""

    ready_path = "/-/ready"

    def __init__(self, directory: Path, config: Mapping[str, Any] | str) -> None:
        super().__init__(directory)
        self._program = program("prometheus-alertmanager")
        text = config if isinstance(config, str) else json.dumps(config, indent=2)
        (directory / "alertmanager.yml").write_text(text)

    def arguments(self, port: int) -> Sequence[str]:
        return [
            self._program,
            f"--config.file={self.directory / 'alertmanager.yml'}",
            f"--storage.path={self.directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ]

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts that it holds, as ``/api/v2/alerts`` lists them."""
        return list(self.get_json("/api/v2/alerts") or [])


class MlflowServer(Server):
    """An MLflow tracking server over a sqlite file, artifacts beside it."""

    ready_path = "/health"
    # Its runners of background jobs are seven more processes, which take long to start and to leave.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # noqa: RUF012

    def arguments(self, port: int) -> Sequence[str]:
        return [
            sys.executable, "-m", "mlflow", "server",
            "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.directory / 'mlflow.db'}",
            "--artifacts-destination", str(self.directory / "artifacts"),
        ]  # fmt: skip


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """An MLflow tracking server, one for all tests of a worker: use experiments of your own."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server
