"""The agent's loop with an injected clock: what sinks are told, what is kept, when it lets go."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from gradwatch.agent.service import POLL_SECONDS, SHOWN_SECONDS, Agent, Settings
from gradwatch.agent.store import Store
from gradwatch.testing import FakeClock, JournalBuilder, MemorySink


class Bench:
    """An agent over ``root`` that a test turns by hand."""

    def __init__(
        self, tmp_path: Path, clock: FakeClock, sinks: tuple[MemorySink, ...] = (), **settings: object
    ) -> None:
        self.root, self.clock = tmp_path / "journals", clock
        self.root.mkdir(exist_ok=True)
        self.store = Store(tmp_path / "state")
        self.agent = Agent(
            Settings(self.root, **settings),  # type: ignore[arg-type]
            self.store,
            sinks,
            monotonic=clock,
            wall=clock,
        )

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.clock.advance(POLL_SECONDS)
            while self.agent.tick():
                pass

    def metrics(self) -> str:
        return self.agent.exposition.render()[0].decode()


def write(root: Path, clock: FakeClock, run: str = "run-1", steps: int = 30) -> JournalBuilder:
    journal = JournalBuilder(root, run=run, clock=clock)
    for i in range(steps):
        journal.step(loss=1.0 / (i + 1), grad_norm=2.0, clip_threshold=1.0)
    return journal


def test_a_sink_is_told_the_life_of_a_run_in_order(tmp_path: Path) -> None:
    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (sink,))
    journal = write(bench.root, clock)
    journal.validation(loss=2.0, train={"loss": 1.0})
    journal.sample([1.0, 1.0], [0.1, 0.1])
    bench.turn(4)
    assert [facts.run for facts in sink.started] == ["run-1"]
    assert [(w.first_step, w.last_step) for w in sink.windows] == [(0, 9)]
    assert sink.heartbeats[0][:2] == ("run-1", "running")
    beats = len(sink.heartbeats)
    bench.turn(int(61 / POLL_SECONDS))
    assert len(sink.heartbeats) == beats + 1
    journal.end("failed", reason="ValueError", type="ValueError")
    bench.turn(3)
    assert sum(w.steps for w in sink.windows) == 30
    assert [v.step for v in sink.validations] == [29]
    assert [t.step for t in sink.tables] == [29]
    [(end, summary, last)] = sink.ends
    assert (end.state, end.type, end.last_step) == ("failed", "ValueError", 29)
    assert summary["optimizers"]["default"]["clip_rate"] == 1.0
    assert summary["end"]["state"] == "failed"
    assert last["step"] == [float(i) for i in range(30)]
    assert json.loads(json.dumps(summary)) == summary
    assert 'run_state{model="model",run="run-1",state="failed"} 1.0' in bench.metrics()


def test_a_sink_that_raises_costs_nobody_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MemorySink):
        def window(self, facts: object, window: object) -> None:
            raise OSError("server gone")

    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (Broken(), sink))
    write(bench.root, clock).end()
    bench.turn(4)
    assert sum(w.steps for w in sink.windows) == 30
    assert "sink-failed" in caplog.text


def test_a_state_is_written_at_most_once_a_second_and_read_again(tmp_path: Path) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    journal = write(bench.root, clock)
    path = tmp_path / "state" / "runs" / "run-1.json"
    writes: list[float] = []
    save = bench.store.save
    bench.store.save = lambda run, state: (writes.append(clock()), save(run, state))[1]  # type: ignore[method-assign]
    for _ in range(12):
        journal.step(grad_norm=2.0, clip_threshold=1.0)
        bench.turn()
    assert len(writes) >= 3
    assert min(later - earlier for earlier, later in pairwise(writes)) >= 1.0
    again = Bench(tmp_path, clock)
    again.turn(4)
    assert 'steps_total{model="model",optimizer="default",run="run-1"} 42.0' in again.metrics()
    path.write_text('{"version": 1, "tail": 3}')
    anew = Bench(tmp_path, clock)
    anew.turn(4)
    assert 'steps_total{model="model",optimizer="default",run="run-1"} 42.0' in anew.metrics()
    journal.end()


def test_an_ended_run_is_shown_for_an_hour_and_found_again_when_it_goes_on(tmp_path: Path) -> None:
    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (sink,))
    write(bench.root, clock).end()
    bench.turn(4)
    clock.advance(SHOWN_SECONDS - 60)
    bench.turn()
    assert "run-1" in bench.metrics()
    clock.advance(120)
    bench.turn(2)
    assert "run-1" not in bench.metrics()
    assert "gradwatch_agent_runs 0.0" in bench.metrics()
    second = JournalBuilder(bench.root, attempt=1, clock=clock, first_step=30)
    second.step()
    second.step()
    bench.turn(6)
    assert 'steps_total{model="model",optimizer="default",run="run-1"} 32.0' in bench.metrics()
    second.end()


def test_runs_that_were_over_long_ago_are_not_followed(tmp_path: Path) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    old = write(bench.root, clock, "old")
    old.end()
    for path in [*old.directory.iterdir(), old.directory]:
        os.utime(path, (clock() - 2 * SHOWN_SECONDS,) * 2)
    write(bench.root, clock, "new").end()
    bench.turn(3)
    assert bench.agent.old == 1
    assert list(bench.agent.runs) == ["new"]


def test_until_done_leaves_when_all_is_delivered_and_shown(tmp_path: Path) -> None:
    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (sink,), until_done=True, linger=45.0)
    bench.turn(8)
    assert not bench.agent._done(), "no run yet"
    journal = write(bench.root, clock)
    bench.turn(4)
    assert not bench.agent._done(), "it is running"
    sink.backlog = 3
    bench.agent.was_scraped(bench.agent.ends_shown())
    journal.end()
    bench.turn(4)
    assert not bench.agent._done(), "the sink has not delivered"
    sink.backlog = 0
    bench.turn(2)
    assert not bench.agent._done(), "who scrapes has not seen the end"
    document = json.loads((tmp_path / "state" / "agent.json").read_text())
    assert document["drained"].keys() == {"run-1"}
    bench.agent.was_scraped(bench.agent.ends_shown())
    assert bench.agent._done()


def test_a_scrape_that_never_comes_is_waited_for_so_long_and_no_longer(tmp_path: Path) -> None:
    for scraped, patience in ((True, 45.0), (False, 2.0)):
        clock = FakeClock()
        bench = (
            Bench(tmp_path / str(scraped), clock, until_done=True)
            if (tmp_path / str(scraped)).mkdir() is None
            else None
        )
        assert bench is not None
        journal = write(bench.root, clock)
        bench.turn(3)
        if scraped:
            bench.agent.was_scraped([])
        journal.end()
        bench.turn(4)
        clock.advance(patience - 1.5)
        assert not bench.agent._done()
        clock.advance(2.0)
        assert bench.agent._done()


def test_leaving_gives_the_sinks_their_grace_and_keeps_the_state(tmp_path: Path) -> None:
    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (sink,), grace=7.0)
    journal = write(bench.root, clock)
    bench.turn(2)
    bench.agent.stop()
    bench.agent.run()
    bench.agent.leave()
    assert sink.closed
    state = bench.store.load("run-1")
    assert state is not None
    assert state["drained"] is None
    assert not (tmp_path / "state" / "agent.json").exists()
    journal.end()


def test_one_run_whose_fold_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    write(bench.root, clock, "a").end()
    write(bench.root, clock, "b").end()
    bench.turn()

    def broken() -> bool:
        raise ArithmeticError("odd")

    monkeypatch.setattr(bench.agent.runs["a"], "poll", broken)
    bench.turn(4)
    assert list(bench.agent.runs) == ["b"]
    assert 'run_state{model="model",run="b",state="finished"} 1.0' in bench.metrics()


def test_a_run_deleted_under_the_agent_ends_abruptly(tmp_path: Path) -> None:
    import shutil

    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    journal = write(bench.root, clock)
    bench.turn(2)
    shutil.rmtree(journal.directory)
    journal.vanish()
    bench.turn(6)
    assert 'run_state{model="model",run="run-1",state="abrupt"} 1.0' in bench.metrics()
    assert 'steps_total{model="model",optimizer="default",run="run-1"} 30.0' in bench.metrics()


def test_a_run_that_begins_while_the_agent_leaves_is_not_left_alone(tmp_path: Path) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock, until_done=True)
    write(bench.root, clock, "a").end()
    bench.turn(4)
    bench.agent.was_scraped(bench.agent.ends_shown())
    assert bench.agent._done()
    bench.agent.step_back()
    assert not bench.agent.something_new()
    journal = write(bench.root, clock, "b")
    assert bench.agent.something_new()
    bench.turn(2)
    assert not bench.agent._done()
    assert (tmp_path / "state" / "agent.json").exists()
    journal.end()


def test_a_later_attempt_speaks_for_the_run_though_the_former_one_still_writes(tmp_path: Path) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    undead = write(bench.root, clock)
    bench.turn(2)
    successor = JournalBuilder(bench.root, attempt=1, clock=clock, first_step=30)
    for _ in range(60):
        undead.step(step=7)
        successor.step()
        bench.turn()
    bench.turn(4)
    assert 'run_attempt{model="model",run="run-1"} 1.0' in bench.metrics()
    assert 'gradwatch_step{model="model",optimizer="default",run="run-1"} 89.0' in bench.metrics()
    undead.vanish()
    successor.end()


def test_hundreds_of_runs_that_are_over_are_read_with_few_open_files(tmp_path: Path) -> None:
    clock = FakeClock()
    bench = Bench(tmp_path, clock)
    for i in range(200):
        JournalBuilder(bench.root, run=f"r{i}", clock=clock, capacity=64 * 1024).end()
    before = len(list(Path("/proc/self/fd").iterdir()))
    bench.turn()
    assert len(bench.agent.runs) == 200
    assert all(followed.over for followed in bench.agent.runs.values())
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 5


def test_each_attempts_end_is_told(tmp_path: Path) -> None:
    clock, sink = FakeClock(), MemorySink()
    bench = Bench(tmp_path, clock, (sink,))
    write(bench.root, clock).vanish()
    bench.turn(4)
    second = JournalBuilder(bench.root, attempt=1, clock=clock, first_step=20)
    for _ in range(20):
        second.step()
    bench.turn(6)
    assert 'run_state{model="model",run="run-1",state="running"} 1.0' in bench.metrics()
    second.end()
    bench.turn(4)
    assert [(end.state, summary["attempt"]) for end, summary, _ in sink.ends] == [("abrupt", 0), ("finished", 1)]
    assert [facts.attempt for facts in sink.started] == [0, 1]
    assert sink.ends[1][1]["optimizers"]["default"]["replayed_steps"] == 10
