"""Which run is meant: a run's name or id, an MLflow run id, or a directory, as every reading command takes it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from gradwatch.cli import CommandError
from gradwatch.journal import JournalError, find_attempts
from gradwatch.journal.layout import MANIFEST, Place
from gradwatch.journal.manifest import MAX_BYTES, Manifest, parse

#: What a command that reads one run takes.
RunArgument = Annotated[
    str, typer.Argument(help="A run's name or id, an MLflow run id, or a journal directory.", show_default=False)
]
DirectoryOption = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        help="Where the journals are; by default GRADWATCH_DIR, or where trainings write.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run as its journals tell it: ``places`` by attempt and rank, ``manifest`` that of :attr:`latest`."""

    root: Path
    manifest: Manifest
    places: tuple[Place, ...]

    @property
    def run(self) -> str:
        return self.places[0].run

    @property
    def latest(self) -> Place:
        """The last attempt of the lowest rank that is here, rank 0 as a rule."""
        lowest = min(place.rank for place in self.places)
        return max((place for place in self.places if place.rank == lowest), key=lambda place: place.attempt)


def root_of(directory: Path | None) -> Path:
    """The directory of journals: the one named, else ``GRADWATCH_DIR``, else where trainings write by default."""
    if directory is None:
        from gradwatch.probe.launch import default_root

        directory = default_root(os.environ)
    if not directory.is_dir():
        raise CommandError(f"{directory} is no directory; name the one that holds the journals")
    return directory


def recorded(root: Path) -> tuple[list[Recorded], list[str]]:
    """All runs below ``root``, newest first, and what was wrong with those that cannot be read."""
    places: dict[str, list[Place]] = {}
    for place in find_attempts(root):
        places.setdefault(place.run, []).append(place)
    runs, wrong = [], []
    for group in places.values():
        try:
            runs.append(_recorded(root, group))
        except JournalError as error:
            wrong.append(str(error))
    return sorted(runs, key=lambda run: run.manifest.start_time, reverse=True), wrong


def find(target: str, root: Path | None = None) -> Recorded:
    """The run that ``target`` means. Raises ``CommandError`` where there is none, or several."""
    directory = Path(target)
    if directory.is_dir():
        return _in_directory(directory.absolute())
    place = root_of(root)
    runs, _ = recorded(place)
    found = [run for run in runs if target in _names(run)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(run.run for run in found[:5])
        raise CommandError(f"{len(found)} runs in {place} are called {target!r}; say which by its id: {ids}")
    near = difflib.get_close_matches(target, [name for run in runs for name in _names(run)], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"'gradwatch runs {place}' lists what is there"
    raise CommandError(f"no run {target!r} in {place}; {hint}")


def _names(run: Recorded) -> Iterator[str]:
    yield run.run
    if run.manifest.run_name:
        yield run.manifest.run_name
    mlflow_run = run.manifest.mlflow.get("run_id")
    if mlflow_run:
        yield mlflow_run


def _in_directory(directory: Path) -> Recorded:
    """The run of a directory: an attempt's, a rank's, a run's, or a root with one run."""
    if (directory / MANIFEST).exists():
        root, (run, rank, attempt) = directory.parents[2], directory.parts[-3:]
        wanted = [p for p in find_attempts(root) if p.path == root / run / rank / attempt]
        if not wanted:
            raise CommandError(f"{directory} is not where journals lie: <root>/<run>/rank-<k>/attempt-<n>")
        return _readable(root, wanted)
    for root, name in ((directory.parent, directory.name), (directory.parent.parent, directory.parent.name)):
        group = [place for place in find_attempts(root) if place.run == name and directory in place.path.parents]
        if group:
            return _readable(root, group)
    runs, wrong = recorded(directory)
    if len(runs) == 1:
        return runs[0]
    if runs:
        raise CommandError(f"{directory} holds {len(runs)} runs; say which: 'gradwatch runs {directory}' lists them")
    raise CommandError("; ".join(wrong) if wrong else f"{directory} holds no journal")


def _readable(root: Path, places: list[Place]) -> Recorded:
    try:
        return _recorded(root, places)
    except JournalError as error:
        raise CommandError(str(error)) from None


def _recorded(root: Path, places: list[Place]) -> Recorded:
    ordered = tuple(sorted(places, key=lambda place: (place.attempt, place.rank)))
    lowest = min(place.rank for place in places)
    latest = max((place for place in places if place.rank == lowest), key=lambda place: place.attempt)
    return Recorded(root, read_manifest(latest.path), ordered)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an attempt. Raises ``JournalError`` where it is missing or not one."""
    path = directory / MANIFEST
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            return parse(file.read(MAX_BYTES + 1), str(path))
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror or error}") from None
