"""Training loops as torch's own documentation and its users write them: true norms, and not one finding.

Each recipe is the usual loop; beside it stand the norms that a flat float64
vector gives for the gradients that the optimizer used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.journal import Events

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]
CONFIG = {"batch_size": 16}


def net(out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, out))


def batch(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 6)
    return x, (x[:, :1] * 2 - x[:, 1:2]).detach()


def truth(parameters: object) -> float:
    grads = [p.grad.double().flatten() for p in parameters if p.grad is not None]  # type: ignore[attr-defined]
    return float(torch.cat(grads).norm())


def contract(events: Events) -> list[str]:
    return [e["code"] for e in events.events if e["kind"] == "finding"]


def test_mixed_precision_with_clipping(watch: Watch, read: Read) -> None:
    # https://docs.pytorch.org/docs/stable/notes/amp_examples.html
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    run = watch(model, optimizer, max_norm=0.5, config=CONFIG)
    norms, scales = [], []
    for _ in range(40):
        optimizer.zero_grad()
        x, y = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scales.append(float(scaler.get_scale()))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(truth(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.5)
        scaler.step(optimizer)
        scaler.update()
        run.log_train(loss=loss)
    events = read(run)
    assert contract(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(events.steps["loss_scale"], scales)


def test_mixed_precision_that_never_unscales_still_has_its_true_norm(watch: Watch, read: Read) -> None:
    model = net()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = watch(model, optimizer, config=CONFIG)
    norms = []
    for _ in range(10):
        x, y = batch()
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        nn.functional.mse_loss(twin(x), y).backward()
        norms.append(truth(twin.parameters()))
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    events = read(run)
    assert contract(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)


def test_fused_optimizers_that_unscale_inside_their_step(watch: Watch, read: Read) -> None:
    model = net()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = watch(model, optimizer, config=CONFIG)
    norms = []
    for _ in range(10):
        x, y = batch()
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        nn.functional.mse_loss(twin(x), y).backward()
        norms.append(truth(twin.parameters()))
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    events = read(run)
    assert contract(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps_are_counted_and_not_taken_for_steps(watch: Watch, read: Read, fused: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    run = watch(model, optimizer, config=CONFIG)
    for step in range(12):
        optimizer.zero_grad()
        x, y = batch()
        loss = nn.functional.mse_loss(model(x), y) * (math.inf if step in (3, 4, 9) else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    events = read(run)
    assert contract(events) == []
    skipped = events.steps["flags"].astype(int) & 1 != 0
    assert np.flatnonzero(skipped).tolist() == [3, 4, 9]
    assert events.steps.step[~skipped].tolist() == list(range(9))


def test_accumulation_with_mixed_precision(watch: Watch, read: Read) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    run = watch(model, optimizer, max_norm=1.0, config=CONFIG)
    norms = []
    for i in range(40):
        x, y = batch()
        loss = nn.functional.mse_loss(model(x), y) / 4
        scaler.scale(loss).backward()
        run.log_train(loss=loss, samples=16)
        if (i + 1) % 4 == 0:
            scaler.unscale_(optimizer)
            norms.append(truth(model.parameters()))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    events = read(run)
    assert contract(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_array_equal(events.steps["backwards"], 4)
    np.testing.assert_array_equal(events.steps["samples"], 64)


def test_generative_adversarial_training(watch: Watch, read: Read) -> None:
    # https://docs.pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html: the generator's pass leaves
    # gradients in the discriminator, which clears them before its own.
    generator, discriminator = net(6), net()
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    opt_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    run = watch([generator, discriminator], {"discriminator": opt_d, "generator": opt_g}, config=CONFIG)
    bce = nn.BCEWithLogitsLoss()
    real_label, fake_label = torch.ones(16, 1), torch.zeros(16, 1)
    norms: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(40):
        discriminator.zero_grad()
        bce(discriminator(torch.randn(16, 6) + 2), real_label).backward()
        fake = generator(torch.randn(16, 6))
        bce(discriminator(fake.detach()), fake_label).backward()
        norms[0].append(truth(discriminator.parameters()))
        opt_d.step()
        generator.zero_grad()
        loss = bce(discriminator(fake), real_label)
        loss.backward()
        norms[1].append(truth(generator.parameters()))
        opt_g.step()
    events = read(run)
    assert contract(events) == []
    for index, expected in norms.items():
        mine = events.steps["optimizer"] == index
        np.testing.assert_allclose(events.steps["grad_norm"][mine], expected, rtol=1e-5)
    assert np.unique(events.steps["backwards"][events.steps["optimizer"] == 0])[-1] >= 2


def scaled_norm(parameters: Iterable[torch.Tensor], scaler: torch.amp.GradScaler) -> float:
    """The norm of gradients that are still multiplied with the scale."""
    return truth(parameters) / float(scaler.get_scale())


def check_rows(events: Events, optimizer: int, norms: Sequence[float], skipped: Sequence[int]) -> None:
    """One optimizer's rows: true norms of the steps taken, and the attempts that the scaler skipped."""
    mine = events.steps["optimizer"] == optimizer
    taken = (events.steps["flags"][mine].astype(int) & 1) == 0
    assert np.flatnonzero(~taken).tolist() == list(skipped)
    np.testing.assert_allclose(events.steps["grad_norm"][mine][taken], np.array(norms)[taken], rtol=1e-5)
    assert events.steps.step[mine][taken].tolist() == list(range(int(taken.sum())))


@pytest.mark.parametrize("clip", [True, False])
def test_generative_adversarial_training_with_mixed_precision(watch: Watch, read: Read, clip: bool) -> None:
    # https://docs.pytorch.org/docs/stable/notes/amp_examples.html, "Working with Multiple Models, Losses, and
    # Optimizers": one scaler, updated once an iteration; here each loss has a step of its own, as a GAN has.
    generator, discriminator = net(6), net()
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    opt_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    threshold = 0.25 if clip else None
    optimizers = {"discriminator": opt_d, "generator": opt_g}
    run = watch([generator, discriminator], optimizers, max_norm=threshold, config=CONFIG)
    bce = nn.BCEWithLogitsLoss()
    real_label, fake_label = torch.ones(16, 1), torch.zeros(16, 1)
    norms: dict[int, list[float]] = {0: [], 1: []}
    for step in range(40):
        opt_d.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = bce(discriminator(torch.randn(16, 6) + 2).float(), real_label)
        scaler.scale(loss * (math.inf if step in (5, 6) else 1.0)).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fake = generator(torch.randn(16, 6))
            loss = bce(discriminator(fake.detach()).float(), fake_label)
        scaler.scale(loss).backward()
        norms[0].append(scaled_norm(discriminator.parameters(), scaler))
        if clip:
            scaler.unscale_(opt_d)
            torch.nn.utils.clip_grad_norm_(discriminator.parameters(), 0.25)
        scaler.step(opt_d)
        opt_g.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = bce(discriminator(fake).float(), real_label)
        scaler.scale(loss * (math.inf if step == 20 else 1.0)).backward()
        norms[1].append(scaled_norm(generator.parameters(), scaler))
        if clip:
            scaler.unscale_(opt_g)
            torch.nn.utils.clip_grad_norm_(generator.parameters(), 0.25)
        scaler.step(opt_g)
        scaler.update()
        run.log_train(loss=loss)
    events = read(run)
    assert contract(events) == []
    check_rows(events, 0, norms[0], [5, 6])
    check_rows(events, 1, norms[1], [20])
    if clip:
        np.testing.assert_array_equal(events.steps["clip_threshold"], 0.25)


def test_two_losses_two_optimizers_one_scaler(watch: Watch, read: Read) -> None:
    # The same note's own example: both losses through both models, one of the two unscaled to look at its gradients.
    model0, model1 = net(), net()
    optimizer0 = torch.optim.SGD(model0.parameters(), lr=1e-2)
    optimizer1 = torch.optim.SGD(model1.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    run = watch([model0, model1], {"zero": optimizer0, "one": optimizer1}, config=CONFIG)
    norms: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(30):
        optimizer0.zero_grad()
        optimizer1.zero_grad()
        x, y = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output0, output1 = model0(x).float(), model1(x).float()
            loss0 = nn.functional.mse_loss(2 * output0 + 3 * output1, y)
            loss1 = nn.functional.mse_loss(3 * output0 - 5 * output1, y)
        scaler.scale(loss0).backward(retain_graph=True)
        scaler.scale(loss1).backward()
        norms[0].append(scaled_norm(model0.parameters(), scaler))
        norms[1].append(scaled_norm(model1.parameters(), scaler))
        scaler.unscale_(optimizer0)
        scaler.step(optimizer0)
        scaler.step(optimizer1)
        scaler.update()
        run.log_train(loss=loss0)
    events = read(run)
    assert contract(events) == []
    for index in (0, 1):
        check_rows(events, index, norms[index], [])
    np.testing.assert_array_equal(events.steps["backwards"], 2)


def test_gradient_penalty_with_mixed_precision(watch: Watch, read: Read) -> None:
    # The same note, "Working with Scaled Gradients": the penalty's gradients are unscaled by hand, the step's not.
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    run = watch(model, optimizer, max_norm=1.0, config=CONFIG)
    norms = []
    for _ in range(30):
        optimizer.zero_grad()
        x, y = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(model(x).float(), y)
        scaled = torch.autograd.grad(scaler.scale(loss), list(model.parameters()), create_graph=True)
        grads = [g * (1.0 / scaler.get_scale()) for g in scaled]
        loss = loss + 1e-3 * sum(g.pow(2).sum() for g in grads).sqrt()  # type: ignore[union-attr]
        scaler.scale(loss).backward()
        norms.append(scaled_norm(model.parameters(), scaler))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        run.log_train(loss=loss)
    events = read(run)
    assert contract(events) == []
    check_rows(events, 0, norms, [])


def test_actor_critic_with_one_optimizer_and_episodes(watch: Watch, read: Read) -> None:
    # https://github.com/pytorch/examples/tree/main/reinforcement_learning
    body, actor, critic = nn.Linear(6, 24), nn.Linear(24, 3), nn.Linear(24, 1)
    model = nn.ModuleDict({"body": body, "actor": actor, "critic": critic})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    run = watch(model, optimizer, max_norm=0.5, config={"gamma": 0.99, "batch_size": 1})
    for _ in range(30):
        log_probs, values, rewards = [], [], []
        state = torch.randn(6)
        for _ in range(8):
            hidden = torch.relu(body(state))
            choice = torch.distributions.Categorical(logits=actor(hidden))
            action = choice.sample()
            log_probs.append(choice.log_prob(action))
            values.append(critic(hidden))
            rewards.append(float(action == 0))
            state = state + torch.randn(6) * 0.1
        returns, total = [], 0.0
        for reward in reversed(rewards):
            total = reward + 0.99 * total
            returns.insert(0, total)
        gains = torch.tensor(returns)
        advantage = gains - torch.cat(values).detach()
        optimizer.zero_grad()
        loss = -(torch.stack(log_probs) * advantage).sum() + nn.functional.smooth_l1_loss(torch.cat(values), gains)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert contract(read(run)) == []


def test_actor_and_critic_with_an_optimizer_each(watch: Watch, read: Read) -> None:
    actor, critic = net(3), net()
    opt_actor = torch.optim.AdamW(actor.parameters(), lr=1e-3, weight_decay=0.0)
    opt_critic = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.0)
    run = watch([actor, critic], {"actor": opt_actor, "critic": opt_critic}, max_norm=0.5, config=CONFIG)
    for _ in range(30):
        x, y = batch()
        value = critic(x)
        opt_critic.zero_grad()
        nn.functional.mse_loss(value, y).backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
        opt_critic.step()
        choice = torch.distributions.Categorical(logits=actor(x))
        action = choice.sample()
        opt_actor.zero_grad()
        (-(choice.log_prob(action) * (y.squeeze(1) - value.detach().squeeze(1))).mean()).backward()
        torch.nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
        opt_actor.step()
    events = read(run)
    assert contract(events) == []
    assert set(events.steps["optimizer"].tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("shared", [True, False])
def test_actor_and_critic_with_mixed_precision(watch: Watch, read: Read, shared: bool) -> None:
    """One optimizer over a shared body and one loss, or an optimizer, a loss and a clip for each; one scaler."""
    actor, critic = net(3), net()
    each = {"both": [actor, critic]} if shared else {"actor": [actor], "critic": [critic]}
    optimizers = {
        name: torch.optim.AdamW([p for m in models for p in m.parameters()], lr=1e-3, weight_decay=0.0)
        for name, models in each.items()
    }
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    run = watch([actor, critic], optimizers, max_norm=0.5, config=CONFIG)
    norms: dict[str, list[float]] = {name: [] for name in each}
    for step in range(30):
        x, y = batch()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, logits = critic(x).float(), actor(x).float()
            choice = torch.distributions.Categorical(logits=logits)
            action = choice.sample()
            of_critic = nn.functional.mse_loss(value, y)
            of_actor = -(choice.log_prob(action) * (y - value.detach()).squeeze(1)).mean()
        if step == 11:
            of_critic = of_critic * math.inf
        losses = [of_actor + of_critic] if shared else [of_actor, of_critic]
        for loss in losses:
            scaler.scale(loss).backward()
        for name, optimizer in optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms[name].append(scaled_norm(parameters, scaler))
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            scaler.step(optimizer)
        scaler.update()
        run.log_train(loss=of_critic)
    events = read(run)
    assert contract(events) == []
    for index, name in enumerate(optimizers):
        check_rows(events, index, norms[name], [] if name == "actor" else [11])


def test_lbfgs(watch: Watch, read: Read) -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    run = watch(model, optimizer, config=CONFIG)
    x, y = batch()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(25):
        optimizer.step(closure)
    assert contract(read(run)) == []


def test_fine_tuning_with_frozen_then_unfrozen_layers(watch: Watch, read: Read) -> None:
    model = net()
    model[0].requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    run = watch(model, optimizer, max_norm=1.0, config=CONFIG, scheduler=scheduler)
    norms = []
    for step in range(250):
        if step == 220:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        x, y = batch()
        nn.functional.mse_loss(model(x), y).backward()
        norms.append(truth(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    events = read(run)
    assert contract(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)


def test_warmup_and_sequential_schedules(watch: Watch, read: Read) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[5])
    run = watch(model, optimizer, config=CONFIG, scheduler=scheduler)
    rates = []
    for _ in range(30):
        optimizer.zero_grad()
        x, y = batch()
        nn.functional.mse_loss(model(x), y).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    events = read(run)
    assert contract(events) == []
    np.testing.assert_array_equal(events.steps["lr_0"], rates)


def test_compiled_model_and_eager_step(watch: Watch, read: Read) -> None:
    model = net()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    run = watch(compiled, optimizer, max_norm=0.5, config=CONFIG)
    norms = []
    for _ in range(10):
        optimizer.zero_grad()
        x, y = batch()
        nn.functional.mse_loss(compiled(x), y).backward()
        norms.append(truth(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    events = read(run)
    assert contract(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)


def test_optimizer_stepped_in_backward(watch: Watch, read: Read) -> None:
    # https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
    model = net()
    parts = {p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()}
    run = watch(model, {"default": list(parts.values())}, config=CONFIG)

    def step(parameter: torch.Tensor) -> None:
        parts[parameter].step()  # type: ignore[index]
        parts[parameter].zero_grad()  # type: ignore[index]

    norms: list[float] = []
    twin = copy.deepcopy(model)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(210):
        x, y = batch()
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        nn.functional.mse_loss(twin(x), y).backward()
        norms.append(truth(twin.parameters()))
        nn.functional.mse_loss(model(x), y).backward()
    events = read(run)
    assert contract(events) == []
    np.testing.assert_allclose(events.steps["grad_norm_l2"], norms, rtol=1e-5)


def test_many_runs_in_one_process(watch: Watch, read: Read) -> None:
    # Optuna and Ray Tune: a trial after the other, or two at once.
    runs = []
    for trial in range(4):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=10.0 ** -(trial + 1))
        run = watch(model, optimizer, config={**CONFIG, "trial": trial})
        runs.append(run)
        for _ in range(5):
            optimizer.zero_grad()
            x, y = batch()
            nn.functional.mse_loss(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if trial % 2:
            run.finish()
    assert len({run.id for run in runs}) == 4
    for trial, run in enumerate(runs):
        events = read(run)
        assert contract(events) == []
        assert len(events.steps) == 5
        assert events.steps["lr_0"][0] == 10.0 ** -(trial + 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=1e-3, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, fused=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), weight_decay=0.0, foreach=False),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.RAdam(p, lr=1e-3),
        lambda p: torch.optim.NAdam(p, lr=1e-3),
        lambda p: torch.optim.ASGD(p, lr=1e-3),
        lambda p: torch.optim.Rprop(p, lr=1e-3),
    ],
    ids=["SGD", "Adam", "AdamW-foreach", "AdamW-fused", "AdamW-tensor-lr", "Adafactor", "RMSprop", "Adagrad",
         "RAdam", "NAdam", "ASGD", "Rprop"],
)  # fmt: skip
def test_every_optimizer(watch: Watch, read: Read, make: Callable[..., torch.optim.Optimizer]) -> None:
    model = net()
    optimizer = make(model.parameters())
    run = watch(model, optimizer, max_norm=0.3, config=CONFIG)
    norms, ratios = [], []
    for step in range(9):
        optimizer.zero_grad()
        x, y = batch()
        nn.functional.mse_loss(model(x), y).backward()
        norms.append(truth(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        before = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        optimizer.step()
        after = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        if step in (0, 1, 2, 4, 8):
            ratios.append(float((after - before).norm() / before.norm()))
    events = read(run)
    assert [c for c in contract(events) if c != "decay-on-bias-or-norm"] == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(events.steps["lr_0"], float(optimizer.param_groups[0]["lr"]), rtol=1e-6)
    np.testing.assert_allclose(events.samples.values[:, 3], ratios, rtol=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch ships no Muon")
def test_muon_for_matrices_and_adamw_for_the_rest(watch: Watch, read: Read) -> None:
    model = net()
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2, weight_decay=0.0)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-3, weight_decay=0.0)
    run = watch(model, {"muon": muon, "adamw": adamw}, max_norm=1.0, config=CONFIG)
    norms = []
    for _ in range(25):
        model.zero_grad()
        x, y = batch()
        nn.functional.mse_loss(model(x), y).backward()
        norms.append([truth(g["params"]) for o in (muon, adamw) for g in o.param_groups])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
    events = read(run)
    assert contract(events) == []
    for index in (0, 1):
        mine = events.steps["optimizer"] == index
        np.testing.assert_allclose(events.steps["grad_norm_l2"][mine], np.array(norms)[:, index], rtol=1e-5)
        # One clip of both: the norm is each optimizer's own, the coefficient the one that both got.
        np.testing.assert_allclose(events.steps["grad_norm"][mine], np.array(norms)[:, index], rtol=1e-5)
        factor = np.minimum(1.0, 1.0 / (np.hypot(*np.array(norms).T) + 1e-6))
        np.testing.assert_allclose(events.steps["clip_coefficient"][mine], factor, rtol=1e-5)


def test_tied_weights_count_once(watch: Watch, read: Read) -> None:
    embedding = nn.Embedding(11, 8)
    head = nn.Linear(8, 11, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, optimizer, config=CONFIG)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        tokens = torch.randint(0, 11, (4, 3))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        norms.append(truth(model.parameters()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    events = read(run)
    assert events.tensors.values.shape == (5, 1)
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)


def test_sparse_gradients(watch: Watch, read: Read) -> None:
    embedding = nn.Embedding(50, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(list(embedding.parameters()), lr=1e-2)
    run = watch(embedding, optimizer, config=CONFIG)
    norms = []
    for _ in range(5):
        optimizer.zero_grad()
        embedding(torch.randint(0, 50, (16,))).square().sum().backward()
        assert embedding.weight.grad is not None
        norms.append(float(embedding.weight.grad.coalesce().values().double().norm()))
        optimizer.step()
    events = read(run)
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
