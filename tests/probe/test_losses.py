"""A logged loss stands in the row of the step that used it, wherever the loop logs it and in whatever form."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.journal import Events

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]
Log = Callable[[gradwatch.Run, Tensor], None]
STEPS = 6

FORMS: dict[str, Log] = {
    "tensor": lambda run, loss: run.log_train(loss=loss),
    "detached": lambda run, loss: run.log_train(loss=loss.detach()),
    "number": lambda run, loss: run.log_train(loss=loss.item()),
    "scaled for the record": lambda run, loss: run.log_train(loss=(loss * 4.0) / 4.0),
}


def training(watch: Watch) -> tuple[gradwatch.Run, torch.optim.Optimizer, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer, config={"batch_size": 8})
    return run, optimizer, lambda: model(torch.randn(8, 3)).square().mean()


def metadata(events: Events) -> dict[str, Any]:
    return {k: v for e in events.events if e["kind"] == "metadata" for k, v in e["values"].items()}


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("where", ["before the backward pass", "behind it", "behind the step"])
def test_a_loss_is_of_the_step_that_used_it(watch: Watch, read: Read, where: str, form: str, baseline: bool) -> None:
    run, optimizer, compute = training(watch)
    if baseline:
        with torch.no_grad():
            FORMS[form](run, compute() * 100)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = compute()
        losses.append(loss.item())
        if where == "before the backward pass":
            FORMS[form](run, loss)
        loss.backward()
        if where == "behind it":
            FORMS[form](run, loss)
        optimizer.step()
        if where == "behind the step":
            FORMS[form](run, loss)
    events = read(run)
    assert "unchecked.losses" not in metadata(events)
    rows = events.steps["loss"]
    # In front of a step nobody can tell an evaluation from its loss: both stand in its row, with their mean.
    first = 1 if baseline and where != "behind the step" else 0
    np.testing.assert_allclose(rows[first:], losses[first:], rtol=1e-6)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("last_behind_step", [False, True])
def test_micro_batches_count_with_their_mean(watch: Watch, read: Read, form: str, last_behind_step: bool) -> None:
    run, optimizer, compute = training(watch)
    means = []
    for _ in range(STEPS):
        losses = []
        for micro_batch in range(3):
            loss = compute()
            losses.append(loss.item())
            loss.backward()
            if micro_batch == 2 and last_behind_step:
                optimizer.step()
                optimizer.zero_grad()
            FORMS[form](run, loss)
        if not last_behind_step:
            optimizer.step()
            optimizer.zero_grad()
        means.append(sum(losses) / 3)
    np.testing.assert_allclose(read(run).steps["loss"], means, rtol=1e-6)


def test_a_mean_that_is_taken_behind_the_step_is_of_the_step(watch: Watch, read: Read) -> None:
    run, optimizer, compute = training(watch)
    means = []
    for _ in range(STEPS):
        losses = [compute() for _ in range(3)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = torch.stack([2.0 * loss for loss in losses]).mean() / 2.0
        run.log_train(loss=mean)
        means.append(mean.item())
    np.testing.assert_allclose(read(run).steps["loss"], means, rtol=1e-6)


def test_lbfgs_returns_its_loss_behind_the_step(watch: Watch, read: Read) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    run = watch(model, optimizer, config={"batch_size": 8})
    x = torch.randn(8, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        loss: Any = optimizer.step(closure)
        run.log_train(loss=loss)
        losses.append(loss.item())
    np.testing.assert_allclose(read(run).steps["loss"], losses, rtol=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
def test_without_autograd_the_first_call_decides_and_what_is_uncertain_is_said(
    watch: Watch, read: Read, ahead: bool
) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1e-2)
    run = watch(nn.ParameterList([parameter]), optimizer, config={"batch_size": 8})
    for step in range(STEPS):
        parameter.grad = torch.ones(3)
        if ahead:
            run.log_train(loss=float(step))
        optimizer.step()
        if not ahead:
            run.log_train(loss=float(step))
    events = read(run)
    np.testing.assert_array_equal(events.steps["loss"], range(STEPS))
    assert ("unchecked.losses" in metadata(events)) is ahead


@pytest.mark.parametrize("ahead", [False, True])
def test_a_training_in_another_thread_than_watch(watch: Watch, read: Read, ahead: bool) -> None:
    run, optimizer, compute = training(watch)
    losses = []

    def train() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = compute()
            losses.append(loss.item())
            if ahead:
                run.log_train(loss=loss)
            loss.backward()
            optimizer.step()
            if not ahead:
                run.log_train(loss=loss)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(60)
    np.testing.assert_allclose(read(run).steps["loss"], losses, rtol=1e-6)


def test_two_optimizers_that_are_stepped_one_after_the_other(watch: Watch, read: Read) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizers = {
        "first": torch.optim.SGD(first.parameters(), lr=1e-2),
        "second": torch.optim.SGD(second.parameters(), lr=1e-2),
    }
    run = watch([first, second], optimizers, config={"batch_size": 8})
    losses = []
    for _ in range(STEPS):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss = second(first(torch.randn(8, 3))).square().mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        run.log_train(loss=loss)
        losses.append(loss.item())
    rows = read(run).steps
    np.testing.assert_allclose(rows["loss"][rows["optimizer"] == 1], losses, rtol=1e-6)
    assert np.isnan(rows["loss"][rows["optimizer"] == 0]).all()
