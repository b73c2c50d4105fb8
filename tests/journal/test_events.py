"""Events: each once, in order, over rotations, restarts and a disk that was full."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gradwatch.journal import JournalReader, JournalWriter
from gradwatch.journal.events import MAX_EVENT_BYTES, EventLog, EventTail, parse_event

Read = Callable[..., JournalReader]


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(os.open(tmp_path, os.O_RDONLY), 2000, 0o600)


@pytest.fixture
def tail(tmp_path: Path) -> EventTail:
    return EventTail(os.open(tmp_path, os.O_RDONLY))


def write(log: EventLog, first: int, count: int) -> None:
    for number in range(first, first + count):
        log.write({"kind": "note", "n": number, "time": 1.0, "row": 0, "step": -1})


def numbers(events: list[dict[str, object]]) -> list[object]:
    return [event["n"] for event in events]


def test_an_event_comes_back_as_it_was_written(writer: JournalWriter, read: Read) -> None:
    event = {"kind": "validation", "time": 5.0, "row": 3, "step": 2, "metrics": {"loss": 0.5}, "slice": "all"}
    writer.events.write(event)
    assert read().poll().events == [{"sequence": 1} | event]


def test_each_event_comes_once_over_a_rotation(log: EventLog, tail: EventTail, tmp_path: Path) -> None:
    write(log, 0, 8)
    got = numbers(tail.read()[0])
    write(log, 8, 12)
    assert (tmp_path / "events.jsonl.1").exists()
    events, missed = tail.read()
    assert (got + numbers(events), missed) == (list(range(20)), 0)


def test_events_that_were_rotated_away_are_counted(log: EventLog, tail: EventTail) -> None:
    write(log, 0, 100)
    events, missed = tail.read()
    assert numbers(events) == list(range(missed, 100))
    assert missed > 50


def test_a_file_with_the_inode_of_a_former_one_is_read_from_its_beginning(
    log: EventLog, tail: EventTail, tmp_path: Path
) -> None:
    inodes = []
    got: list[object] = []
    for round_ in range(12):
        write(log, round_ * 10, 10)
        inodes.append((tmp_path / "events.jsonl").stat().st_ino)
        got += numbers(tail.read()[0])
    assert got == list(range(120))


def test_a_cursor_is_good_after_rotations(log: EventLog, tail: EventTail, tmp_path: Path) -> None:
    got: list[object] = []
    for round_ in range(12):
        write(log, round_ * 5, 5)
        again = EventTail(os.open(tmp_path, os.O_RDONLY))
        again.restore(json.loads(json.dumps(tail.cursor)))
        tail = again
        got += numbers(tail.read()[0])
    assert got == list(range(60))


def test_the_log_stays_within_its_limit(log: EventLog, tmp_path: Path) -> None:
    for number in range(0, 300, 3):
        write(log, number, 3)
        assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 2000


def test_a_line_still_being_written_waits(log: EventLog, tail: EventTail, tmp_path: Path) -> None:
    write(log, 0, 1)
    line = (tmp_path / "events.jsonl").read_bytes().replace(b'"sequence":1', b'"sequence":2')
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(line[:20])
        file.flush()
        assert numbers(tail.read()[0]) == [0]
        file.write(line[20:])
        file.flush()
        assert numbers(tail.read()[0]) == [0]
        assert tail.read() == ([], 0)


def test_a_full_disk_costs_the_event_it_refused_and_no_other(
    log: EventLog, tail: EventTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(log, 0, 1)
    real = os.write
    for room in (7, 1):
        monkeypatch.setattr(os, "write", lambda fd, data, room=room: real(fd, data[:room]))
        with pytest.raises(OSError, match="No space"):
            write(log, 99, 1)
    monkeypatch.setattr(os, "write", real)
    write(log, 1, 2)
    events, missed = tail.read()
    assert (numbers(events), missed) == ([0, 1, 2], 0)


def test_a_rotation_that_fails_leaves_the_log_as_it_was(
    log: EventLog, tail: EventTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(log, 0, 8)
    real = os.rename

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    failed = 0
    for _ in range(20):
        try:
            write(log, 8, 1)
        except OSError:
            failed += 1
    monkeypatch.setattr(os, "rename", real)
    assert failed > 0
    write(log, 8, 1)
    assert numbers(tail.read()[0])[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_an_event_too_long_is_refused_in_words(log: EventLog) -> None:
    with pytest.raises(ValueError, match=r"event 'note' of \d+ bytes: at most"):
        log.write({"kind": "note", "text": "x" * 2000})


def test_a_poll_takes_a_bounded_part_and_says_that_there_is_more(tmp_path: Path, tail: EventTail) -> None:
    log = EventLog(os.open(tmp_path, os.O_RDONLY), 8 * MAX_EVENT_BYTES, 0o600)
    for number in range(100):
        log.write({"kind": "note", "n": number, "text": "x" * 40_000})
    got: list[object] = []
    for _ in range(10):
        events, missed = tail.read()
        assert not missed
        assert sum(len(str(e)) for e in events) <= MAX_EVENT_BYTES
        got += numbers(events)
        if not tail.cut:
            break
    assert got == list(range(100))


def test_a_backlog_larger_than_a_poll_is_read_in_order_over_a_rotation(tmp_path: Path, tail: EventTail) -> None:
    log = EventLog(os.open(tmp_path, os.O_RDONLY), 5 * MAX_EVENT_BYTES, 0o600)
    for number in range(100):
        log.write({"kind": "note", "n": number, "text": "x" * 40_000})
    assert (tmp_path / "events.jsonl.1").stat().st_size > 2 * MAX_EVENT_BYTES
    polls = [tail.read() for _ in range(8)]
    assert [n for events, _ in polls for n in numbers(events)] == list(range(100))
    assert sum(missed for _, missed in polls) == 0


@pytest.mark.parametrize(
    "line",
    [b"", b"{}", b"[]", b"nonsense", b'{"kind":1}', b"\xff\xfe", b'{"kind":' + b"[" * 10_000, b'{"kind":"x"'],
)
def test_what_is_no_event_is_passed_over(line: bytes) -> None:
    assert parse_event(line) is None


def test_the_common_keys_of_an_event_have_their_types() -> None:
    event = parse_event(b'{"kind":"a\\nb","time":"soon","row":1.5,"step":true,"sequence":-4}')
    assert event == {"kind": "a b", "time": 0.0, "row": 0, "step": -1, "sequence": 0}
    event = parse_event(b'{"kind":"a","time":1e999,"value":NaN,"big":' + b"9" * 400 + b"}")
    assert event is not None
    assert (event["time"], event["big"]) == (0.0, float("inf"))


def test_a_line_of_garbage_longer_than_any_event_is_passed_over(tmp_path: Path, tail: EventTail) -> None:
    (tmp_path / "events.jsonl").write_bytes(b"x" * (3 * MAX_EVENT_BYTES) + b'\n{"kind":"note","n":1}\n')
    got: list[object] = []
    for _ in range(5):
        got += numbers(tail.read()[0])
    assert got == [1]


@pytest.mark.parametrize("plant", ["fifo", "link", "directory"])
def test_what_is_not_a_regular_file_is_not_read(tmp_path: Path, tail: EventTail, plant: str) -> None:
    path = tmp_path / "events.jsonl"
    other = tmp_path / "other"
    other.write_text('{"kind":"note","n":1}\n')
    {"fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(other), "directory": path.mkdir}[plant]()
    assert tail.read() == ([], 0)
