"""Accelerate needs no callback: the seam and the unwrapped optimizer see it, in its own loops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch.journal import Events
from tests.integrations.truth import codes, norm

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]
CONFIG = {"batch_size": 8}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the process; each test has one of its own."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepared(accelerator: Accelerator, batches: int = 12) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    x = torch.randn(8 * batches, 6)
    data = DataLoader(TensorDataset(x, x[:, :1] * 3 - x[:, 1:2]), batch_size=8)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=50)
    return accelerator.prepare(model, optimizer, data, scheduler)  # type: ignore[no-any-return]


def train(accelerator: Accelerator, model: Any, optimizer: Any, data: Any, scheduler: Any, clip: bool) -> Any:
    """Accelerate's documented loop; the norms of what each step used, before the clip."""
    norms: list[float] = []
    for x, y in data:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x).float(), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                scaler = accelerator.scaler
                scale = 1.0 if scaler is None else float(scaler.get_scale())
                norms.append(norm(model.parameters()) / scale)
                if clip:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return norms


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("precision", "accumulate"), [("no", 1), ("no", 4), ("bf16", 1), ("bf16", 2)])
def test_the_documented_loop(watch: Watch, read: Read, precision: str, accumulate: int, clip: bool) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    model, optimizer, data, scheduler = prepared(accelerator)
    assert not hasattr(optimizer, "_optimizer_step_pre_hooks"), "the wrapper has hooks: nothing needs unwrapping"
    run = watch(model, optimizer, max_norm=0.5 if clip else None, config=CONFIG, scheduler=scheduler)
    norms = train(accelerator, model, optimizer, data, scheduler, clip)
    events = read(run)
    assert codes(events) == []
    assert len(events.steps) == 12 // accumulate
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
    np.testing.assert_array_equal(events.steps["backwards"], accumulate)
    np.testing.assert_array_equal(events.steps["clip_threshold"], 0.5 if clip else np.nan)


@pytest.mark.parametrize("clip", [True, False])
def test_a_scaler_and_its_skipped_steps(watch: Watch, read: Read, clip: bool) -> None:
    # Accelerate makes a scaler on accelerators only; a CPU one in its place goes the same way, and unscales
    # before the clip where Accelerate takes the training for fp16.
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-20, growth_interval=99)
    model, optimizer, data, scheduler = prepared(accelerator)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    run = watch(model, optimizer, max_norm=0.5 if clip else None, config=CONFIG)
    norms = np.array(train(accelerator, model, optimizer, data, scheduler, clip))
    events = read(run)
    assert codes(events) == []
    skipped = np.array([int(flags) & 1 for flags in events.steps["flags"]], dtype=bool)
    assert 1 <= skipped.sum() <= 6
    assert len(events.steps) == 12
    np.testing.assert_allclose(events.steps["grad_norm"][~skipped], norms[~skipped], rtol=1e-5)
    np.testing.assert_array_equal(events.steps.step[~skipped], range((~skipped).sum()))


def test_a_clip_in_each_micro_batch_is_found(watch: Watch, read: Read) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, data, _ = prepared(accelerator)
    run = watch(model, optimizer, config=CONFIG)
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
    assert set(codes(read(run))) == {"clip-each-microbatch"}


def test_runs_in_several_threads_at_once(watch: Watch, read: Read) -> None:
    """Ray Tune and Optuna (``n_jobs``): trials of one process side by side, each its own clips."""
    trials = 3
    ready = threading.Barrier(trials)
    results: list[tuple[gradwatch.Run, list[float], float]] = []
    failures: list[BaseException] = []

    def trial(number: int) -> None:
        try:
            generator = torch.Generator().manual_seed(number)
            model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            threshold = 0.1 * (1 + number)
            ready.wait(30)
            run = watch(model, optimizer, max_norm=threshold, model_name=f"trial-{number}", config=CONFIG)
            norms = []
            for _ in range(60):
                x = torch.randn(8, 6, generator=generator) * (1 + number)
                optimizer.zero_grad()
                model(x).square().mean().backward()
                norms.append(norm(model.parameters()))
                nn.utils.clip_grad_norm_(model.parameters(), threshold)
                optimizer.step()
            results.append((run, norms, threshold))
            run.finish()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=trial, args=(number,)) for number in range(trials)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert len({run.id for run, _, _ in results}) == trials
    for run, norms, threshold in results:
        events = read(run)
        assert codes(events) == []
        np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-5)
        np.testing.assert_array_equal(events.steps["clip_threshold"], threshold)
