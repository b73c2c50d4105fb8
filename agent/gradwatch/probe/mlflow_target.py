"""Which MLflow run this training belongs to, found without MLflow: no import, no network."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradwatch.probe.secrets import scrub


@dataclass(frozen=True, slots=True)
class MlflowTarget:
    """The MLflow run that this training belongs to.

    ``tracking_uri`` is safe to write down; ``secret_uri`` may hold credentials
    and is for the environment of the agent alone. ``source`` says what told the
    run: ``active`` (in this process), ``MLFLOW_RUN_ID``, or "" for none.
    """

    run_id: str | None = None
    tracking_uri: str | None = None
    experiment: str | None = None
    source: str = ""
    secret_uri: str | None = field(default=None, repr=False, compare=False)

    def to_json(self) -> dict[str, str | None]:
        """The manifest's ``mlflow``: no credentials."""
        return {"tracking_uri": self.tracking_uri, "run_id": self.run_id, "experiment": self.experiment}


def mlflow_target(env: Mapping[str, str] | None = None) -> MlflowTarget:
    """The run that is active in this process, else ``MLFLOW_RUN_ID``; and the tracking server.

    MLflow is asked only where the trainer has imported it, and only for what it
    holds in memory: no import, no network. Never raises.
    """
    env = os.environ if env is None else env
    uri: str | None = None
    run_id = experiment = None
    source = ""
    mlflow: Any = sys.modules.get("mlflow")
    try:
        active = mlflow.active_run() if mlflow is not None else None
        if active is not None:
            run_id, source = str(active.info.run_id), "active"
            experiment = str(active.info.experiment_id)
        if mlflow is not None and (active is not None or mlflow.is_tracking_uri_set()):
            uri = str(mlflow.get_tracking_uri())
    except Exception:  # half imported, a stand-in, another version
        pass
    if run_id is None and env.get("MLFLOW_RUN_ID", "").strip():
        run_id, source = env["MLFLOW_RUN_ID"].strip(), "MLFLOW_RUN_ID"
    uri = uri or env.get("MLFLOW_TRACKING_URI", "").strip() or None
    uri = absolute_uri(uri) if uri else None
    return MlflowTarget(run_id, scrub(uri) if uri else None, experiment, source, uri)


def absolute_uri(uri: str) -> str:
    """A tracking URI that means the same in another working directory."""
    for scheme in ("sqlite:///", "file:", ""):
        path = uri[len(scheme) :]
        if not uri.startswith(scheme) or path.startswith("/"):
            continue
        if not scheme and (":" in path or path == "databricks"):
            return uri
        return scheme + os.path.abspath(path)  # noqa: PTH100 (a text, and no link is followed)
    return uri
