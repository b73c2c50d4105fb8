"""What MLflow holds of a run at its end: status, tags, steps in its windows, and the table of the last steps."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ENDS = ("FINISHED", "FAILED", "KILLED")


@dataclass
class Held:
    """One MLflow run."""

    run_id: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    #: The last steps, as the artifact table lists them; empty while it is not there.
    last_steps: list[int] = field(default_factory=list)
    #: Sum over all windows of the steps that each folds, and of those that were trained before.
    folded: int = 0
    replayed: int = 0
    #: (timestamp, step) of two different points that claim the same place.
    doubled: list[tuple[int, int]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.status in ENDS


def client_of(url: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(url)


def find(client: Any, run: str) -> Held | None:
    """The MLflow run of a run; None while there is none."""
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(ids, f"tags.`gradwatch.run` = '{run}'")
    if not found:
        return None
    one = found[0]
    return Held(str(one.info.run_id), str(one.info.status), dict(one.data.tags), dict(one.data.params))


def fill(client: Any, held: Held, optimizer: str = "") -> Held:
    """Add what takes further calls: the windows' steps and the last steps."""
    prefix = f"gradwatch/{optimizer}/" if optimizer else "gradwatch/"
    history = client.get_metric_history(held.run_id, f"{prefix}steps")
    places = [(point.timestamp, point.step) for point in history]
    held.doubled = sorted({place for place in places if places.count(place) > 1})
    held.folded = int(sum(point.value for point in history))
    held.replayed = int(sum(p.value for p in client.get_metric_history(held.run_id, f"{prefix}replayed_steps")))
    held.last_steps = last_steps(client, held.run_id)
    return held


def last_steps(client: Any, run_id: str, path: str = "gradwatch/last_steps.json") -> list[int]:
    """The column ``step`` of the table of last steps; empty where it is not there (yet)."""
    folder = path.rpartition("/")[0]
    if path not in [file.path for file in client.list_artifacts(run_id, folder)]:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        document = json.loads(Path(client.download_artifacts(run_id, path, scratch)).read_text())
    column = document["columns"].index("step")
    return [int(row[column]) for row in document["data"]]
