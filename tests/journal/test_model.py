"""Any order of writing, reading and restarting, against a list that remembers everything."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.journal import JournalReader, JournalWriter, attempt_directory
from gradwatch.journal.manifest import Manifest, Tensor
from gradwatch.journal.reader import LATE_ROWS

OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 30), st.booleans()),
    st.tuples(st.just("complete"), st.integers(0, 8), st.floats(0, 100)),
    st.tuples(st.just("poll"), st.sampled_from([1, 3, 16_384])),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 0.6])),
    st.tuples(st.just("restart")),
    st.tuples(st.just("event")),
)


@settings(max_examples=120, deadline=None)
@given(st.lists(OPERATIONS, max_size=40))
def test_every_row_once_each_late_value_once_and_every_loss_counted(operations: list[tuple]) -> None:
    with tempfile.TemporaryDirectory() as place:
        manifest = Manifest(
            "run",
            "model",
            host_columns=("n",),
            device_columns=("loss",),
            tensors=tuple(Tensor("t") for _ in range(300)),
        )
        writer = JournalWriter(attempt_directory(Path(place), "run", 0, 0), manifest, 130_000)
        capacity = writer.steps.geometry.capacity
        assert capacity < 200
        now = [0.0]
        reader = JournalReader(writer.directory, clock=lambda: now[0])
        truth: dict[int, float | None] = {}  # the second part as it stands in the ring
        shown: dict[int, float | None] = {}  # as the reader told it last
        events = written_events = 0
        expected = 1

        def poll(limit: int) -> bool:
            nonlocal expected, events
            got = reader.poll(limit)
            assert len(got.steps) <= limit
            before = expected
            for sequence, n, loss in zip(got.steps.sequence.tolist(), got.steps["n"], got.steps["loss"], strict=True):
                assert sequence >= expected
                assert n == sequence
                expected = sequence + 1
                shown[sequence] = None if loss != loss else loss
                assert shown[sequence] == truth[sequence]
            assert got.missed == 0 or expected - before >= got.missed or len(got.steps) == 0
            missed.append(got.missed)
            for sequence, loss in zip(got.amended.sequence.tolist(), got.amended["loss"], strict=True):
                assert sequence < before
                assert loss == truth[sequence] != shown[sequence]
                shown[sequence] = loss
            for sequence in range(max(1, expected - LATE_ROWS), before):
                if sequence in shown and sequence > writer.steps.sequence - capacity:
                    assert shown[sequence] == truth[sequence]
            for event in got.events:
                events += 1
                assert event["n"] == events
            return got.more

        missed: list[int] = []
        for operation in operations:
            match operation:
                case ("append", count, whole):
                    for _ in range(count):
                        number = writer.steps.sequence + 1
                        truth[writer.steps.append(number, 1.0, (number,), (-1.0,) if whole else None)] = (
                            -1.0 if whole else None
                        )
                        writer.tensors.append(number, number, 1.0)
                case ("complete", back, value):
                    sequence = writer.steps.sequence - back
                    if sequence >= 1:
                        writer.steps.complete(sequence, (value,))
                        truth[sequence] = value
                case ("poll", limit):
                    poll(limit)
                case ("wait", seconds):
                    now[0] += seconds
                case ("restart",):
                    cursor = reader.cursor
                    reader.close()
                    reader = JournalReader(writer.directory, cursor, clock=lambda: now[0])
                case ("event",):
                    written_events += 1
                    writer.events.write({"kind": "x", "n": written_events})
        writer.close()
        while poll(16_384):
            pass
        assert expected == writer.steps.sequence + 1
        assert len(shown) + sum(missed) == writer.steps.sequence
        assert set(range(max(1, writer.steps.sequence - capacity + 1), writer.steps.sequence + 1)) <= set(shown)
        assert events == written_events
        reader.close()
