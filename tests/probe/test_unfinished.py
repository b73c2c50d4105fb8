"""A run that nobody finishes keeps no model: it ends when all who knew of it are gone, and says so."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.journal import Events, JournalReader, find_attempts
from gradwatch.probe import ends, scaler, seam

TRIALS = 100


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_JOURNAL_MB", "1")


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def journals(root: Path) -> dict[str, Events]:
    found = {}
    for place in find_attempts(root):
        reader = JournalReader(place.path)
        found[reader.manifest.run] = reader.poll()
        reader.close()
    return found


def last_end(events: Events) -> dict[str, Any]:
    [event] = [e for e in events.events if e["kind"] == "end"]
    return event


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.usefixtures("_no_collector")  # models that refer to themselves would wait for it, perhaps for long
def test_a_hundred_trials_without_finish_do_not_pile_up(tmp_path: Path) -> None:
    before = descriptors()
    models: list[weakref.ref[nn.Module]] = []
    most, most_open = 0, 0

    def trial() -> None:
        model, optimizer = made()
        gradwatch.watch(model, optimizer, config={"batch_size": 8}, root=tmp_path)
        train(model, optimizer, steps=2)
        models.append(weakref.ref(model))

    for _ in range(TRIALS):
        trial()
        most = max(most, sum(model() is not None for model in models))
        most_open = max(most_open, descriptors())
    assert most <= 3 * unfinished_limit()
    gc.collect()
    assert sum(model() is not None for model in models) == 0
    told = journals(tmp_path)
    assert len(told) == TRIALS
    for events in told.values():
        assert len(events.steps) == 2
        assert (last_end(events)["state"], last_end(events)["reason"]) == ("finished", "let go of without finish()")
    # A run holds five files open; of those forgotten, the file for SIGTERM stays until the next run begins.
    assert most_open - before <= 6 * 3 * unfinished_limit()
    with gradwatch.watch(*made(), root=tmp_path):
        pass
    assert descriptors() <= before + 1
    assert not seam.installed()
    assert not scaler.installed()
    assert ends._watches == []


def unfinished_limit() -> int:
    from gradwatch.probe.unfinished import MANY

    return MANY


@pytest.mark.usefixtures("_no_collector")
def test_a_finished_run_lets_go_of_the_model_at_once(tmp_path: Path) -> None:
    model, optimizer = made()
    run = gradwatch.watch(model, optimizer, config={"batch_size": 8}, root=tmp_path)
    train(model, optimizer)
    run.log_train(loss=0.5)
    run.finish()
    gone = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer
    assert [there() for there in gone] == [None, None], "it would stay until the garbage collector comes by"
    assert run.clip_grad_norm_(1.0) == 0.0  # of nothing


def test_a_run_that_the_loop_does_not_keep_is_recorded_as_long_as_there_is_an_optimizer(tmp_path: Path) -> None:
    model, optimizer = made()
    gradwatch.watch(model, optimizer, config={"batch_size": 8}, root=tmp_path)
    for _ in range(3):
        gc.collect()
        train(model, optimizer, steps=1)
    [events] = journals(tmp_path).values()
    assert [e for e in events.events if e["kind"] == "end"] == []
    del optimizer
    gc.collect()
    [events] = journals(tmp_path).values()
    assert len(events.steps) == 3
    assert last_end(events)["state"] == "finished"
    # The model stays, without a trace of us.
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    model(torch.randn(8, 4)).square().mean().backward()


def test_a_run_that_is_held_lives_without_its_optimizer(tmp_path: Path) -> None:
    model, optimizer = made()
    run = gradwatch.watch(model, optimizer, config={"batch_size": 8}, root=tmp_path)
    train(model, optimizer)
    del optimizer
    gc.collect()
    run.log_validation(loss=0.25)
    run.finish()
    [events] = journals(tmp_path).values()
    assert [e["kind"] for e in events.events if e["kind"] in ("validation", "end")] == ["validation", "end"]
    assert last_end(events)["reason"] == "finished"


def test_the_collector_in_a_forked_child_ends_nothing(tmp_path: Path) -> None:
    model, optimizer = made()
    gradwatch.watch(model, optimizer, config={"batch_size": 8}, root=tmp_path)
    train(model, optimizer)
    pid = os.fork()
    if pid == 0:
        try:
            del model, optimizer
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    train(model, optimizer)
    [events] = journals(tmp_path).values()
    assert [e for e in events.events if e["kind"] == "end"] == []
    del model, optimizer
    gc.collect()
    [events] = journals(tmp_path).values()
    assert len(events.steps) == 6


class _Lock:
    """A lock that knows of a deadlock instead of being one."""

    held = wanted_twice = False

    def __enter__(self) -> None:
        self.wanted_twice |= self.held
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False


def test_the_collector_may_come_by_while_another_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of ``acquire``, its lock held: nothing of a forgotten run may want that lock."""
    model, optimizer = made()
    gradwatch.watch(model, optimizer, config={"batch_size": 8}, root=tmp_path)
    before = seam._listeners.now
    del model, optimizer
    add = type(seam._listeners).add
    monkeypatch.setattr(seam, "_lock", lock := _Lock())

    def interrupted(self: Any, listener: Any) -> None:
        gc.collect()
        add(self, listener)

    monkeypatch.setattr(type(seam._listeners), "add", interrupted)
    model, optimizer = made()
    run = gradwatch.watch(model, optimizer, config={"batch_size": 8}, root=tmp_path)
    assert before[0]() is None
    train(model, optimizer)
    run.finish()
    assert sorted(len(events.steps) for events in journals(tmp_path).values()) == [0, 3]
    assert not seam.installed()
    assert not lock.wanted_twice


PROGRAM = """
import atexit, gc, sys, torch, gradwatch
def main():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradwatch.watch(model, optimizer, config={"batch_size": 1})
    atexit.register(gc.collect)  # runs before what was registered earlier
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    END
main()
"""


@pytest.mark.parametrize(
    ("end", "state", "code"), [("sys.exit(3)", "failed", 3), ("raise ValueError(1)", "failed", 1), ("", "finished", 0)]
)
def test_how_the_process_ends_is_told_of_a_run_that_is_forgotten_on_the_way_out(
    tmp_path: Path, end: str, state: str, code: int
) -> None:
    environment = {**os.environ, "GRADWATCH_DIR": str(tmp_path), "GRADWATCH_AGENT": "0"}
    program = PROGRAM.replace("END", end)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    [events] = journals(tmp_path).values()
    assert len(events.steps) == 1
    assert last_end(events)["state"] == state
    if code > 1:
        assert last_end(events)["exit_code"] == code
