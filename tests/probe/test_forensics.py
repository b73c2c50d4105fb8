"""The event ``nonfinite``: the first broken tensor, its layer, the step, the rank, and what the norms did before."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.journal import Events, JournalReader
from gradwatch.probe import lane
from gradwatch.probe.forensics import CALM, MOST, STEPS
from tests.probe.test_no_sync import Device, OnDevice, _current, device

__all__ = ["device"]  # a fixture

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]


class Net(nn.Module):
    """Three layers; ``poison`` makes the backward pass of the middle one break."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.poison = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(torch.tanh(self.first(x)))
        if self.poison:
            hidden.register_hook(lambda gradient: gradient * math.nan)
        out: torch.Tensor = self.last(torch.tanh(hidden))
        return out


def train(
    model: Net, run: gradwatch.Run, optimizer: torch.optim.Optimizer, steps: int, broken: set[int]
) -> list[float]:
    """Norms of the middle weight's gradient at the healthy steps; broken gradients are not applied."""
    norms = []
    for step in range(steps):
        model.poison = step in broken
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        norms.append(float(model.middle.weight.grad.norm()))  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        kept = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        if model.poison:
            with torch.no_grad():
                for p, value in zip(model.parameters(), kept):
                    p.copy_(value)
        optimizer.zero_grad()
        run.log_train(loss=loss)
    return norms


def told(events: Events) -> list[dict[str, Any]]:
    return [event for event in events.events if event["kind"] == "nonfinite"]


def test_the_first_broken_tensor_of_the_backward_pass_is_named_with_what_its_norms_did(
    watch: Watch, read: Read
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = watch(model, optimizer)
    norms = train(model, run, optimizer, 60, {50, 52})
    events = read(run)
    [event] = told(events)
    assert (event["step"], event["rank"], event["row"]) == (50, 0, 51)
    # The last layer's gradients are whole: the break came into being below it.
    assert (event["tensor"], event["layer"]) == ("middle.bias", "middle")
    assert event["names"] == ["middle.bias", "middle.weight", "first.bias", "first.weight"]
    assert (event["broken"], event["tensors"]) == (4, 6)
    before = event["norms"]
    assert before["step"] == list(range(50 - STEPS, 50))
    np.testing.assert_allclose(before["grad_norm"], events.steps["grad_norm"][50 - STEPS : 50])
    np.testing.assert_allclose(before["loss"], events.steps["loss"][50 - STEPS : 50])
    assert len(norms) == 60
    column = [t["name"] for t in _manifest(run)["tensors"]].index("middle.bias")
    np.testing.assert_allclose(before["tensor"], events.tensors.values[50 - STEPS : 50, column])


def _manifest(run: gradwatch.Run) -> dict[str, Any]:
    assert run.directory is not None
    document: dict[str, Any] = json.loads((run.directory / "manifest.json").read_text())
    return document


def test_a_series_is_told_once_and_a_new_one_again_and_the_number_is_bounded(watch: Watch, read: Read) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = watch(model, optimizer)
    far = 10 + CALM + 1
    train(model, run, optimizer, far + 10, {10, 11, 10 + CALM, far + CALM + 5, far + 2})
    assert [event["step"] for event in told(read(run))] == [10]
    other = watch(model, torch.optim.SGD(model.parameters(), lr=0.01))
    session = other._session
    assert session is not None
    row = type("R", (), {"skipped": False, "optimizer": 0, "sequence": 0})()
    session.writer.tensors.payload[:] = np.inf
    for step in range(0, 10_000, CALM + 1):
        row.step = step
        session.recorder.broken(row, [0.0] * 7)
    assert len(told(read(other))) == MOST


def test_what_a_gradscaler_skips_is_its_normal_work(watch: Watch, read: Read) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = watch(model, optimizer)
    for step in range(6):
        model.poison = step == 3
        scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    events = read(run)
    assert told(events) == []
    assert (events.steps["nonfinite"] > 0).sum() == 1


DIES = """
import os, torch, gradwatch
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run = gradwatch.watch(model, optimizer)
for step in range(20):
    loss = model(torch.randn(8, 4)).square().mean() * (float("nan") if step == 12 else 1.0)
    loss.backward(); optimizer.step(); optimizer.zero_grad()
    if step == 12:
        print(run.directory, flush=True)
        os._exit(9)
"""


def test_it_is_on_disk_when_the_process_dies_at_once(tmp_path: Path) -> None:
    env = {**os.environ, "GRADWATCH_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", DIES], env=env, capture_output=True, text=True, timeout=120)
    lines = (Path(done.stdout.strip()) / "events.jsonl").read_text().splitlines()
    [event] = [e for e in map(json.loads, lines) if e["kind"] == "nonfinite"]
    assert (event["step"], event["tensor"], event["broken"]) == (12, "1.bias", 4)
    assert event["norms"]["step"] == list(range(12))


class LostDevice(Device):
    """Answers for a while, then its context is lost."""

    lost = False

    def event(self, _: torch.device) -> Any:
        made = super().event(_)
        query = made.query

        def asked() -> bool:
            if self.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return query()

        made.query = asked  # type: ignore[method-assign]
        return made


@pytest.mark.parametrize("arrived", [True, False])
def test_what_had_arrived_before_the_context_was_lost_is_taken_in_and_the_end_is_told(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    machine = LostDevice(10_000)
    _current[:] = [machine]
    monkeypatch.setattr(lane, "_pinned", lambda size: torch.full((size,), math.nan))
    monkeypatch.setattr(lane, "_event", machine.event)
    parameters = [nn.Parameter(OnDevice(torch.randn(4, 3))), nn.Parameter(OnDevice(torch.randn(3)))]
    optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=False)
    run = gradwatch.watch(nn.ParameterList(parameters), optimizer, root=tmp_path)
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            for p in parameters:
                p.grad = OnDevice(torch.full(p.shape, math.nan if step == 4 else 1.0))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
            optimizer.step()
            run.log_train(loss=1.0)
            copies += [pair for event, _, _ in run._session.lane._flight for pair in event._copies]  # type: ignore[union-attr]
        if arrived:  # the copies have landed, and nobody could ask for them any more
            for target, value in copies:
                target.copy_(value)
        machine.lost = True
        run.finish(state="failed", reason="illegal memory access")
    assert "illegal memory access" in run.last_failure
    assert run.directory is not None
    reader = JournalReader(run.directory)
    events = reader.poll(1_000)
    reader.close()
    assert [e["state"] for e in events.events if e["kind"] == "end"] == ["failed"]
    assert [e["step"] for e in told(events)] == ([4] if arrived else [])
    assert np.isfinite(events.steps["grad_norm"]).sum() == (5 if arrived else 0)
