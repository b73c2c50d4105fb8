"""Runs are found as they appear, links are not followed, and thousands of old ones cost little."""

from __future__ import annotations

import os
from pathlib import Path

from gradwatch.collect.discovery import INTERVAL, Discovery, last_touched
from gradwatch.testing import FakeClock, JournalBuilder


def make(root: Path, run: str, rank: int = 0, attempt: int = 0) -> None:
    (root / run / f"rank-{rank}" / f"attempt-{attempt}").mkdir(parents=True)


def found(discovery: Discovery, clock: FakeClock) -> list[tuple[str, int, int]]:
    clock.advance(INTERVAL + 0.01)
    return sorted((place.run, place.rank, place.attempt) for place in discovery.look())


def test_what_is_new_is_told_once(tmp_path: Path) -> None:
    clock = FakeClock()
    discovery = Discovery(tmp_path, clock, clock)
    assert found(discovery, clock) == []
    make(tmp_path, "a")
    assert found(discovery, clock) == [("a", 0, 0)]
    make(tmp_path, "a", 0, 1)
    make(tmp_path, "a", 3)
    make(tmp_path, "b")
    assert found(discovery, clock) == [("a", 0, 1), ("a", 3, 0), ("b", 0, 0)]
    assert found(discovery, clock) == []
    assert discovery.look() == []


def test_links_hidden_names_and_files_are_passed_over(tmp_path: Path) -> None:
    clock = FakeClock()
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    make(root, "real")
    make(elsewhere, "other")
    (root / "link").symlink_to(elsewhere / "other")
    (root / "real" / "rank-7").symlink_to(elsewhere / "other" / "rank-0")
    (root / "real" / "rank-0" / "attempt-9").symlink_to(elsewhere / "other" / "rank-0" / "attempt-0")
    make(root, ".agent")
    (root / "file").write_text("")
    (root / "real" / "rank-01").mkdir()
    (root / "real" / "rank-0" / "attempt-1.bak").mkdir()
    assert found(Discovery(root, clock, clock), clock) == [("real", 0, 0)]


def test_a_directory_that_has_not_changed_is_not_listed_again(tmp_path: Path) -> None:
    import time

    clock = FakeClock(time.time() + 10)
    for i in range(20):
        make(tmp_path, f"r{i}")
    discovery = Discovery(tmp_path, clock, clock)
    assert len(found(discovery, clock)) == 20
    listed = {key: listing.listed for key, listing in discovery._listings.items()}
    clock.advance(5)
    found(discovery, clock)
    # Within the same time stamp something may have been added unseen; behind it, not.
    assert {key: listing.listed for key, listing in discovery._listings.items()} == listed
    make(tmp_path, "r3", 1)
    assert found(discovery, clock) == [("r3", 1, 0)]


def test_an_attempts_age_is_that_of_its_newest_file(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path) as journal:
        journal.step()
    for name in ("manifest.json", "steps.ring", "events.jsonl"):
        os.utime(journal.directory / name, (1_000, 1_000))
    os.utime(journal.directory, (1_500, 1_500))
    assert last_touched(journal.directory) == 1_500
    os.utime(journal.directory / "events.jsonl", (2_000, 2_000))
    assert last_touched(journal.directory) == 2_000
    assert last_touched(tmp_path / "nothing") == 0
