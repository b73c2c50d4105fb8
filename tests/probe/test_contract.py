"""Each contract finding fires on the loop that breaks it, alone, and is silent on the loop that keeps it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.journal import Events

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]
Loop = Callable[[nn.Sequential, torch.optim.Optimizer, int], None]

STEPS = 30
CONFIG = {"batch_size": 8}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 1))


def loss_of(model: nn.Module, scale: float = 3.0) -> torch.Tensor:
    x = torch.randn(8, 5) * scale
    return nn.functional.mse_loss(model(x), torch.randn(8, 1) * scale)


def codes(events: Events) -> dict[str, dict[str, Any]]:
    """The findings of a run by code, the first of each."""
    found: dict[str, dict[str, Any]] = {}
    for event in events.events:
        if event["kind"] == "finding":
            found.setdefault(event["code"], event)
    return found


def train(watch: Watch, read: Read, loop: Loop, steps: int = STEPS, **arguments: Any) -> dict[str, dict[str, Any]]:
    model = mlp()
    optimizer = arguments.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(arguments.pop("model", model), optimizer, config=CONFIG, **arguments)
    for step in range(steps):
        loop(model, optimizer, step)
    return codes(read(run))


def clip(model: nn.Module, max_norm: float = 0.1) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def right(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    clip(model)
    optimizer.step()


def test_a_loop_in_order_has_no_finding(watch: Watch, read: Read) -> None:
    assert train(watch, read, right, max_norm=0.1) == {}


def test_accumulation_in_order_has_no_finding(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        for _ in range(4):
            (loss_of(model) / 4).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    assert train(watch, read, loop, max_norm=0.1) == {}


def test_clip_each_microbatch(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        for _ in range(3):
            loss_of(model).backward()
            clip(model)
        optimizer.step()
        optimizer.zero_grad()

    found = train(watch, read, loop)
    assert set(found) == {"clip-each-microbatch"}
    assert found["clip-each-microbatch"]["evidence"]["clips"] == 3


def test_measuring_after_each_microbatch_is_not_clipping(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        for _ in range(3):
            loss_of(model).backward()
            clip(model, math.inf)
        clip(model)
        optimizer.step()
        optimizer.zero_grad()

    assert train(watch, read, loop) == {}


def test_clips_of_each_module_are_no_microbatch_clips(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        loss_of(model).backward()
        for module in (model[0], model[2], model[3]):
            clip(module)
        optimizer.step()
        optimizer.zero_grad()

    assert train(watch, read, loop) == {}


def test_clip_before_backward(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        loss_of(model).backward()
        clip(model)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = train(watch, read, loop)
    assert set(found) == {"clip-before-backward"}


def test_gradient_noise_behind_the_clip_is_no_backward_pass(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        clip(model, 100.0)
        for p in model.parameters():
            assert p.grad is not None
            p.grad.add_(torch.randn_like(p), alpha=1e-3)
        optimizer.step()

    assert train(watch, read, loop) == {}


def test_clip_after_step(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        loss_of(model).backward()
        optimizer.step()
        clip(model)
        optimizer.zero_grad()

    found = train(watch, read, loop, max_norm=0.1)
    assert set(found) == {"clip-after-step"}


def test_clip_missing(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    found = train(watch, read, loop, max_norm=1.0)
    assert set(found) == {"clip-missing"}
    assert found["clip-missing"]["step"] == 19
    assert train(watch, read, loop) == {}  # nothing was declared


def test_a_reported_clip_is_not_missing(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer, max_norm=1.0, config=CONFIG)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        run.log_clip(0.5, 1.0)
        optimizer.step()
    assert codes(read(run)) == {}


def test_clip_partial(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        clip(model[0])
        optimizer.step()

    found = train(watch, read, loop)
    assert set(found) == {"clip-partial"}
    assert found["clip-partial"]["evidence"]["left_out"] == ["2.weight", "2.bias", "3.weight", "3.bias"]


def test_clip_ineffective(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        clip(model)
        for p in model.parameters():  # a hook, an engine, a bug: what was clipped is not what is used
            assert p.grad is not None
            p.grad = p.grad * 50
        optimizer.step()

    found = train(watch, read, loop)
    assert set(found) == {"clip-ineffective"}
    assert found["clip-ineffective"]["evidence"]["norm_after_clip"] == pytest.approx(5.0, rel=1e-3)


def test_a_clip_long_found_effective_is_trusted_until_the_parameters_change(watch: Watch, read: Read) -> None:
    """The measurement turns itself off after some 3,000 clean steps; a new group turns it on again."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False))
    late = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    run = watch(model, optimizer, max_norm=1.0)

    def steps(count: int, effective: bool = True) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for _ in range(count):
            optimizer.zero_grad()
            (model(torch.full((1, 3), 9.0)).sum() * 9 + late.sum()).square().backward()
            before = [p.grad.clone() for p in parameters]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for parameter, grad in zip(parameters, before):
                parameter.grad = parameter.grad if effective else grad * 100
            optimizer.step()

    def found() -> bool:
        assert run.directory is not None
        return "clip-ineffective" in (run.directory / "events.jsonl").read_text()

    steps(3_000)
    steps(200, effective=False)
    assert not found()
    optimizer.add_param_group({"params": [late]})
    steps(101, effective=False)
    assert found()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_honest_low_precision_clips_are_effective(watch: Watch, read: Read, dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    run = watch(model, optimizer, config=CONFIG)
    for _ in range(80):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        clip(model, 1.0)
        optimizer.step()
    assert codes(read(run)) == {}


def test_clip_norm_overflow(watch: Watch, read: Read) -> None:
    parameter = nn.Parameter(torch.zeros(9, dtype=torch.float16))
    optimizer = torch.optim.SGD([parameter], lr=1e-9)
    run = watch(nn.ParameterList([parameter]), optimizer, config=CONFIG)
    for _ in range(3):
        parameter.grad = torch.full((9,), 31_622.0, dtype=torch.float16)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
    found = codes(read(run))
    assert set(found) == {"clip-norm-overflow"}
    assert found["clip-norm-overflow"]["evidence"]["true"] == pytest.approx(94_868, rel=1e-3)


def scaled_loop(unscales: bool) -> Loop:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if unscales:
            scaler.unscale_(optimizer)
        clip(model)
        scaler.step(optimizer)
        scaler.update()

    return loop


def test_clip_scaled_gradients(watch: Watch, read: Read) -> None:
    found = train(watch, read, scaled_loop(False))
    assert set(found) == {"clip-scaled-gradients"}
    assert found["clip-scaled-gradients"]["evidence"]["scale"] == 1024.0
    assert train(watch, read, scaled_loop(True)) == {}


def test_the_step_that_a_scaler_skips_is_an_attempt_and_no_microbatch(watch: Watch, read: Read) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        loss = loss_of(model) * (math.inf if step % 5 == 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert train(watch, read, loop, max_norm=0.1) == {}


def test_decay_on_bias_or_norm(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    found = codes(read(watch(model, optimizer, config=CONFIG)))
    assert set(found) == {"decay-on-bias-or-norm"}
    finding = found["decay-on-bias-or-norm"]
    assert finding["severity"] == "ticket"
    assert finding["evidence"]["tensors"] == ["0.bias", "2.weight", "2.bias", "3.bias"]


def test_decay_too_small_to_matter_is_information(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-3)
    assert codes(read(watch(model, optimizer, config=CONFIG)))["decay-on-bias-or-norm"]["severity"] == "info"


def test_decay_in_a_group_without_biases_and_norms_is_silent(watch: Watch, read: Read) -> None:
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    assert codes(read(watch(model, optimizer, config=CONFIG))) == {}


def test_decay_coupled(watch: Watch, read: Read) -> None:
    model = nn.Linear(4, 4, bias=False)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1)
    assert set(codes(read(watch(model, adam, config=CONFIG)))) == {"decay-coupled"}
    decoupled = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True)
    assert codes(read(watch(model, decoupled, config=CONFIG))) == {}
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=0.1)
    assert codes(read(watch(model, sgd, config=CONFIG))) == {}


@pytest.mark.parametrize(("decay", "expected"), [(0.5, {"decay-dominates-gradient"}), (1e-4, set())])
def test_decay_dominates_gradient(watch: Watch, read: Read, decay: float, expected: set[str]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, weight_decay=decay)
    run = watch(model, optimizer, config=CONFIG)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        clip(model, 0.01)
        optimizer.step()
    assert set(codes(read(run))) == expected


def test_parameters_not_optimized(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-3)
    found = codes(read(watch(model, optimizer, config=CONFIG)))
    assert set(found) == {"parameters-not-optimized"}
    assert found["parameters-not-optimized"]["evidence"]["tensors"][0] == "2.weight"
    for module in model[2:]:
        module.requires_grad_(False)
    assert codes(read(watch(model, optimizer, config=CONFIG))) == {}


def branching(every: int) -> Loop:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        hidden = model[1](model[0](torch.randn(8, 5)))
        if every and step % every == every - 1:
            hidden = model[2](hidden)
        model[3](hidden).square().mean().backward()
        optimizer.step()

    return loop


def test_gradients_missing(watch: Watch, read: Read) -> None:
    found = train(watch, read, branching(0), steps=210)
    assert set(found) == {"gradients-missing"}
    assert found["gradients-missing"]["evidence"]["tensors"] == ["2.weight", "2.bias"]
    assert train(watch, read, branching(150), steps=210) == {}  # a branch that fires now and then


def test_gradients_not_cleared(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        loss_of(model).backward()
        optimizer.step()

    assert set(train(watch, read, loop)) == {"gradients-not-cleared"}


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_cleared_either_way_are_cleared(watch: Watch, read: Read, to_none: bool) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)

    assert train(watch, read, loop) == {}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_scheduler_per_microbatch(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.99)

    def wrong(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        for _ in range(2):
            loss_of(model).backward()
            scheduler.step()
        optimizer.step()

    def fine(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        for _ in range(2):
            loss_of(model).backward()
        optimizer.step()
        scheduler.step()

    run = watch(model, optimizer, config=CONFIG, scheduler=scheduler)
    for step in range(STEPS):
        wrong(model, optimizer, step)
    assert set(codes(read(run))) == {"scheduler-per-microbatch"}
    run = watch(model, optimizer, config=CONFIG, scheduler=scheduler)
    for step in range(STEPS):
        fine(model, optimizer, step)
    assert codes(read(run)) == {}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_scheduler_stepped_before_the_first_optimizer_step_lost_its_first_rate(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    run = watch(model, optimizer, config=CONFIG, scheduler=scheduler)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        scheduler.step()
        optimizer.step()
    found = codes(read(run))
    assert set(found) == {"scheduler-per-microbatch"}
    assert found["scheduler-per-microbatch"]["step"] == 0


def test_rates_set_by_hand_may_move_anywhere(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
        optimizer.step()

    assert train(watch, read, loop) == {}


def test_hyperparameters_missing(watch: Watch, read: Read) -> None:
    def run_with(config: dict[str, Any], samples: int | None) -> dict[str, dict[str, Any]]:
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        run = watch(model, optimizer, config=config)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            run.log_train(loss=loss, samples=samples)
        return codes(read(run))

    found = run_with({}, None)
    assert set(found) == {"hyperparameters-missing"}
    assert found["hyperparameters-missing"]["severity"] == "info"
    assert found["hyperparameters-missing"]["evidence"]["missing"] == ["batch_size"]
    assert run_with({"data": {"batch-size": 8}}, None) == {}
    assert run_with({}, 8) == {}


def test_a_finding_repeats_ever_more_rarely_with_its_count(watch: Watch, read: Read) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = watch(model, optimizer, config=CONFIG)
    for _ in range(40):
        loss_of(model).backward()
        clip(model)
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    counts = [e["evidence"]["count"] for e in read(run).events if e.get("code") == "clip-before-backward"]
    assert counts == [1, 2, 4, 8, 16, 32]


def test_a_batch_given_up_is_no_micro_batch(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        clip(model)
        if step % 3 == 1:
            return  # a bad batch: the next one begins anew
        optimizer.step()

    assert train(watch, read, loop, max_norm=0.1) == {}


def test_autograd_grad_is_no_backward_pass(watch: Watch, read: Read) -> None:
    def loop(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.zero_grad()
        loss = loss_of(model)
        penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, model.parameters(), create_graph=True))
        (loss + 1e-3 * penalty).backward()
        clip(model)
        torch.autograd.grad(loss_of(model), list(model.parameters()))
        optimizer.step()

    assert train(watch, read, loop, max_norm=0.1) == {}


def test_a_resumed_run_is_checked_from_its_own_beginning(watch: Watch, read: Read) -> None:
    found = train(watch, read, branching(0), steps=210, initial_step=1000)
    assert set(found) == {"gradients-missing"}
