"""Journals that nobody reviewed: whatever they hold, a run's fold neither fails nor grows without bound."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradwatch.detect.ledger import Ledger
from gradwatch.sinks.prometheus import Exposition, Snapshot
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, read_on

NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308, 2.0**63, 257.0]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), NUMBERS, st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
KINDS = ["validation", "finding", "resolved", "metadata", "group", "nonfinite", "mlflow", "slo", "end", "weird", ""]
KEYS = [
    "metrics", "slice", "higher_is_better", "train", "code", "severity", "message", "evidence", "first_step", "values",
    "optimizer", "group", "run_id", "tracking_uri", "slo", "good", "bad", "state", "reason", "type", "exit_code",
    "signal", "time", "row", "step",
]  # fmt: skip
EVENTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=8)


class Records(logging.Handler):
    """What was logged: a detector or watcher that fails is dropped with a line in the log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def show(run: Any, clock: FakeClock) -> str:
    """Read all of it, through the detectors and onto the page of metrics; and keep it over a restart."""
    ledger, failed = Ledger(), Records()
    logging.getLogger("gradwatch.agent").addHandler(failed)
    for seen in read_on(run, clock):
        ledger.observe(seen)
    logging.getLogger("gradwatch.agent").removeHandler(failed)
    assert not failed.records, "a detector failed"
    state = json.loads(json.dumps([run.to_state(), ledger.to_state()]))
    again = follow(run.ranks[0].path.parents[2], clock=clock)
    again.restore(state[0])
    Ledger().restore(state[1])
    return Exposition(lambda: Snapshot([(run, ledger)])).render()[0].decode()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(KINDS), EVENTS), max_size=12), st.booleans())
def test_events_of_any_shape(tmp_path_factory: Any, events: list[tuple[str, dict[str, Any]]], ended: bool) -> None:
    clock = FakeClock()
    root = tmp_path_factory.mktemp("hostile")
    journal = JournalBuilder(root, clock=clock, capacity=256 * 1024)
    journal.step(loss=1.0)
    for kind, fields in events:
        journal.event(kind, **fields)
    journal.step(loss=1.0)
    if ended:
        journal.vanish()
    run = follow(root, clock=clock)
    text = show(run, clock)
    assert 'gradwatch_steps_total{model="model",optimizer="default",run="run-1"} 2.0' in text
    journal.vanish()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1), NUMBERS, st.lists(NUMBERS, min_size=10, max_size=10)),
        min_size=1,
        max_size=40,
    ),
    st.lists(NUMBERS, min_size=6, max_size=6),
)
def test_rows_of_any_numbers(tmp_path_factory: Any, rows: list[tuple[int, float, list[float]]], device: Any) -> None:
    clock = FakeClock()
    root = tmp_path_factory.mktemp("hostile")
    journal = JournalBuilder(root, clock=clock, optimizers=("a", "b"), capacity=256 * 1024)
    for step, time, host in rows:
        sequence = journal.writer.steps.append(step, time, host, device)
        journal.writer.tensors.payload[:] = np.array(device[:2], np.float32)
        journal.writer.tensors.append(sequence, step, time)
        journal.writer.samples.payload[:] = np.resize(
            np.array(device, np.float32), journal.writer.samples.payload.shape
        )
        journal.writer.samples.append(sequence, step, time)
    journal.vanish()
    run = follow(root, clock=clock)
    show(run, clock)
    assert run.end is not None


def test_names_of_a_manifest_do_not_break_out_of_the_exposition(tmp_path: Path) -> None:
    evil = 'x"} 1\ngradwatch_up{a="b\\'
    clock = FakeClock()
    journal = JournalBuilder(
        tmp_path,
        model=evil,
        clock=clock,
        tensors=[f"{evil}.weight", "<script>alert(1)</script>.w"],
        hyperparameters={evil: 1.0, f"group.{evil}.0.lr": 2.0, **{f"h{i}": i for i in range(1_900)}},
        run_name=evil,
    )
    journal.step()
    journal.validation(loss=1.0, train={"loss": 1.0}, slice=evil, **{evil: 2.0})
    for i in range(500):
        journal.validation(slice=f"slice-{i}", auc=0.5)
    journal.vanish()
    run = follow(tmp_path, clock=clock)
    text = show(run, clock)
    assert all(line.startswith(("gradwatch_", "# HELP gradwatch_", "# TYPE gradwatch_")) for line in text.splitlines())
    assert "gradwatch_up" not in {line.partition("{")[0] for line in text.splitlines()}
    assert len(text.splitlines()) < 1_500


def test_a_million_labels_are_cut_short(tmp_path: Path) -> None:
    """A manifest as large as is accepted, and the series that come of it."""
    clock = FakeClock()
    journal = JournalBuilder(tmp_path, clock=clock, tensors=[f"l{i}.w" for i in range(4_000)], capacity=2**25)
    journal.step()
    journal.vanish()
    run = follow(tmp_path, clock=clock)
    assert len(show(run, clock).splitlines()) < 500


def test_a_garbage_file_is_trouble_in_words_and_given_up(tmp_path: Path) -> None:
    clock = FakeClock()
    with JournalBuilder(tmp_path, clock=clock) as journal:
        journal.step()
    (journal.directory / "steps.ring").write_bytes(b"garbage" * 1_000)
    run = follow(tmp_path, clock=clock)
    for _ in range(100):
        run.poll()
        clock.advance(1.0)
    assert "steps.ring" in run.troubles[0]
    assert run.over
    assert not run.ended


def test_a_row_whose_checksum_is_right_and_whose_step_is_absurd_is_left_out(tmp_path: Path) -> None:
    clock = FakeClock()
    with JournalBuilder(tmp_path, clock=clock) as journal:
        journal.step()
        journal.step(step=2**62)
        journal.step(step=1)
        writer = journal.writer
        host = [0.0] * len(journal.manifest.host_columns)
        writer.steps.append(2, math.nan, host, [1.0] * 6)
    run = follow(tmp_path, clock=clock)
    read_on(run, clock)
    assert run.fold.optimizers["default"].steps == 2
