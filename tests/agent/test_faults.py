"""Faults around the agent's loop: clocks set back, states of other versions, floods of rows, and junk beside a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gradwatch.collect import discovery
from gradwatch.testing import FakeClock, JournalBuilder, MemorySink
from tests.agent.test_service import Bench, write


class SteppedClock(FakeClock):
    """A wall clock that somebody sets, beside a monotonic one that nobody can."""

    def __init__(self, monotonic: FakeClock) -> None:
        super().__init__()
        self.monotonic, self.shift = monotonic, 0.0

    def advance(self, seconds: float) -> None:
        self.monotonic.advance(seconds)

    def __call__(self) -> float:
        return self.monotonic() + self.shift


def of_run(metrics: str, name: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith(f"gradwatch_{name}{{") and 'run="run-1"' in line]
    assert len(lines) == 1, lines
    return float(lines[0].rpartition(" ")[2])


@pytest.mark.parametrize("shift", [-3_600.0, -86_400.0 * 400, 3_600.0], ids=["hour-back", "year-back", "hour-ahead"])
def test_a_clock_that_is_set_loses_no_step_and_invents_no_end(tmp_path: Path, shift: float) -> None:
    clock, sink = FakeClock(), MemorySink()
    wall = SteppedClock(clock)
    bench = Bench(tmp_path, clock, (sink,))
    bench.agent = type(bench.agent)(bench.agent.settings, bench.store, (sink,), monotonic=clock, wall=wall)
    journal = JournalBuilder(bench.root, run="run-1", clock=wall)
    for _ in range(30):
        journal.step(loss=1.0, grad_norm=2.0, clip_threshold=1.0)
    bench.turn(4)
    wall.shift = shift
    for _ in range(30):
        journal.step(loss=1.0, grad_norm=2.0, clip_threshold=1.0)
        bench.turn()
    bench.turn(4)
    assert sink.ends == []
    assert of_run(bench.metrics(), "steps_total") == 60
    assert 'run_state{model="model",run="run-1",state="running"} 1.0' in bench.metrics()
    journal.end()
    bench.turn(8)
    assert [end.state for end, _, _ in sink.ends] == ["finished"]
    assert sum(window.steps for window in sink.windows) == 60
    assert sink.ends[0][2]["step"] == [float(step) for step in range(60)]


@pytest.mark.parametrize("version", [0, 2, 999, "3", None])
def test_the_state_of_another_version_is_read_anew_and_counts_nothing_twice(tmp_path: Path, version: object) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    journal = write(bench.root, clock)
    bench.turn(8)
    bench.agent.leave()
    path = tmp_path / "state" / "runs" / "run-1.json"
    state = json.loads(path.read_text())
    state["version"] = version
    state["future"] = {"nested": [1, 2, 3]}
    path.write_text(json.dumps(state))
    bench = Bench(tmp_path, clock)
    journal.step(loss=1.0, grad_norm=2.0, clip_threshold=1.0)
    bench.turn(8)
    assert of_run(bench.metrics(), "steps_total") == 31
    journal.end()


def test_rows_that_a_lapped_ring_lost_are_counted_when_an_agent_of_another_version_starts(tmp_path: Path) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    journal = JournalBuilder(bench.root, run="run-1", clock=clock, capacity=65_536)
    for _ in range(50):
        journal.step(loss=1.0)
    bench.turn(8)
    bench.agent.leave()
    for _ in range(2_000):
        journal.step(loss=1.0)
    path = tmp_path / "state" / "runs" / "run-1.json"
    state = json.loads(path.read_text()) | {"version": 999}
    path.write_text(json.dumps(state))
    bench = Bench(tmp_path, clock)
    bench.turn(8)
    counted, missed = of_run(bench.metrics(), "steps_total"), of_run(bench.metrics(), "journal_rows_missed_total")
    assert counted + missed == 2_050
    assert 0 < counted < 2_000


def test_nothing_between_two_polls_and_a_flood_between_two_others(tmp_path: Path) -> None:
    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (sink,))
    journal = JournalBuilder(bench.root, run="run-1", clock=clock, capacity=1 << 26, seconds_a_step=1e-4)
    journal.step(loss=1.0)
    bench.turn(40)
    assert of_run(bench.metrics(), "steps_total") == 1
    for _ in range(60_000):
        journal.step(loss=1.0)
    bench.turn(4)
    assert of_run(bench.metrics(), "steps_total") == 60_001
    assert of_run(bench.metrics(), "journal_rows_missed_total") == 0
    # More than the ring holds: what was overwritten before it was read is counted, never silent.
    for _ in range(70_000):
        journal.step(loss=1.0)
    bench.turn(4)
    counted, missed = of_run(bench.metrics(), "steps_total"), of_run(bench.metrics(), "journal_rows_missed_total")
    assert counted + missed == 130_001
    assert 0 < missed < 10_000
    journal.end()
    bench.turn(8)
    assert sum(window.steps for window in sink.windows) == counted


def test_more_run_directories_than_will_be_looked_at_are_said_once_and_leave_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "MAX_PLACES", 200)
    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (sink,))
    journal = write(bench.root, clock)
    bench.turn(4)
    for number in range(1_000):
        (bench.root / f"empty-{number}").mkdir()
    bench.turn(40)
    looker = bench.agent._discovery
    assert sum(len(listing.names) for listing in looker._listings.values()) <= 2 * 200
    assert looker.full
    assert caplog.text.count("too-many") == 1
    for _ in range(10):
        journal.step(loss=1.0)
    bench.turn(4)
    assert of_run(bench.metrics(), "steps_total") == 40
    journal.end()
    bench.turn(8)
    assert [end.state for end, _, _ in sink.ends] == ["finished"]


def test_names_that_are_no_runs_are_left_alone(tmp_path: Path) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    journal = write(bench.root, clock)
    for name in (
        b"\xff\xfe-latin",
        b"new\nline",
        b'quote"brace}',
        b"<script>alert(1)<",
        b".hidden",
        b"\x1b[31mred",
        b"a" * 250,
    ):
        (bench.root / os.fsdecode(name) / "rank-0" / "attempt-0").mkdir(parents=True)
    bench.turn(4)
    assert list(bench.agent.runs) == ["run-1"]
    assert of_run(bench.metrics(), "steps_total") == 30
    journal.end()
