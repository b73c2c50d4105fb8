"""``torch.compile`` beside gradwatch: the same numbers, the same graphs, and said where a compiled step is not seen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import gradwatch
from gradwatch.journal import Events
from tests.integrations.truth import codes, norm

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]
CONFIG = {"batch_size": 8}
STEPS = 6


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) * (1 + step)


def graphs() -> tuple[int, int]:
    """Graphs compiled and graph breaks since the last call."""
    found = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    counters.clear()
    torch.compiler.reset()
    return found


def train(model: nn.Module, forward: Any, step: Any, clip: Any = nn.utils.clip_grad_norm_) -> list[float]:
    norms = []
    for number in range(STEPS):
        model.zero_grad()
        forward(batch(number)).square().mean().backward()
        norms.append(norm(model.parameters()))
        clip(model.parameters(), 0.5)
        step()
    return norms


def values(events: Events) -> dict[str, object]:
    return {k: v for e in events.events if e["kind"] == "metadata" for k, v in e["values"].items()}


def test_a_compiled_model_is_seen_whole_and_compiles_to_the_same(watch: Watch, read: Read) -> None:
    bare, model = net(), net()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    train(bare, torch.compile(bare, backend="aot_eager"), optimizer.step)
    unwatched = graphs()

    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(compiled, optimizer, max_norm=0.5, config=CONFIG)
    norms = train(model, compiled, optimizer.step)
    events = read(run)
    assert graphs() == unwatched
    assert unwatched[0] >= 1
    assert codes(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
    assert [n for n in values(events) if n.startswith("unchecked")] == []
    for mine, theirs in zip(model.parameters(), bare.parameters()):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_has_the_same_numbers_and_graphs_and_is_said_not_to_be_seen(
    watch: Watch, read: Read, backend: str
) -> None:
    bare, model = net(), net()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.1, weight_decay=0.0)
    train(bare, bare, torch.compile(optimizer.step, backend=backend))
    unwatched = graphs()

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    run = watch(model, optimizer, max_norm=0.5, config=CONFIG)
    train(model, model, torch.compile(optimizer.step, backend=backend))
    events = read(run)
    assert graphs() == unwatched
    assert unwatched[0] >= 1
    for mine, theirs in zip(model.parameters(), bare.parameters()):
        assert torch.equal(mine, theirs)
    assert len(events.steps) == 0
    assert codes(events) == []
    assert "compiled" in str(values(events)["unchecked.steps.default"])


def test_a_step_that_turns_to_eager_is_seen_from_there(watch: Watch, read: Read) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, optimizer, config=CONFIG)
    train(model, model, torch.compile(optimizer.step, backend="eager"))
    norms = train(model, model, optimizer.step)
    events = read(run)
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
    assert codes(events) == []


def test_an_uncompiled_step_beside_one_that_is_compiled(watch: Watch, read: Read) -> None:
    model, other = net(), net()
    seen = torch.optim.SGD(model.parameters(), lr=0.1)
    blind = torch.optim.SGD(other.parameters(), lr=0.1)
    run = watch([model, other], {"seen": seen, "blind": blind}, config=CONFIG)
    step = torch.compile(blind.step, backend="eager")
    norms = train(model, model, seen.step)
    train(other, other, step)
    events = read(run)
    assert [n for n in values(events) if n.startswith("unchecked")] == ["unchecked.steps.blind"]
    np.testing.assert_allclose(events.steps["grad_norm_l2"], norms, rtol=1e-5)


def test_a_whole_training_step_under_one_compile_keeps_its_numbers(watch: Watch, read: Read) -> None:
    bare = net()
    model = copy.deepcopy(bare)

    def made(module: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[torch.Tensor], None]:
        @torch.compile(backend="eager")
        def step(x: torch.Tensor) -> None:
            module(x).square().mean().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

        return step

    step = made(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    for number in range(STEPS):
        step(batch(number))
    unwatched = graphs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = watch(model, optimizer, config=CONFIG)
    step = made(model, optimizer)
    for number in range(STEPS):
        step(batch(number))
    events = read(run)
    assert graphs()[1] <= unwatched[1]
    for mine, theirs in zip(model.parameters(), bare.parameters()):
        torch.testing.assert_close(mine, theirs)
    assert codes(events) == []
