"""Training loops as torch's own documentation and its users write them: true norms, and not one finding.

Each recipe is the usual loop; beside it stand the norms that a flat float64
vector gives for the gradients that the optimizer used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

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
