"""Real small trainings: healthy ones that raise no ticket, and planted faults that are told by their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradwatch
from gradwatch.detect.replay import replay

CLASSES, FEATURES, SAMPLES = 5, 12, 6_000
Rate = Callable[[int], float]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def data(count: int = SAMPLES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and labels of a noisy teacher, for training and for validation."""
    generator = torch.Generator().manual_seed(7)
    hidden, out = (torch.randn(shape, generator=generator) for shape in ((FEATURES, 24), (24, CLASSES)))
    inputs = torch.randn(SAMPLES + 1_000, FEATURES, generator=generator)
    logits = torch.tanh(inputs @ hidden / math.sqrt(FEATURES)) @ out
    labels = (logits + torch.randn(logits.shape, generator=generator)).argmax(1)
    return inputs[:count], labels[:count], inputs[SAMPLES:], labels[SAMPLES:]


def classify(
    root: Path,
    *,
    steps: int = 900,
    batch: int = 64,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
    lr: float = 0.1,
    rate: Rate = lambda step: 1.0,
    count: int = SAMPLES,
    change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda step, x, y: (x, y),
    **arguments: Any,
) -> set[tuple[str, str]]:
    """Train a classifier; (code, severity) of what is found that is not about how it is set up."""
    inputs, labels, held_out, truth = data(count)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    chosen = optimizer(model.parameters(), lr=lr)  # type: ignore[call-arg]
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, rate)
    with gradwatch.watch(model, chosen, root=root, config={"batch_size": batch}, **arguments) as run:
        for step in range(steps):
            index = torch.randint(0, count, (batch,))
            x, y = change(step, inputs[index], labels[index])
            loss = F.cross_entropy(model(x), y)
            chosen.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            chosen.step()
            schedule.step()
            run.log_train(loss=loss)
            if step % 100 == 99:
                with torch.no_grad():
                    run.log_validation(loss=F.cross_entropy(model(held_out), truth))
    return told(root)


def told(root: Path) -> set[tuple[str, str]]:
    return {(f.code, f.severity) for f in replay(root) if f.severity != "info" and not f.code.startswith("decay")}


def warmup(step: int) -> float:
    return min(1.0, (step + 1) / 200)


def restarts(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (step % 300) / 300))


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": 0.2},
        {"rate": warmup, "optimizer": torch.optim.AdamW, "lr": 3e-3},
        {"rate": restarts, "lr": 0.3},
        {"batch": 1, "lr": 3e-3, "steps": 2_000},
    ],
    ids=["sgd", "warmup", "restarts", "one-sample"],
)
def test_healthy_classifiers_raise_no_ticket(tmp_path: Path, arguments: dict[str, Any]) -> None:
    assert classify(tmp_path, **arguments) == set()


def test_a_healthy_gan_raises_no_ticket(tmp_path: Path) -> None:
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    makes, judges = (torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.9)) for m in (generator, critic))
    with gradwatch.watch([generator, critic], {"generator": makes, "critic": judges}, root=tmp_path) as run:
        for _ in range(700):
            angle = 6.28 * torch.rand(64)
            real, fake = torch.stack([angle.cos(), angle.sin()], 1), generator(torch.randn(64, 4))
            loss = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
            judges.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            judges.step()
            run.log_train(loss=loss)
            loss = F.softplus(-critic(fake)).mean()
            makes.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            makes.step()
            run.log_train(loss=loss)
    assert told(tmp_path) == set()


def test_a_healthy_policy_gradient_raises_no_ticket(tmp_path: Path) -> None:
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer, value, baseline = torch.optim.Adam(policy.parameters(), 1e-2), torch.randn(4, 4), 0.0
    with gradwatch.watch(policy, optimizer, root=tmp_path, clip_rate_budget=0.9) as run:
        for step in range(800):
            state = torch.randn(16, 4)
            choice = torch.distributions.Categorical(logits=policy(state))
            action = choice.sample()  # type: ignore[no-untyped-call]
            reward = (state @ value).gather(1, action[:, None]).squeeze(1)
            loss = -(choice.log_prob(action) * (reward - baseline)).mean()  # type: ignore[no-untyped-call]
            baseline = 0.95 * baseline + 0.05 * float(reward.mean())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            run.log_train(loss=loss)
            if step % 100 == 99:
                run.log_validation(reward=reward.mean())
    assert told(tmp_path) == set()


# -- planted


def corrupt(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Ten batches of large inputs and labels of nothing."""
    return (30 * inputs, labels[torch.randperm(len(labels))]) if 600 <= step < 610 else (inputs, labels)


def shuffled(step: int, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, labels[torch.randperm(len(labels))] if step >= 500 else labels


@pytest.mark.parametrize("factor", [30, 300])
@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.2), (torch.optim.Adam, 3e-3)])
def test_a_rate_too_high_from_the_start(tmp_path: Path, optimizer: Any, lr: float, factor: float) -> None:
    assert ("learning-rate-too-high", "ticket") in classify(tmp_path, optimizer=optimizer, lr=lr * factor, steps=400)


def test_a_rate_that_jumps_too_high(tmp_path: Path) -> None:
    found = classify(tmp_path, lr=0.1, rate=lambda step: 1.0 if step < 500 else 30.0)
    assert ("learning-rate-too-high", "ticket") in found


def test_corrupt_batches(tmp_path: Path) -> None:
    found = classify(tmp_path, change=corrupt)
    assert found >= {("loss-spike", "ticket"), ("gradient-spike", "ticket")}


def test_labels_that_are_shuffled_from_some_step_on(tmp_path: Path) -> None:
    assert ("loss-diverging", "ticket") in classify(tmp_path, change=shuffled, lr=0.2)


def test_few_samples_overfit(tmp_path: Path) -> None:
    found = classify(tmp_path, count=100, optimizer=torch.optim.Adam, lr=3e-3, steps=1_500)
    assert found == {("overfitting", "ticket")}


def test_a_rate_that_moves_nothing(tmp_path: Path) -> None:
    assert classify(tmp_path, lr=1e-8) == {("loss-not-decreasing", "ticket")}
