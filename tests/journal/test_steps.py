"""Rows of the rings: shown whole, once, in order, with what comes late and a count of what was missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradwatch.journal import JournalReader, JournalWriter, RingGeometry
from gradwatch.journal.reader import LATE_ROWS
from gradwatch.journal.writer import StepRing

Append = Callable[..., None]
Read = Callable[..., JournalReader]


def sequences(rows: object) -> list[int]:
    return [int(s) for s in rows.sequence]  # type: ignore[attr-defined]


def slot(directory: Path, ring: str, sequence: int) -> tuple[Path, int, RingGeometry]:
    path = directory / ring
    geometry = RingGeometry.unpack(path.read_bytes()[:4096], ring)
    return path, geometry.offset(sequence), geometry


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def small_ring(writer: JournalWriter, directory: Path, capacity: int) -> None:
    """Replace the rings of a writer by ones of few rows, so that a lap is short."""
    for name, ring in (("steps.ring", writer.steps), ("tensors.ring", writer.tensors)):
        old = ring.geometry
        (directory / name).unlink()
        kind = type(ring)
        made = kind(name, RingGeometry(old.host, old.device, old.width, capacity), 0o600, writer._dir_fd)
        ring.close()
        writer._parts[writer._parts.index(ring)] = made
        setattr(writer, name.removesuffix(".ring"), made)


def test_a_row_comes_back_as_it_was_written(writer: JournalWriter, read: Read, append: Append) -> None:
    writer.steps.append(7, 1234.5, (0.0, 0.25), (0.5, 3.0))
    writer.tensors.payload[:] = (1, np.nan, np.inf)
    writer.tensors.append(1, 7, 1234.5)
    writer.close()
    got = read().poll()
    assert (got.steps.step[0], got.steps.time[0]) == (7, 1234.5)
    assert {c: got.steps[c][0] for c in got.steps.columns} == {
        "optimizer": 0.0,
        "duration": 0.25,
        "loss": 0.5,
        "grad_norm": 3.0,
    }
    np.testing.assert_array_equal(got.tensors.values[0], np.float32([1, np.nan, np.inf]))
    assert (got.tensors.row[0], got.tensors.step[0]) == (1, 7)


def test_a_column_that_a_journal_does_not_have_is_nan(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, 2)
    writer.close()
    assert np.isnan(read().poll().steps["loss_scale"]).tolist() == [True, True]


def test_nothing_is_shown_twice(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, 3)
    reader = read()
    assert sequences(reader.poll().steps) == [1, 2]
    append(writer, 1)
    assert sequences(reader.poll().steps) == [3]
    assert sequences(reader.poll().steps) == []


def test_the_newest_row_is_shown_after_half_a_second(writer: JournalWriter, read: Read, append: Append, clock) -> None:
    append(writer, 1)
    reader = read()
    assert sequences(reader.poll().steps) == []
    clock.now += 0.49
    assert sequences(reader.poll().steps) == []
    clock.now += 0.02
    assert sequences(reader.poll().steps) == [1]


def test_the_newest_row_is_shown_at_once_when_its_writer_is_gone(
    writer: JournalWriter, read: Read, append: Append
) -> None:
    append(writer, 1)
    writer.close()
    assert sequences(read().poll().steps) == [1]


def test_a_row_waits_for_its_device_columns(writer: JournalWriter, read: Read, append: Append, clock) -> None:
    append(writer, 1, whole=False)
    append(writer, 2)
    reader = read()
    assert sequences(reader.poll().steps) == []
    writer.steps.complete(1, (4.0, 5.0))
    rows = reader.poll().steps
    assert sequences(rows) == [1, 2]
    assert rows["loss"].tolist() == [4.0, 1.0]


def test_rows_whose_device_columns_never_come_wait_half_a_second_together(
    writer: JournalWriter, read: Read, append: Append, clock
) -> None:
    append(writer, 20, whole=False)
    reader = read()
    assert sequences(reader.poll().steps) == []
    clock.now += 0.5
    rows = reader.poll().steps
    assert sequences(rows) == list(range(1, 21))
    assert np.isnan(rows["loss"]).all()


def test_a_late_loss_is_an_amendment_once(writer: JournalWriter, read: Read, append: Append, clock) -> None:
    append(writer, 2, loss=float("nan"))
    reader = read()
    reader.poll()
    clock.now += 0.5
    reader.poll()
    writer.steps.complete(2, (0.75, 2.0))
    amended = reader.poll().amended
    assert sequences(amended) == [2]
    assert amended["loss"].tolist() == [0.75]
    assert sequences(reader.poll().amended) == []


def test_each_change_of_a_late_row_is_an_amendment(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, 3)
    reader = read()
    reader.poll()
    seen = []
    for loss in (2.0, 3.0):
        writer.steps.complete(1, (loss, 1.0))
        seen += reader.poll().amended["loss"].tolist()
    assert seen == [2.0, 3.0]


def test_a_row_is_not_amended_by_what_it_was_shown_with(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, 2)
    writer.steps.complete(1, (9.0, 1.0))
    reader = read()
    assert reader.poll().steps["loss"].tolist() == [9.0]
    assert sequences(reader.poll().amended) == []


def test_an_amendment_after_a_restart_is_not_lost(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, 3)
    reader = read()
    reader.poll()
    writer.steps.complete(2, (5.0, 2.0))
    again = read(reader.cursor)
    assert again.poll().amended["loss"].tolist() == [5.0]
    assert sequences(read(again.cursor).poll().amended) == []


def test_amendments_reach_back_over_the_last_rows_only(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, LATE_ROWS + 2)
    reader = read()
    shown = sequences(reader.poll().steps)[-1]
    for sequence in (shown - LATE_ROWS, shown - LATE_ROWS + 1):
        writer.steps.complete(sequence, (5.0, 2.0))
    assert sequences(reader.poll().amended) == [shown - LATE_ROWS + 1]


def test_a_torn_row_in_the_middle_is_missed_and_what_follows_shown_at_once(
    writer: JournalWriter, directory: Path, read: Read, append: Append
) -> None:
    append(writer, 6)
    path, offset, _ = slot(directory, "steps.ring", 3)
    overwrite(path, offset + 40, b"torn")
    reader = read()
    got = reader.poll()
    assert (sequences(got.steps), got.missed) == ([1, 2, 4, 5], 1)
    assert reader.poll().missed == 0


def test_a_torn_row_before_a_row_kept_back_is_missed_once(
    writer: JournalWriter, directory: Path, read: Read, append: Append, clock
) -> None:
    append(writer, 3)
    path, offset, _ = slot(directory, "steps.ring", 2)
    overwrite(path, offset + 40, b"torn")
    reader = read()
    missed = [reader.poll().missed, reader.poll().missed]
    clock.now += 0.5
    got = reader.poll()
    assert (missed, got.missed, sequences(got.steps)) == ([0, 0], 1, [3])


def test_the_row_being_written_is_not_missed(
    writer: JournalWriter, directory: Path, read: Read, append: Append
) -> None:
    append(writer, 2)
    path, offset, _ = slot(directory, "steps.ring", 2)
    whole = path.read_bytes()[offset : offset + 48]
    overwrite(path, offset + 40, b"torn")
    writer.close()
    reader = read()
    got = reader.poll()
    assert (sequences(got.steps), got.missed) == ([1], 0)
    overwrite(path, offset, whole)
    assert sequences(reader.poll().steps) == [2]


def test_a_torn_second_part_leaves_the_first(
    writer: JournalWriter, directory: Path, read: Read, append: Append
) -> None:
    append(writer, 2)
    path, offset, geometry = slot(directory, "steps.ring", 1)
    overwrite(path, offset + geometry.second + 8, b"torn")
    writer.close()
    rows = read().poll().steps
    assert np.isnan(rows["loss"]).tolist() == [True, False]
    assert rows["duration"].tolist() == [0.5, 0.5]


def test_a_torn_row_of_norms_is_not_shown(writer: JournalWriter, directory: Path, read: Read, append: Append) -> None:
    append(writer, 3)
    path, offset, geometry = slot(directory, "tensors.ring", 2)
    overwrite(path, offset + geometry.second + 9, b"torn")
    assert sequences(read().poll().tensors) == [1, 3]


@pytest.mark.parametrize("laps", [1, 2, 5])
def test_a_reader_that_is_laps_behind_says_how_many_it_missed(
    writer: JournalWriter, directory: Path, read: Read, append: Append, laps: int
) -> None:
    small_ring(writer, directory, 10)
    append(writer, 4)
    reader = read()
    first = reader.poll()
    append(writer, 10 * laps)
    writer.close()
    polls = [reader.poll()]
    while polls[-1].more:
        polls.append(reader.poll())
    last = 4 + 10 * laps
    assert sequences(first.steps) == [1, 2, 3]
    assert [s for poll in polls for s in sequences(poll.steps)] == list(range(last - 9, last + 1))
    assert sum(poll.missed for poll in polls) == last - 9 - 4
    assert [s for poll in polls for s in sequences(poll.tensors)] == list(range(max(5, last - 9), last + 1))


def test_a_poll_is_cut_at_its_limit_and_goes_on(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, 25)
    writer.close()
    reader = read()
    got, more = [], True
    turns = 0
    while more:
        poll = reader.poll(10)
        got += sequences(poll.steps)
        more = poll.more
        turns += 1
    assert (got, turns) == (list(range(1, 26)), 3)


def test_a_poll_that_ends_at_its_limit_keeps_the_newest_row_back(
    writer: JournalWriter, read: Read, append: Append
) -> None:
    append(writer, 10)
    got = read().poll(10)
    assert (sequences(got.steps), got.more) == (list(range(1, 10)), False)


def test_a_cursor_of_another_journal_is_not_taken_up(
    writer: JournalWriter, directory: Path, read: Read, append: Append, make_manifest: Callable[..., object]
) -> None:
    append(writer, 5)
    cursor = read().cursor | {"steps": 1000}
    assert sequences(read(cursor).poll().steps) == []
    assert sequences(read(cursor | {"journal": 1}).poll().steps) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "cursor",
    [
        {"steps": -1},
        {"steps": "x"},
        {"events": [1]},
        {"recent": [[1, 2], "x"]},
        {"recent": [[2**70, 0]]},
        {"recent": [[5, 1], [4, 1]], "steps": 9},
        {"recent": {}},
    ],
)
def test_a_damaged_cursor_counts_as_none(
    writer: JournalWriter, read: Read, append: Append, cursor: dict[str, object]
) -> None:
    append(writer, 3)
    reader = read(cursor)
    reader.poll()
    assert reader.cursor["recent"] == [] or cursor.get("steps") != 9


def test_a_hole_that_a_crash_of_the_machine_left_is_looked_beyond(
    writer: JournalWriter, directory: Path, read: Read, append: Append
) -> None:
    append(writer, 3000)
    path, offset, geometry = slot(directory, "steps.ring", 10)
    overwrite(path, offset, bytes(geometry.slot_size * 2900))
    writer.close()
    reader = read()
    got = [reader.poll() for _ in range(4)]
    shown = [s for poll in got for s in sequences(poll.steps)]
    assert shown == [*range(1, 10), *range(2910, 3001)]
    assert sum(poll.missed for poll in got) == 2900


def test_the_last_steps_do_not_move_the_cursor(writer: JournalWriter, read: Read, append: Append) -> None:
    append(writer, 30)
    reader = read()
    before = reader.cursor
    assert sequences(reader.last_steps(4)) == [27, 28, 29, 30]
    assert reader.cursor == before


def test_more_last_steps_than_there_are_gives_those_that_stand(
    writer: JournalWriter, directory: Path, read: Read, append: Append
) -> None:
    small_ring(writer, directory, 10)
    append(writer, 25)
    assert sequences(read().last_steps(1000)) == list(range(16, 26))


def test_last_steps_of_an_empty_journal_are_none(writer: JournalWriter, read: Read) -> None:
    assert len(read().last_steps(10)) == 0


def test_completing_a_row_that_was_overwritten_changes_nothing(
    writer: JournalWriter, directory: Path, read: Read, append: Append
) -> None:
    small_ring(writer, directory, 10)
    append(writer, 15)
    before = (directory / "steps.ring").read_bytes()
    writer.steps.complete(5, (9.0, 9.0))
    writer.steps.complete(16, (9.0, 9.0))
    assert (directory / "steps.ring").read_bytes() == before
    writer.steps.complete(6, (9.0, 9.0))
    assert (directory / "steps.ring").read_bytes() != before


def test_a_refused_row_leaves_no_hole(writer: JournalWriter, read: Read, append: Append) -> None:
    steps: StepRing = writer.steps
    put = steps._put

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    append(writer, 1)
    steps._put = full
    with pytest.raises(OSError):
        steps.append(2, 2.0, (0.0, 0.0), (1.0, 1.0))
    steps._put = put
    append(writer, 1)
    writer.close()
    got = read().poll()
    assert (sequences(got.steps), got.missed) == ([1, 2], 0)
