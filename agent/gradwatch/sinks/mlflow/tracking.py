"""The MLflow client with bounds: no retries of its own, short timeouts, and errors that say what to do next.

Only ``MlflowClient`` is used: no fluent state, no autologging, no asynchronous
queue, no telemetry. ``mlflow`` is imported at the first call, in the thread that
makes it.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from gradwatch.sinks.mlflow.entities import PREFIX, Metric

#: Set before mlflow is imported. Retries are ours: they back off, are counted, and end at shutdown.
_ENVIRONMENT: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
#: Longest that a request waits for a connection, or for the next byte. Shorter is taken from the environment.
REQUEST_SECONDS: Final = 15
RUN_TAG: Final = f"{PREFIX}run"

_HTTP_STATUS: Final = re.compile(r"failed with error code (\d{3})")
_USERINFO: Final = re.compile(r"(?<=://)[^/@\s]+@")
_SECRETS: Final = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN", "DATABRICKS_CLIENT_SECRET")

T = TypeVar("T")


class Kind(Enum):
    """What a failed call asks for."""

    RETRY = "retry"
    #: Credentials expired or permission missing: retried slowly, since somebody has to act.
    DENIED = "denied"
    #: This content will never be taken.
    REJECTED = "rejected"
    #: The run is not there.
    GONE = "gone"
    #: Nothing will ever work here: mlflow or what it needs is not installed.
    UNUSABLE = "unusable"


class TrackingError(Exception):
    """A failed call to MLflow; its text holds no credentials."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class RunView:
    """An MLflow run as it stands."""

    run_id: str
    status: str
    deleted: bool
    tags: Mapping[str, str]
    params: Mapping[str, str]


class Tracking:
    """One tracking server or store; usable from several threads."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client: Any = None
        self._lock = threading.Lock()

    # -- runs

    def get_run(self, run_id: str) -> RunView:
        """Raises ``TrackingError`` of kind GONE where there is none."""
        return self._call(lambda client: _view(client.get_run(run_id)))

    def find_run(self, run_id: str) -> RunView | None:
        """The run, or None where there is none."""
        try:
            return self.get_run(run_id)
        except TrackingError as error:
            if error.kind in (Kind.GONE, Kind.REJECTED):
                return None
            raise

    def search_run(self, experiment_id: str, run: str) -> RunView | None:
        """The newest run of an experiment that is tagged with this gradwatch run."""
        if "'" in run and '"' in run:
            return None
        quote = '"' if "'" in run else "'"
        found = self._call(
            lambda client: client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = {quote}{run}{quote}", max_results=1)
        )
        return _view(found[0]) if found else None

    def experiment_id(self, name: str, *, create: bool) -> str | None:
        """The experiment to use for new runs: the environment's, else the one of this name (made where missing).

        Nothing can be added to a deleted experiment; one beside it is used then.
        """
        if os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
        for candidate in (name, f"{name} (gradwatch)"):
            found = self._call(partial(_experiment, candidate))
            if found is not None and found.lifecycle_stage == "active":
                return str(found.experiment_id)
            if found is None:
                # Where another agent was quicker this is an error, and the next try finds the experiment.
                made = partial(_make_experiment, candidate, beside(self.uri))
                return self._call(made, conflict=Kind.RETRY) if create else None
        raise TrackingError(Kind.DENIED, f"experiment {name!r} is deleted; restore it or set MLFLOW_EXPERIMENT_NAME")

    def create_run(self, experiment_id: str, name: str, tags: Mapping[str, str], start_time: float) -> RunView:
        start = max(0, round(start_time * 1000))
        return self._call(
            lambda client: _view(client.create_run(experiment_id, start_time=start, tags=dict(tags), run_name=name))
        )

    def set_running(self, run_id: str) -> None:
        self._call(lambda client: client.update_run(run_id, status="RUNNING"))

    def set_terminated(self, run_id: str, status: str, end_time: float | None) -> None:
        """End a run, at a Unix time or now."""
        when = None if end_time is None else max(1, round(end_time * 1000))
        self._call(lambda client: client.set_terminated(run_id, status, end_time=when))

    # -- content

    def log_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """At most 1,000."""

        def send(client: Any) -> None:
            from mlflow.entities import Metric as Entity

            client.log_batch(run_id, metrics=[Entity(*metric) for metric in metrics], synchronous=True)

        self._call(send)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """At most 100."""

        def send(client: Any) -> None:
            from mlflow.entities import Param

            client.log_batch(run_id, params=[Param(*param) for param in params.items()], synchronous=True)

        self._call(send)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """At most 100."""

        def send(client: Any) -> None:
            from mlflow.entities import RunTag

            client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)

        self._call(send)

    def upload(self, run_id: str, path: Path, directory: str) -> None:
        """A local file as an artifact of the same name in ``directory`` ("" for the root)."""
        self._call(lambda client: client.log_artifact(run_id, str(path), directory or None))

    # -- errors

    def _call(self, call: Callable[[Any], T], conflict: Kind = Kind.REJECTED) -> T:
        try:
            return call(self._connect())
        except TrackingError:
            raise
        except Exception as error:
            kind = _kind(error)
            raise TrackingError(conflict if kind is Kind.REJECTED else kind, scrub(error)) from None

    def _connect(self) -> Any:
        with self._lock:
            if self._client is None:
                _bound_mlflow()
                try:
                    from mlflow import MlflowClient
                except ImportError:
                    raise TrackingError(
                        Kind.UNUSABLE, "mlflow is not installed here: pip install 'gradwatch[agent]'"
                    ) from None
                logging.getLogger("mlflow").setLevel(logging.ERROR)
                self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
            return self._client


def _bound_mlflow() -> None:
    """Take retries, telemetry and endless waits out of the client, for this process."""
    os.environ.update(_ENVIRONMENT)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"):
        given = os.environ.get(name, "")
        seconds = int(given) if given.isascii() and given.isdigit() else REQUEST_SECONDS
        os.environ[name] = str(min(max(seconds, 1), REQUEST_SECONDS))


def _experiment(name: str, client: Any) -> Any:
    return client.get_experiment_by_name(name)


def _make_experiment(name: str, location: str | None, client: Any) -> str:
    return str(client.create_experiment(name, artifact_location=location))


def beside(uri: str) -> str | None:
    """Where artifacts of a sqlite file go: beside it. MLflow would take the working directory of whoever asks."""
    path = uri.removeprefix("sqlite:///")
    return (Path(path).resolve().parent / "mlartifacts").as_uri() if path != uri and path else None


def _view(run: Any) -> RunView:
    deleted = run.info.lifecycle_stage != "active"
    return RunView(str(run.info.run_id), str(run.info.status), deleted, dict(run.data.tags), dict(run.data.params))


def _kind(error: Exception) -> Kind:
    """What to do after an error of mlflow, requests, or an artifact store's library."""
    if isinstance(error, ImportError):
        return Kind.UNUSABLE
    match = _HTTP_STATUS.search(str(error))
    response = getattr(error, "response", None)
    status = int(match[1]) if match else getattr(response, "status_code", None)
    if isinstance(status, int):
        return _kind_of_status(status)
    code = getattr(error, "error_code", None)
    if code == "RESOURCE_DOES_NOT_EXIST":
        return Kind.GONE
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
        return Kind.DENIED
    if code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST"):
        return Kind.REJECTED
    return Kind.RETRY


def _kind_of_status(status: int) -> Kind:
    if status in (401, 403):
        return Kind.DENIED
    # A plain 404 is a wrong address or a proxy without its server; a missing run says so in JSON.
    if 400 <= status < 500 and status not in (404, 408, 425, 429):
        return Kind.REJECTED
    return Kind.RETRY


def scrub(error: object) -> str:
    """An error's text in one short line, without credentials."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    for name in _SECRETS:
        secret = os.environ.get(name, "")
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    text = _USERINFO.sub("***@", text)
    return " ".join(text.split())[:300]
