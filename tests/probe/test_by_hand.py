"""What a loop does by itself around the clip: refused clips that it catches, totals of its own, scaled gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

import gradwatch
from gradwatch.journal import Events

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]
CONFIG = {"batch_size": 8}
SKIPPED = 1


def training(watch: Watch, **arguments: Any) -> tuple[nn.Module, torch.optim.Optimizer, gradwatch.Run]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    return model, optimizer, watch(model, optimizer, config=CONFIG, **arguments)


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.randn(8, 4) * 3).square().mean()  # type: ignore[no-any-return]


def truth(model: nn.Module) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm())


def codes(events: Events) -> list[str]:
    return [e["code"] for e in events.events if e["kind"] == "finding"]


def metadata(events: Events) -> dict[str, Any]:
    return {k: v for e in events.events if e["kind"] == "metadata" for k, v in e["values"].items()}


def skipped(events: Events) -> list[int]:
    """The rows that were attempts without a step."""
    return [i for i, flags in enumerate(events.steps["flags"]) if int(flags) & SKIPPED]


# -- a clip that torch refuses


@pytest.mark.parametrize("where", ["ahead", "behind"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_refused_clip_that_the_loop_catches_is_an_attempt_that_was_skipped(
    watch: Watch, read: Read, to_none: bool, where: str
) -> None:
    model, optimizer, run = training(watch, max_norm=0.5)
    losses, norms = [], []
    for step in range(8):
        optimizer.zero_grad(set_to_none=to_none)
        loss = loss_of(model) * (math.inf if step in (2, 3, 6) else 1.0)
        losses.append(loss.item())
        if where == "ahead":
            run.log_train(loss=loss, samples=8)
        loss.backward()
        norms.append(truth(model))
        try:
            clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        except RuntimeError:
            if where == "behind":
                run.log_train(loss=loss, samples=8)
            continue
        optimizer.step()
        if where == "behind":
            run.log_train(loss=loss, samples=8)
    events = read(run)
    assert codes(events) == []
    rows = events.steps
    assert skipped(events) == [2, 3, 6]
    assert rows.step.tolist() == [0, 1, 2, 2, 2, 3, 4, 4]
    taken = np.isfinite(norms)
    np.testing.assert_allclose(rows["grad_norm"][taken], np.array(norms)[taken], rtol=1e-5)
    assert not np.isfinite(rows["grad_norm"][~taken]).any()
    np.testing.assert_array_equal(rows["nonfinite"] > 0, ~taken)
    np.testing.assert_allclose(rows["loss"], losses, rtol=1e-6)
    assert np.nansum(rows["samples"]) == (64 if where == "ahead" else 56)


def test_the_last_attempt_of_a_training_that_ends_by_it_is_recorded(watch: Watch, read: Read) -> None:
    model, optimizer, run = training(watch)

    def train() -> None:
        with run:
            for step in range(3):
                optimizer.zero_grad()
                (loss_of(model) * (math.nan if step == 2 else 1.0)).backward()
                clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
                optimizer.step()

    with pytest.raises(RuntimeError, match="non-finite"):
        train()
    events = read(run)
    assert skipped(events) == [2]
    assert events.steps["nonfinite"][2] == 4
    assert [e["state"] for e in events.events if e["kind"] == "end"] == ["failed"]


@pytest.mark.parametrize("again", [True, False])
def test_a_step_that_is_taken_all_the_same_is_a_step(watch: Watch, read: Read, again: bool) -> None:
    model, optimizer, run = training(watch)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model) * (math.inf if step == 1 else 1.0)
        loss.backward()
        losses.append(loss.item())
        try:
            clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        except RuntimeError:
            if again:
                clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        run.log_train(loss=loss)
        if step == 1:
            with torch.no_grad():
                for p in model.parameters():
                    p.fill_(0.1)
    events = read(run)
    assert skipped(events) == []
    np.testing.assert_array_equal(events.steps.step, range(4))
    np.testing.assert_array_equal(events.steps["nonfinite"] > 0, [False, True, False, False])
    np.testing.assert_allclose(events.steps["loss"], losses, rtol=1e-6)


def test_a_scaler_that_skips_the_step_behind_a_refused_clip_counts_once(watch: Watch, read: Read) -> None:
    model, optimizer, run = training(watch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * (math.inf if step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        try:
            clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        except RuntimeError:
            pass
        scaler.step(optimizer)
        scaler.update()
    events = read(run)
    assert codes(events) == []
    assert skipped(events) == [2]
    assert events.steps.step.tolist() == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("by", ["scaler", "clip"])
def test_an_attempt_without_a_step_is_numbered_as_the_restored_optimizer_counts(
    watch: Watch, read: Read, by: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(7):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    run = watch(model, optimizer, config=CONFIG)
    if by == "scaler":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model) * math.inf).backward()
        scaler.step(optimizer)
    else:
        (loss_of(model) * math.inf).backward()
        with pytest.raises(RuntimeError, match="non-finite"):
            clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
    events = read(run)
    assert events.steps.step.tolist() == [7]
    assert skipped(events) == [0]


def test_what_torch_raises_is_what_it_raises_without_us(watch: Watch) -> None:
    def refused(model: nn.Module) -> RuntimeError:
        model.zero_grad()
        (loss_of(model) * math.inf).backward()
        with pytest.raises(RuntimeError) as caught:
            clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        return caught.value

    bare = refused(nn.Sequential(nn.Linear(4, 1)))
    model, _, _ = training(watch)
    watched = refused(model)
    assert (type(watched), str(watched)) == (type(bare), str(bare))
    assert watched.__cause__ is watched.__context__ is None


def test_other_errors_in_a_clip_leave_no_trace(watch: Watch, read: Read) -> None:
    model, optimizer, run = training(watch)
    loss_of(model).backward()
    with pytest.raises(ValueError, match="much"):
        clip_grad_norm_(model.parameters(), "much", error_if_nonfinite=True)  # type: ignore[arg-type]
    optimizer.step()
    assert skipped(read(run)) == []


# -- a total of the loop's own


def of_a_pipeline(total: Tensor) -> Tensor:
    """Another stage's share joined, as where a pipeline's ranks add their squares up."""
    return (total**2 + 3.0**2) ** 0.5


def of_a_pipeline_in_place(total: Tensor) -> Tensor:
    total **= 2
    total += 3.0**2
    total **= 0.5
    return total


def divided(total: Tensor) -> Tensor:
    return total / 16.0


@pytest.mark.parametrize("own", [of_a_pipeline, of_a_pipeline_in_place, divided])
def test_a_total_that_the_loop_came_to_by_itself_is_recorded_beside_the_true_norm_and_not_judged(
    watch: Watch, read: Read, own: Callable[[Tensor], Tensor]
) -> None:
    model, optimizer, run = training(watch, max_norm=0.25)
    norms, totals = [], []
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        norms.append([float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None])
        total = own(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        totals.append(float(total))
        clip_grads_with_norm_(model.parameters(), 0.25, total)
        optimizer.step()
    events = read(run)
    assert codes(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], totals, rtol=1e-5)
    np.testing.assert_allclose(events.steps["grad_norm_l2"], np.linalg.norm(norms, axis=1), rtol=1e-5)
    np.testing.assert_allclose(events.tensors.values, norms, rtol=1e-5)
    np.testing.assert_allclose(
        events.steps["clip_coefficient"], np.minimum(1, 0.25 / (np.array(totals) + 1e-6)), rtol=1e-5
    )
    assert "unchecked.clip-norm.default" in metadata(events)


def test_a_total_that_is_handed_on_as_it_was_computed_is_judged(watch: Watch, read: Read) -> None:
    model, optimizer, run = training(watch, max_norm=0.25)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        clip_grads_with_norm_(model.parameters(), 0.25, get_total_norm(grads))
        torch._foreach_mul_(grads, 50.0)
        optimizer.step()
    events = read(run)
    assert set(codes(events)) == {"clip-ineffective"}
    assert "unchecked.clip-norm.default" not in metadata(events)


# -- gradients that the loop scales


def scale(model: nn.Module, factor: float) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(factor)


def test_gradients_that_the_loop_unscales_by_itself_are_not_unscaled_again(watch: Watch, read: Read) -> None:
    model, optimizer, run = training(watch, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    norms = []
    for _ in range(25):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        scale(model, 1.0 / scaler.get_scale())
        norms.append(truth(model))
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    events = read(run)
    assert codes(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)


@pytest.mark.parametrize("noise", [False, True])
def test_a_clip_of_scaled_gradients_is_found_whatever_the_loop_adds_to_them(
    watch: Watch, read: Read, noise: bool
) -> None:
    model, optimizer, run = training(watch, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    norms = []
    for _ in range(10):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if noise:
            scale(model, 1.01)
        norms.append(truth(model) / 2.0**10)
        clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    events = read(run)
    assert set(codes(events)) == {"clip-scaled-gradients"}
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)


def test_scaled_gradients_that_are_clipped_and_used_as_they_are_are_found(watch: Watch, read: Read) -> None:
    model, optimizer, run = training(watch, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert set(codes(read(run))) == {"clip-scaled-gradients"}


def clip_of_ones_own(model: nn.Module) -> None:
    scale(model, min(1.0, 0.5 / truth(model)))


@pytest.mark.parametrize(("change", "said"), [(clip_of_ones_own, True), (lambda model: None, False)])
def test_where_gradients_change_unseen_the_norm_is_the_one_that_the_step_used_and_that_is_said(
    watch: Watch, read: Read, change: Callable[[nn.Module], None], said: bool
) -> None:
    model, optimizer, run = training(watch)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model).backward()
        change(model)
        norms.append(truth(model))
        optimizer.step()
    events = read(run)
    assert codes(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
    assert ("unchecked.norms.default" in metadata(events)) is said


def test_accumulation_and_either_way_to_clear_are_no_change(watch: Watch, read: Read) -> None:
    model, optimizer, run = training(watch)
    for step in range(6):
        for _ in range(3):
            loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=bool(step % 2))
    assert "unchecked.norms.default" not in metadata(read(run))


def test_a_norm_of_another_kind_that_is_scaled_by_hand(watch: Watch, read: Read) -> None:
    """DeepSpeed's and others' way: the norm is that of scaled gradients, and the loop divides it."""
    model, optimizer, run = training(watch)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    norms: list[Sequence[float]] = []
    for _ in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        norms.append([float(p.grad.double().norm()) / 2.0**10 for p in model.parameters() if p.grad is not None])
        total = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) / scaler.get_scale()
        clip_grads_with_norm_(model.parameters(), 0.5, total)
        scaler.step(optimizer)
        scaler.update()
    events = read(run)
    assert "clip-norm-overflow" not in codes(events)
    np.testing.assert_allclose(events.tensors.values, norms, rtol=1e-5)
    np.testing.assert_allclose(events.steps["grad_norm_l2"], np.linalg.norm(norms, axis=1), rtol=1e-5)
