"""What a reading command takes as a run: id, name, MLflow run id, or any directory on the way to the journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradwatch.cli import CommandError
from gradwatch.cli.locate import find
from gradwatch.journal.manifest import Manifest


def journal(root: Path, run: str, rank: int = 0, attempt: int = 0, name: str = "", mlflow: str = "") -> Path:
    """A journal of which only the manifest matters here."""
    directory = root / run / f"rank-{rank}" / f"attempt-{attempt}"
    directory.mkdir(parents=True)
    manifest = Manifest(
        run=run,
        model="m",
        run_name=name,
        rank=rank,
        attempt=attempt,
        start_time=100.0 + attempt,
        mlflow={"run_id": mlflow},
    )
    (directory / "manifest.json").write_bytes(manifest.to_json())
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for rank in (0, 1):
        for attempt in (0, 1, 2):
            journal(tmp_path, "many", rank, attempt, name="quiet-heron", mlflow="f00d")
    journal(tmp_path, "one", name="still-oak")
    return tmp_path


@pytest.mark.parametrize("target", ["many", "quiet-heron", "f00d"])
def test_by_id_name_and_mlflow_run(root: Path, target: str) -> None:
    found = find(target, root)
    assert (found.run, len(found.places), found.latest.rank, found.latest.attempt) == ("many", 6, 0, 2)
    assert found.manifest.attempt == 2


@pytest.mark.parametrize(
    ("below", "places"), [("many", 6), ("many/rank-1", 3), ("many/rank-1/attempt-0", 1), ("one/rank-0/attempt-0", 1)]
)
def test_by_directory(root: Path, below: str, places: int) -> None:
    found = find(str(root / below))
    assert (found.run, len(found.places)) == (below.partition("/")[0], places)
    assert all(str(place.path).startswith(str(root / below)) for place in found.places)


def test_a_root_with_one_run_is_that_run(tmp_path: Path) -> None:
    journal(tmp_path, "only")
    assert find(str(tmp_path)).run == "only"


def test_a_root_with_several_runs_asks_which(root: Path) -> None:
    with pytest.raises(CommandError, match="holds 2 runs; say which"):
        find(str(root))


def test_a_name_that_two_runs_have_asks_for_the_id(root: Path) -> None:
    journal(root, "other", name="still-oak")
    with pytest.raises(CommandError, match=r"2 runs in .* are called 'still-oak'; say which by its id"):
        find("still-oak", root)


def test_an_unknown_name_is_answered_with_the_near_one(root: Path) -> None:
    with pytest.raises(CommandError, match="did you mean 'quiet-heron'"):
        find("quiet-hron", root)


def test_a_directory_without_a_journal_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="holds no journal"):
        find(str(tmp_path))


def test_a_broken_manifest_is_said_in_words(root: Path) -> None:
    (root / "one/rank-0/attempt-0/manifest.json").write_text("[]")
    with pytest.raises(CommandError, match="not a JSON object"):
        find(str(root / "one"))


def test_a_manifest_elsewhere_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/b/c/manifest.json").write_text("{}")
    with pytest.raises(CommandError, match="is not where journals lie"):
        find(str(tmp_path / "a/b/c"))
