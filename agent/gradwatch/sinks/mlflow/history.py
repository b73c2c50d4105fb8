"""What the bridge and the gates ask of an MLflow server: pages of runs, models and versions, and tags of versions.

The bounded client of the MLflow sink with the questions that only they have.
Every method is one call, or says how many; all raise ``TrackingError``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from gradwatch.sinks.mlflow.tracking import RUN_TAG, Kind, Tracking, TrackingError

#: Experiments that are looked at; an answer holds so many at most.
MAX_EXPERIMENTS: Final = 10_000
_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a search; ``token`` is None on the last one."""

    items: Sequence[Any]
    token: str | None


class History(Tracking):
    """One MLflow server, read; and written where alerts and ghosts need it."""

    def experiments(self) -> list[str]:
        """Ids of the active experiments, at most ``MAX_EXPERIMENTS``; a call for each thousand."""
        found: list[str] = []
        token: str | None = None
        while len(found) < MAX_EXPERIMENTS:
            page = self._page(partial(_experiments, token))
            found += [str(experiment.experiment_id) for experiment in page.items]
            token = page.token
            if token is None:
                break
        return found

    def runs(self, experiments: Sequence[str], where: str, order: str, size: int, token: str | None) -> Page:
        """One page of runs."""
        if not experiments:
            return Page([], None)
        return self._page(
            lambda client: client.search_runs(
                list(experiments), where, max_results=size, order_by=[order], page_token=token
            )
        )

    def run(self, run_id: str) -> Any | None:
        """An active run as MLflow's entity, or None where it is deleted or unknown."""
        try:
            run = self._call(lambda client: client.get_run(run_id))
        except TrackingError as error:
            if error.kind in (Kind.GONE, Kind.REJECTED):
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def runs_by_id(self, experiments: Sequence[str], run_ids: Sequence[str]) -> Sequence[Any]:
        """The runs of up to 100 ids in one call."""
        listed = ", ".join(f"'{run_id}'" for run_id in run_ids if run_id.isalnum())
        where = f"attributes.run_id IN ({listed})"
        return self.runs(experiments, where, "attributes.start_time DESC", 100, None).items if listed else []

    def run_named(self, experiments: Sequence[str], run: str) -> Any | None:
        """The newest MLflow run that is tagged with this run of gradwatch."""
        quoted = quote(run)
        if quoted is None:
            return None
        where = f"tags.`{RUN_TAG}` = {quoted}"
        found = self.runs(experiments, where, "attributes.start_time DESC", 1, None).items
        return found[0] if found else None

    def models(self, size: int, token: str | None) -> Page:
        """One page of registered models with their aliases and the newest version of each stage."""
        return self._page(lambda client: client.search_registered_models(max_results=size, page_token=token))

    def versions(self, where: str, size: int = 200) -> Sequence[Any]:
        """The newest versions of registered models that fit."""
        return self._page(
            lambda client: client.search_model_versions(where, max_results=size, order_by=["version_number DESC"])
        ).items

    def tag_version(self, model: str, version: str, tags: Mapping[str, str]) -> None:
        """A call a tag."""
        for key, value in tags.items():
            self._call(partial(_tag_version, model, version, key, value))

    def delete_tag(self, run_id: str, key: str) -> None:
        self._call(lambda client: client.delete_tag(run_id, key))

    def put_text(self, run_id: str, path: str, text: str) -> None:
        """An artifact; what stood under its path is replaced."""
        directory, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="gradwatch-") as folder:
            file = Path(folder) / name
            file.write_text(text, encoding="utf-8")
            self.upload(run_id, file, directory)

    def artifacts(self, run_id: str, directory: str) -> set[str]:
        """Paths of the artifacts in a directory."""
        return {str(item.path) for item in self._call(lambda client: client.list_artifacts(run_id, directory))}

    def _page(self, search: Any) -> Page:
        found = self._call(search)
        return Page(found, found.token or None)


def _experiments(token: str | None, client: Any) -> Any:
    return client.search_experiments(max_results=_PAGE, page_token=token)


def _tag_version(model: str, version: str, key: str, value: str, client: Any) -> None:
    client.set_model_version_tag(model, version, key, value)


def quote(text: str) -> str | None:
    """A string in a filter; None where it holds both quotes, which MLflow has no way to write."""
    if "'" in text:
        return None if '"' in text else f'"{text}"'
    return f"'{text}'"
