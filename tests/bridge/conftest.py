"""Real servers for the bridge, and runs, versions and alerts to put into them."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from gradwatch.bridge.service import Bridge, Settings
from tests.services import MlflowServer, Server, eventually, fetch, free_port

TOKEN = "s3cret-token"


class Resumable(Server):
    """A server that can be gone for a while and come back under the same address."""

    def resume(self) -> None:
        port = int(self.url.rsplit(":", 1)[1])
        with self.log.open("ab") as output:
            self._handle = subprocess.Popen(
                self.arguments(port), cwd=self.directory, env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        eventually(lambda: fetch(self.url + self.ready_path) is not None, f"{type(self).__name__} is back", 60)


class SqliteMlflow(Resumable, MlflowServer):
    """MLflow over sqlite."""


class PostgresMlflow(Resumable, MlflowServer):
    """MLflow over PostgreSQL."""

    def __init__(self, directory: Path, database: str) -> None:
        super().__init__(directory)
        self._database = database

    def arguments(self, port: int) -> Sequence[str]:
        arguments = list(super().arguments(port))
        arguments[arguments.index("--backend-store-uri") + 1] = self._database
        return arguments


class Postgres:
    """A PostgreSQL of this test, on loopback; as an ordinary user, since it refuses to run as root."""

    def __init__(self, directory: Path) -> None:
        self._bin = _postgres_programs()
        self._directory = directory
        directory.mkdir(parents=True)
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(directory, user.pw_uid, user.pw_gid)
        self.port = free_port()
        self._handle: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg2://gradwatch@127.0.0.1:{self.port}/postgres"

    def __enter__(self) -> Postgres:
        data = str(self._directory / "data")
        subprocess.run(
            [str(self._bin / "initdb"), "-D", data, "-U", "gradwatch", "--auth=trust", "--no-sync", "-E", "UTF8"],
            check=True, capture_output=True, cwd="/", timeout=60, **self._user,
        )  # fmt: skip
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def resume(self) -> None:
        """Start, or start again, under the same port and with the same data."""
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", "", "-c", "fsync=off"]
        self._handle = subprocess.Popen(
            [str(self._bin / "postgres"), "-D", str(self._directory / "data"), *options],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True, **self._user,
        )  # fmt: skip
        ready = [str(self._bin / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        eventually(lambda: subprocess.run(ready, timeout=10).returncode == 0, "PostgreSQL answers", 30)

    def stop(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.send_signal(2)  # fast shutdown
            try:
                handle.wait(15)
            except subprocess.TimeoutExpired:
                handle.kill()
                handle.wait()


def _postgres_programs() -> Path:
    """Where PostgreSQL's programs are; Debian keeps them out of the path."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    places += [Path(found).resolve().parent] if found else []
    for place in places:
        if all((place / name).exists() for name in ("initdb", "postgres", "pg_isready")):
            return place
    message = "needs PostgreSQL's server: apt-get install postgresql"
    if os.environ.get("GRADWATCH_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{message}; GRADWATCH_REQUIRE_SERVICES=1 asks for it", pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def postgres_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    directory = Path(tmp_path_factory.mktemp("postgres"))
    # Not below pytest's own directory, which is closed to the user that PostgreSQL runs as.
    place = Path(f"/tmp/gradwatch-postgres-{uuid.uuid4().hex[:8]}")
    try:
        with Postgres(place) as postgres, PostgresMlflow(directory / "mlflow", postgres.uri) as server:
            yield server
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def mlflow_store(request: pytest.FixtureRequest) -> MlflowServer:
    """A shared MLflow server over each kind of database; use models and runs of your own."""
    name = {"sqlite": "mlflow_server", "postgresql": "postgres_mlflow"}[request.param]
    server: MlflowServer = request.getfixturevalue(name)
    return server


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL of this test alone, which may be stopped."""
    # Not below pytest's own directory, which is closed to the user that PostgreSQL runs as.
    place = Path(f"/tmp/gradwatch-postgres-{uuid.uuid4().hex[:8]}")
    try:
        with Postgres(place) as postgres:
            yield postgres
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def own_mlflow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Resumable]:
    """An MLflow of this test alone, which may be stopped; over each kind of database."""
    if request.param == "sqlite":
        with SqliteMlflow(tmp_path / "mlflow") as server:
            yield server
    else:
        postgres: Postgres = request.getfixturevalue("own_postgres")
        with PostgresMlflow(tmp_path / "mlflow", postgres.uri) as server:
            yield server


class World:
    """Runs and versions in an MLflow server, in an experiment of their own."""

    def __init__(self, url: str) -> None:
        self.client = MlflowClient(url, registry_uri=url)
        self.model = f"model-{uuid.uuid4().hex[:8]}"
        self.experiment = self.client.create_experiment(self.model)
        self.now = time.time()

    def add_run(
        self,
        run: str,
        *,
        status: str = "RUNNING",
        state: str = "running",
        started: float = 3600.0,
        ended: float = 0.0,
        heartbeat: float | None = 0.0,
        params: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        ours: bool = True,
    ) -> str:
        """A run; times are seconds before now. The id of MLflow."""
        ours_tags = {
            "gradwatch.run": run, "gradwatch.model": self.model, "gradwatch.tier": "production",
            "gradwatch.state": state, "gradwatch.step": "1200", "gradwatch.attempt": "0",
        }  # fmt: skip
        if heartbeat is not None:
            ours_tags["gradwatch.heartbeat"] = str(int(self.now - heartbeat))
        made = self.client.create_run(
            self.experiment,
            start_time=int((self.now - started) * 1000),
            run_name=f"name of {run}",
            tags={**(ours_tags if ours else {}), **(tags or {})},
        )
        run_id = str(made.info.run_id)
        if params or metrics:
            self.client.log_batch(
                run_id,
                params=[Param(f"gradwatch.{key}", str(value)) for key, value in (params or {}).items()],
                metrics=[Metric(f"gradwatch/{key}", number, 0, 0) for key, number in (metrics or {}).items()],
            )
        if status != "RUNNING":
            self.client.set_terminated(run_id, status, end_time=int((self.now - ended) * 1000))
        return run_id

    def add_version(self, run_id: str, tags: Mapping[str, str] | None = None) -> str:
        source = f"mlflow-artifacts:/{self.experiment}/{run_id}/artifacts/model"
        made = self.client.create_model_version(self.model, source, run_id=run_id, tags=dict(tags or {}))
        return str(made.version)

    def tags(self, run_id: str) -> dict[str, str]:
        return dict(self.client.get_run(run_id).data.tags)

    def alerts_of(self, run_id: str) -> dict[str, str]:
        prefix = "gradwatch.alert."
        return {k.removeprefix(prefix): v for k, v in self.tags(run_id).items() if k.startswith(prefix)}

    def artifacts(self, run_id: str) -> set[str]:
        return {item.path for item in self.client.list_artifacts(run_id, "alerts")}


@pytest.fixture
def world(mlflow_store: MlflowServer) -> World:
    return World(mlflow_store.url)


@pytest.fixture
def sqlite_world(mlflow_server: MlflowServer) -> World:
    return World(mlflow_server.url)


def settings(url: str, **more: Any) -> Settings:
    return Settings(tracking_uri=url, webhook_token=TOKEN, **more)


def samples(bridge: Bridge) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The exposition as (name, labels) → value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in bridge.exposition.collect()
        for sample in family.samples
    }


def of_model(bridge: Bridge, name: str, model: str) -> dict[tuple[str, ...], float]:
    """Values of a metric for one model, by the other labels' values in the catalogue's order."""
    from gradwatch.catalog import BY_NAME

    metric = BY_NAME[name]
    found = {}
    for (exposed, labels), value in samples(bridge).items():
        known = dict(labels)
        if exposed == metric.exposed and known.get("model") == model:
            found[tuple(known[label] for label in metric.all_labels if label != "model")] = value
    return found


def alert(
    run: str,
    *,
    name: str = "GradwatchClipRateHigh",
    fingerprint: str = "00000000000000aa",
    firing: bool = True,
    starts: str = "2026-01-31T12:00:00Z",
    ends: str = "2026-01-31T12:05:00Z",
    **labels: str,
) -> dict[str, Any]:
    """An alert as a webhook tells it."""
    return {
        "status": "firing" if firing else "resolved",
        "labels": {"alertname": name, **({"run": run} if run else {}), **labels},
        "annotations": {"summary": "too much is clipped"},
        "startsAt": starts,
        "endsAt": "0001-01-01T00:00:00Z" if firing else ends,
        "generatorURL": "http://prometheus/graph",
        "fingerprint": fingerprint,
    }


def post(*alerts: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": "4", "groupKey": "{}:{}", "status": "firing", "receiver": "bridge", "alerts": list(alerts)}


class BridgeProcess(Server):
    """``gradwatch bridge`` as a process of its own."""

    ready_path = "/healthz"

    def __init__(self, directory: Path, mlflow: str, *options: str) -> None:
        super().__init__(directory)
        self._mlflow, self._options = mlflow, options
        self.token_file = directory / "token"
        self.token_file.write_text(TOKEN)

    def arguments(self, port: int) -> Sequence[str]:
        return [
            sys.executable, "-m", "gradwatch", "bridge", "--mlflow", self._mlflow, "--listen", f"127.0.0.1:{port}",
            "--webhook-token-file", str(self.token_file), "--interval", "1", *self._options,
        ]  # fmt: skip

    @property
    def webhook(self) -> str:
        return f"{self.url}/webhooks/alertmanager"

    def is_ready(self) -> bool:
        return fetch(f"{self.url}/readyz") is not None


class ResumableBridge(Resumable, BridgeProcess):
    """A bridge that can be restarted under the same address."""
