"""What a watched loop leaves in the journal, against formulas written another way."""

from __future__ import annotations

import copy
import math
import multiprocessing
import multiprocessing.reduction
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.journal import Events, JournalReader

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]


#: Set in the process of a test that needs one which no other test has used.
FRESH = "GRADWATCH_TEST_FRESH"


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def flat_norm(parameters: list[nn.Parameter], kind: float = 2.0) -> float:
    """Second opinion: the norm of one concatenated vector in float64."""
    grads = [p.grad.detach().double().flatten() for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.cat(grads), kind))


def batch(scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 5) * scale, torch.randn(8, 1)


def backward(model: nn.Module, scale: float = 1.0) -> torch.Tensor:
    x, y = batch(scale)
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def test_each_step_has_its_pre_clip_norm_coefficient_threshold_and_loss(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    run = watch(model, optimizer, max_norm=0.5)
    expected = []
    for step in range(12):
        loss = backward(model, 1.0 + step)
        norm = flat_norm(list(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        run.log_train(loss=loss)
        expected.append((norm, min(1.0, 0.5 / (norm + 1e-6)), loss.item()))
    rows = read(run).steps
    norms, coefficients, losses = np.array(expected).T
    np.testing.assert_allclose(rows["grad_norm"], norms, rtol=1e-6)
    np.testing.assert_allclose(rows["grad_norm_l2"], norms, rtol=1e-6)
    np.testing.assert_allclose(rows["clip_coefficient"], coefficients, rtol=1e-6)
    np.testing.assert_array_equal(rows["loss"], losses)
    np.testing.assert_array_equal(rows["clip_threshold"], 0.5)
    np.testing.assert_array_equal(rows["lr_0"], 3e-3)
    np.testing.assert_array_equal(rows["wd_0"], 0.02)
    np.testing.assert_array_equal(rows["nonfinite"], 0)
    np.testing.assert_array_equal(rows["backwards"], 1)
    np.testing.assert_array_equal(rows.step, np.arange(12))
    assert (rows["duration"] > 0).all()
    assert (rows["probe_seconds"] > 0).all()
    assert np.isnan(rows["samples"]).all()


@pytest.mark.parametrize("clips", [True, False])
def test_tensors_norms_are_those_of_each_gradient_before_the_clip(watch: Watch, read: Read, clips: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    expected = []
    for _ in range(5):
        backward(model, 3.0)
        expected.append([float(p.grad.double().norm()) for p in model.parameters() if p.grad is not None])
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    events = read(run)
    np.testing.assert_allclose(events.tensors.values, expected, rtol=1e-6)
    np.testing.assert_array_equal(events.tensors.row, events.steps.sequence)
    names = [t.name for t in run_manifest(run).tensors]
    assert names == [name for name, _ in model.named_parameters()]
    flags = events.steps["flags"].astype(int)
    assert ((flags & 4 != 0) == clips).all()
    assert ((flags & 2 != 0) == (not clips)).all()
    assert np.isnan(events.steps["clip_coefficient"]).all() == (not clips)


def run_manifest(run: gradwatch.Run):  # type: ignore[no-untyped-def]
    assert run.directory is not None
    reader = JournalReader(run.directory)
    reader.close()
    return reader.manifest


def test_frozen_parameters_and_those_without_gradient_are_left_out(watch: Watch, read: Read) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), unused], lr=1e-2)
    run = watch(model, optimizer)
    backward(model)
    norm = flat_norm(list(model.parameters()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
    events = read(run)
    assert events.steps["grad_norm_l2"][0] == pytest.approx(norm, rel=1e-6)
    tensors = dict(zip([t.name for t in run_manifest(run).tensors], events.tensors.values[0].tolist()))
    assert math.isnan(tensors["0.weight"])
    assert tensors["2.weight"] == pytest.approx(float(model[2].weight.grad.norm()), rel=1e-6)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("kind", [2.0, 1.0, 3.0, math.inf])
def test_the_norm_that_training_used_and_the_l2_norm_are_told_apart(watch: Watch, read: Read, kind: float) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model)
    used, l2 = flat_norm(list(model.parameters()), kind), flat_norm(list(model.parameters()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=kind)
    optimizer.step()
    rows = read(run).steps
    assert rows["grad_norm"][0] == pytest.approx(used, rel=1e-5)
    assert rows["grad_norm_l2"][0] == pytest.approx(l2, rel=1e-5)
    assert rows["clip_coefficient"][0] == pytest.approx(min(1.0, 0.1 / (used + 1e-6)), rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_low_precision_gradients_have_a_true_norm_beside_the_one_that_training_used(
    watch: Watch, read: Read, dtype: torch.dtype, tolerance: float
) -> None:
    model = mlp().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    truth = flat_norm(list(model.parameters()))
    used = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert used.dtype == dtype
    optimizer.step()
    rows = read(run).steps
    assert rows["grad_norm"][0] == used.item()
    assert rows["grad_norm"][0] == pytest.approx(truth, rel=tolerance)
    assert rows["grad_norm_l2"][0] == pytest.approx(truth, rel=1e-6)


def test_a_norm_that_overflows_float16_is_infinite_where_it_was_used_and_finite_in_truth(
    watch: Watch, read: Read
) -> None:
    parameter = nn.Parameter(torch.zeros(9, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=1e-9)
    run = watch(nn.ParameterList([parameter]), optimizer)
    parameter.grad = torch.full((9,), 31_622.0, dtype=torch.float16)
    truth = float(parameter.grad.double().norm())
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    optimizer.step()
    rows = read(run).steps
    assert math.isinf(rows["grad_norm"][0])
    assert rows["grad_norm_l2"][0] == pytest.approx(truth, rel=1e-4)
    assert rows["clip_coefficient"][0] == 0.0


def test_groups_and_several_optimizers_have_their_own_rates_and_norms(watch: Watch, read: Read) -> None:
    policy, value = mlp(), mlp()
    one = torch.optim.AdamW(
        [{"params": policy[0].parameters(), "lr": 1e-3, "weight_decay": 0.1}, {"params": policy[2].parameters()}],
        lr=1e-2,
        weight_decay=0.0,
    )
    two = torch.optim.SGD(value.parameters(), lr=0.5, momentum=0.9)
    run = watch([policy, value], {"policy": one, "value": two})
    truth: dict[str, list[float]] = {"policy": [], "value": []}
    for _ in range(3):
        for name, model, optimizer in (("policy", policy, one), ("value", value, two)):
            backward(model)
            used = [p for g in optimizer.param_groups for p in g["params"]]
            truth[name].append(flat_norm(used))
            torch.nn.utils.clip_grad_norm_(used, 0.2)
            optimizer.step()
            model.zero_grad()
    rows = read(run).steps
    assert [o.name for o in run_manifest(run).optimizers] == ["policy", "value"]
    for index, name in enumerate(truth):
        mine = rows["optimizer"] == index
        np.testing.assert_allclose(rows["grad_norm"][mine], truth[name], rtol=1e-6)
        np.testing.assert_array_equal(rows.step[mine], [0, 1, 2])
    first = rows["optimizer"] == 0
    np.testing.assert_array_equal(rows["lr_0"][first], 1e-3)
    np.testing.assert_array_equal(rows["lr_1"][first], 1e-2)
    np.testing.assert_array_equal(rows["wd_0"][first], 0.1)
    np.testing.assert_array_equal(rows["wd_1"][first], 0.0)
    np.testing.assert_array_equal(rows["lr_0"][~first], 0.5)


def test_clips_of_parts_combine_and_their_smallest_coefficient_counts(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model, 5.0)
    truth = flat_norm(list(model.parameters()))
    part = [flat_norm(list(model[i].parameters())) for i in (0, 2, 4)]
    for i in (0, 2, 4):
        torch.nn.utils.clip_grad_norm_(model[i].parameters(), 0.3)
    optimizer.step()
    rows = read(run).steps
    assert rows["grad_norm"][0] == pytest.approx(truth, rel=1e-6)
    assert rows["clip_coefficient"][0] == pytest.approx(min(0.3 / (n + 1e-6) for n in part), rel=1e-5)
    assert int(rows["flags"][0]) & 64


def test_a_measurement_without_bound_is_no_clip(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model)
    truth = flat_norm(list(model.parameters()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    optimizer.step()
    rows = read(run).steps
    assert rows["grad_norm"][0] == pytest.approx(truth, rel=1e-6)
    assert np.isnan(rows["clip_coefficient"][0])
    assert np.isnan(rows["clip_threshold"][0])
    assert int(rows["flags"][0]) & 4 == 0


def test_clip_by_value_is_recorded_as_what_it_is(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model, 4.0)
    before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
    after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    optimizer.step()
    events = read(run)
    rows, sample = events.steps, events.samples.values[0]
    assert rows["value_threshold"][0] == 0.05
    assert int(rows["flags"][0]) & 8
    assert rows["grad_norm_l2"][0] == pytest.approx(float(before.norm()), rel=1e-6)
    assert sample[5] == pytest.approx(float((before != after).double().mean()), rel=1e-6)
    assert sample[6] == pytest.approx(float(before @ after / before.norm() / after.norm()), rel=1e-5)


def test_log_clip_reports_what_an_engine_clipped(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer, max_norm=0.1)
    backward(model)
    parameters = [p for p in model.parameters() if p.grad is not None]
    truth = flat_norm(parameters)
    each = [float(p.grad.norm()) for p in parameters if p.grad is not None]
    for p in parameters:  # an engine of its own, which torch's clip never sees
        assert p.grad is not None
        p.grad.mul_(0.1 / (truth + 1e-6))
    run.log_clip(torch.tensor(truth), 0.1)
    optimizer.step()
    events = read(run)
    assert events.steps["grad_norm"][0] == pytest.approx(truth, rel=1e-6)
    assert events.steps["clip_coefficient"][0] == pytest.approx(0.1 / (truth + 1e-6), rel=1e-5)
    np.testing.assert_allclose(events.tensors.values[0], each, rtol=1e-4)
    assert int(events.steps["flags"][0]) & 16


def test_nonfinite_gradients_name_the_tensors_that_hold_them(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model)
    model[2].weight.grad[0, 0] = math.nan  # type: ignore[index, union-attr]
    model[4].bias.grad[0] = math.inf  # type: ignore[index, union-attr]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    events = read(run)
    assert events.steps["nonfinite"][0] == 2
    assert math.isnan(events.steps["grad_norm"][0])
    names = [t.name for t in run_manifest(run).tensors]
    bad = [name for name, value in zip(names, events.tensors.values[0]) if math.isinf(value)]
    assert bad == ["2.weight", "4.bias"]


def test_a_sample_holds_weight_norms_updates_state_and_histogram(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    run = watch(model, optimizer)
    before = [p.detach().double().clone() for p in model.parameters()]
    backward(model)
    optimizer.step()
    after = [p.detach().double().clone() for p in model.parameters()]
    events = read(run)
    manifest = run_manifest(run)
    section = {s.name: slice(s.offset, s.offset + s.size) for s in manifest.sections}
    values = events.samples.values[0].astype(np.float64)
    np.testing.assert_allclose(values[section["weight_norm"]], [float(w.norm()) for w in before], rtol=1e-6)
    updates = [float((a - b).norm()) for a, b in zip(after, before)]
    np.testing.assert_allclose(values[section["update_norm"]], updates, rtol=1e-4)
    _, weight, update, ratio, state = values[section["global"]][:5]
    assert weight == pytest.approx(math.hypot(*[float(w.norm()) for w in before]), rel=1e-6)
    assert update == pytest.approx(math.hypot(*updates), rel=1e-4)
    assert ratio == pytest.approx(update / weight, rel=1e-6)
    moments = [float(optimizer.state[p][k].norm()) for p in model.parameters() for k in ("exp_avg", "exp_avg_sq")]
    np.testing.assert_allclose(values[section["state_norm"]], moments, rtol=1e-5)
    assert state == pytest.approx(math.hypot(*moments), rel=1e-5)
    counts = values[section["histogram"]].reshape(len(before), manifest.buckets)
    for row, weights in zip(counts, after):
        exponent = np.floor(np.log2(np.abs(weights.numpy()).clip(1e-30)) / 2).clip(-12, 7).astype(int)
        np.testing.assert_array_equal(row, np.bincount(exponent.ravel() + 12, minlength=manifest.buckets))


def test_samples_come_at_the_first_step_powers_of_two_and_every_hundredth(watch: Watch, read: Read) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)
    for _ in range(301):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert read(run).samples.step.tolist() == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 300]


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_weights_are_the_same_to_the_last_bit_watched_or_not(watch: Watch, name: str, clips: bool) -> None:
    def train(watched: bool) -> list[torch.Tensor]:
        model = mlp()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2)
        run = watch(model, optimizer, max_norm=0.1) if watched else None
        torch.manual_seed(1)
        for step in range(200):
            loss = backward(model)
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            if run is not None:
                run.log_train(loss=loss)
                if step % 50 == 0:
                    run.log_validation(loss=loss)
        return [p.detach().clone() for p in model.parameters()]

    for bare, observed in zip(train(False), train(True)):
        assert torch.equal(bare, observed)


def test_closures_are_measured_where_the_gradients_are(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, optimizer)
    truth = []
    for _ in range(6):
        x, y = batch()

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            truth.append(flat_norm(list(model.parameters())))
            return loss

        optimizer.step(closure)
    rows = read(run).steps
    np.testing.assert_allclose(rows["grad_norm"], truth, rtol=1e-6)
    assert (rows["flags"].astype(int) & 32).all()


def test_lbfgs_is_measured_at_its_first_evaluation(watch: Watch, read: Read) -> None:
    model = nn.Linear(5, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    run = watch(model, optimizer)
    truth: list[list[float]] = []
    x, y = batch()
    for _ in range(3):
        truth.append([])

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            truth[-1].append(flat_norm(list(model.parameters())))
            return loss

        optimizer.step(closure)
    np.testing.assert_allclose(read(run).steps["grad_norm"], [evaluations[0] for evaluations in truth], rtol=1e-5)


def test_losses_logged_before_the_first_step_belong_to_the_step_that_follows(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    means = []
    for _ in range(4):
        losses = []
        for _ in range(3):  # micro-batches
            loss = backward(model)
            run.log_train(loss=loss, samples=8)
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        means.append(sum(losses) / 3)
    rows = read(run).steps
    np.testing.assert_allclose(rows["loss"], means, rtol=1e-6)
    np.testing.assert_array_equal(rows["samples"], 24)
    np.testing.assert_array_equal(rows["backwards"], 3)


def test_a_validation_carries_its_metrics_and_the_training_means_since_the_last(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    losses = []
    for _ in range(4):
        loss = backward(model)
        optimizer.step()
        optimizer.zero_grad()
        run.log_train(loss=loss, accuracy=0.75)
        losses.append(loss.item())
    run.log_validation(loss=torch.tensor(0.5), accuracy=0.5, slice="tenant-7", higher_is_better={"accuracy": True})
    run.log_validation(loss=0.25)
    first, second = [e for e in read(run).events if e["kind"] == "validation"]
    assert first["metrics"] == {"loss": 0.5, "accuracy": 0.5}
    assert first["slice"] == "tenant-7"
    assert first["higher_is_better"] == {"accuracy": True}
    assert first["train"]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert first["train"]["accuracy"] == pytest.approx(0.75)
    assert first["step"] == 3
    assert second["train"] == {}


def test_no_thread_is_started_and_a_finished_run_says_so(watch: Watch, read: Read) -> None:
    before = threading.active_count()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model)
    optimizer.step()
    assert threading.active_count() == before
    assert run.active
    end = read(run).events[-1]
    assert (end["kind"], end["state"], end["reason"]) == ("end", "finished", "finished")
    assert not run.active
    run.finish()
    run.log_train(loss=1.0)  # behind the end: no error, no effect


def test_an_exception_that_leaves_the_block_ends_the_run_as_failed(watch: Watch, read: Read) -> None:
    model = mlp()
    run = watch(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    with pytest.raises(FloatingPointError), run:
        raise FloatingPointError("loss is nan at batch 7")
    end = read(run).events[-1]
    assert (end["state"], end["type"], end["message"]) == ("failed", "FloatingPointError", "loss is nan at batch 7")


def test_a_restored_optimizer_goes_on_counting(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(7):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    run = watch(model, optimizer)
    backward(model)
    optimizer.step()
    assert read(run).steps.step.tolist() == [7]


def test_a_checkpoint_carries_the_count_where_the_optimizer_has_none(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    run.load_state_dict({"run": "former", "steps": {"default": 41}})
    backward(model)
    optimizer.step()
    assert run.state_dict()["steps"] == {"default": 42}
    assert read(run).steps.step.tolist() == [41]


def test_the_method_clips_all_watched_parameters(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model)
    truth = flat_norm(list(model.parameters()))
    assert float(run.clip_grad_norm_(0.1)) == pytest.approx(truth, rel=1e-6)
    assert flat_norm(list(model.parameters())) == pytest.approx(0.1, rel=1e-4)
    optimizer.step()
    assert read(run).steps["clip_threshold"][0] == 0.1


def test_a_group_added_while_training_is_measured_in_the_global_norm(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-2)
    run = watch(model, optimizer)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    backward(model)
    truth = flat_norm([*model[0].parameters(), *model[2].parameters()])
    torch.nn.utils.clip_grad_norm_([*model[0].parameters(), *model[2].parameters()], 1.0)
    optimizer.step()
    events = read(run)
    assert events.steps["grad_norm"][1] == pytest.approx(truth, rel=1e-6)
    assert events.steps["lr_1"][1] == 0.5
    (added,) = [e for e in events.events if e["kind"] == "group"]
    assert (added["optimizer"], added["group"], added["values"]["lr"]) == ("default", 1, 0.5)


def test_what_is_only_known_later_comes_as_metadata(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, optimizer)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[5])
    for _ in range(5):
        for _ in range(3):
            backward(model)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    (learned,) = [e["values"] for e in read(run).events if e["kind"] == "metadata"]
    assert learned["accumulation.observed"] == 3
    assert learned["scheduler.class"] == "SequentialLR"
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert not hasattr(torch.optim.lr_scheduler.LRScheduler.__init__, "__wrapped__"), "the wrapper outlived the run"


@pytest.mark.parametrize("before", [True, False])
def test_a_loss_that_is_nan_is_told_from_one_that_was_not_logged(watch: Watch, read: Read, before: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, optimizer)
    for step in range(3):
        backward(model)
        if before and step != 1:
            run.log_train(loss=torch.tensor(math.nan) if step == 2 else 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not before and step != 1:
            run.log_train(loss=torch.tensor(math.nan) if step == 2 else 1.0)
    loss = read(run).steps["loss"]
    assert np.isnan(loss).tolist() == [False, True, True]
    assert np.signbit(loss).tolist() == [False, False, True]


def test_what_a_loop_logs_wrongly_costs_that_call_and_nothing_else(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, optimizer)
    with pytest.warns(RuntimeWarning, match="log_validation was given what it cannot use"):
        run.log_validation(auc=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(30):
            loss = backward(model)
            run.log_clip(0.5, torch.tensor(1.0))  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
            run.log_train(loss=loss, correct=torch.ones(3 + step % 2))
            run.log_validation(auc=None)  # type: ignore[arg-type]
            run.log_slo("latency", good=math.nan)  # type: ignore[arg-type]
            run.load_state_dict(None)  # type: ignore[arg-type]
    events = read(run)
    assert len(events.steps) == 30
    assert np.isfinite(events.steps["loss"]).all()
    assert events.events[-1]["kind"] == "end"


def test_restored_state_brings_its_own_rates(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    other = torch.optim.SGD(mlp().parameters(), lr=10.0, weight_decay=0.5)
    run = watch(model, optimizer)
    backward(model)
    optimizer.step()
    optimizer.load_state_dict(other.state_dict())
    backward(model)
    optimizer.step()
    rows = read(run).steps
    assert rows["lr_0"].tolist() == [1e-3, 10.0]
    assert rows["wd_0"].tolist() == [0.0, 0.5]


def test_tensors_without_a_column_count_in_the_global_norm(
    watch: Watch, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwatch.probe.start.MAX_TENSORS", 2)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)
    truth = []
    for clips in (False, True):
        optimizer.zero_grad()
        backward(model)
        truth.append(flat_norm(list(model.parameters())))
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    events = read(run)
    np.testing.assert_allclose(events.steps["grad_norm"], truth, rtol=1e-6)
    np.testing.assert_allclose(events.steps["grad_norm_l2"], truth, rtol=1e-6)
    assert events.tensors.values.shape == (2, 2)


def test_a_second_clip_multiplies(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)
    backward(model, 5.0)
    truth = flat_norm(list(model.parameters()))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    after = flat_norm(list(model.parameters()))
    optimizer.step()
    rows = read(run).steps
    assert rows["grad_norm"][0] == pytest.approx(truth, rel=1e-6)
    assert rows["clip_coefficient"][0] == pytest.approx(after / truth, rel=1e-5)


def test_overlapping_clips_take_each_tensor_once(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)
    backward(model, 5.0)
    truth = flat_norm(list(model.parameters()))
    first = [*model[0].parameters(), *model[2].parameters()]
    torch.nn.utils.clip_grad_norm_(first, 0.5)
    torch.nn.utils.clip_grad_norm_([*model[2].parameters(), *model[4].parameters()], 0.5)
    optimizer.step()
    assert read(run).steps["grad_norm_l2"][0] == pytest.approx(truth, rel=1e-5)


def test_the_norm_before_a_clip_by_value_stays_the_norm_when_a_clip_by_norm_follows(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)
    backward(model, 5.0)
    truth = flat_norm(list(model.parameters()))
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    rows = read(run).steps
    assert rows["grad_norm"][0] == pytest.approx(truth, rel=1e-5)


def test_a_clip_by_value_of_one_micro_batch_leaves_the_norm_of_the_step(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)
    backward(model)
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    backward(model, 5.0)
    truth = flat_norm(list(model.parameters()))
    optimizer.step()
    assert read(run).steps["grad_norm"][0] == pytest.approx(truth, rel=1e-5)


def test_settings_that_are_none_are_unknown(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)
    optimizer.param_groups[0]["lr"] = None
    group = optimizer.param_groups[0]

    def apply(*_: object) -> None:
        group["lr"] = 1e-3

    def forget(*_: object) -> None:
        group["lr"] = None

    backward(model)
    group["lr"] = 1e-3
    optimizer.register_step_post_hook(apply)
    optimizer.step()
    group["lr"] = None
    run._session.probes[0].holds.read_groups(host := [0.0] * 64)  # type: ignore[union-attr]
    assert math.isnan(host[8])
    forget()
    apply()
    assert len(read(run).steps) == 1


def test_lbfgs_with_its_clip_inside_the_closure(watch: Watch, read: Read) -> None:
    model = nn.Linear(5, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    run = watch(model, optimizer)
    truth: list[list[float]] = []
    x, y = batch()
    for _ in range(3):
        truth.append([])

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            truth[-1].append(flat_norm(list(model.parameters())))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            return loss

        optimizer.step(closure)
    rows = read(run).steps
    np.testing.assert_allclose(rows["grad_norm"], [evaluations[0] for evaluations in truth], rtol=1e-5)
    np.testing.assert_array_equal(rows["clip_threshold"], 0.3)


def test_scalers_of_others_leave_the_norm_alone(watch: Watch, read: Read) -> None:
    model, other = mlp(), mlp()
    optimizer, theirs = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        scaler.scale(nn.functional.mse_loss(other(batch()[0]), batch()[1])).backward()
        scaler.step(theirs)
        scaler.update()
    run = watch(model, optimizer)
    truth = []
    for _ in range(3):
        scaler.scale(nn.functional.mse_loss(other(batch()[0]), batch()[1])).backward()
        scaler.unscale_(theirs)
        optimizer.zero_grad()
        backward(model)
        truth.append(flat_norm(list(model.parameters())))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scaler.step(theirs)
        scaler.update()
    events = read(run)
    np.testing.assert_allclose(events.steps["grad_norm"], truth, rtol=1e-5)
    assert not [e for e in events.events if e.get("code") == "clip-scaled-gradients"]


def test_watching_an_optimizer_anew_ends_its_former_run(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    former = watch(model, optimizer)
    run = watch(model, optimizer)
    assert not former.active
    backward(model)
    optimizer.step()
    assert len(read(run).steps) == 1
    assert read(former).events[-1]["reason"] == "watched again"


def test_a_watched_model_pickles_as_it_would(watch: Watch) -> None:
    model = mlp()
    watch(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        multiprocessing.reduction.ForkingPickler.dumps(model)
        copy.deepcopy(model)


def test_forked_workers_leave_the_journal_alone() -> None:
    """In a process of its own: where an earlier test registered an accelerator, autograd refuses to run in a fork."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"{__file__}::test_in_a_fresh_process_forked_workers_leave_the_journal_alone"],
        env={**os.environ, FRESH: "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.skipif(FRESH not in os.environ, reason="run by the test above, in its own process")
def test_in_a_fresh_process_forked_workers_leave_the_journal_alone(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer)

    class Trains(torch.utils.data.Dataset[torch.Tensor]):
        """A data set whose workers do to the forked run what a training does."""

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> torch.Tensor:
            if torch.utils.data.get_worker_info() is not None:
                backward(model)
                optimizer.step()
                run.log_train(loss=-1.0)
                run.log_validation(loss=-1.0)
            return torch.tensor(float(index))

    loader = torch.utils.data.DataLoader(Trains(), num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        for _ in loader:
            loss = backward(model)
            optimizer.step()
            optimizer.zero_grad()
            run.log_train(loss=loss)
    events = read(run)
    assert events.steps.step.tolist() == list(range(16))
    assert (events.steps["loss"] > 0).all()
    assert [e["kind"] for e in events.events if e["kind"] == "validation"] == []


def test_arguments_in_the_wrong_order_are_told_in_words(watch: Watch) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(TypeError, match=r"the order is watch\(model, optimizer\)"):
        watch(optimizer, model)
