"""What watching costs on the training thread.

Two measurements, both as paired differences: blocks of steps, bare and
watched, alternate, and the median of each pair's difference is reported with
its quartiles, so that a machine that slows down slows both.

* micro: the clip and the optimizer step alone, gradients fixed;
* loop: a whole training step, forward and backward included.

    python benchmarks/bench_probe.py [--pairs 30] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import gradwatch
from gradwatch.probe import seam
from gradwatch.probe.sampling import is_sampled

Step = Callable[[], None]


def mlp(dtypes: tuple[torch.dtype, ...] = (torch.float32,), width: int = 32) -> nn.Sequential:
    layers = [nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)]
    model = nn.Sequential(*layers)
    for index, layer in enumerate(m for m in model if isinstance(m, nn.Linear)):
        layer.to(dtypes[index % len(dtypes)])
    return model


def transformer() -> nn.Module:
    """Eight layers, 99 tensors, 1.6 million parameters."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    return nn.Sequential(
        nn.TransformerEncoder(layer, 8, enable_nested_tensor=False), nn.LayerNorm(128), nn.Linear(128, 1)
    )


def many_tensors() -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(2000)])


def fixed(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """The clip and the step, with gradients that are there already."""
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def whole(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> Step:
    parameters = list(model.parameters())

    def step() -> None:
        loss = model(x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def block(step: Step, count: int) -> float:
    """Median time of a step in microseconds."""
    times = []
    for _ in range(count):
        began = perf_counter()
        step()
        times.append(perf_counter() - began)
    return statistics.median(times) * 1e6


def compare(
    name: str, model: nn.Module, step_of: Callable[[torch.optim.Optimizer], Step], pairs: int, count: int
) -> dict[str, Any]:
    """Alternate bare and watched blocks of the same model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = step_of(optimizer)
    block(step, count)
    bare, added = [], []
    for _ in range(pairs):
        before = block(step, count)
        run = gradwatch.watch(model, optimizer, max_norm=1.0, model_name="bench", initial_step=0)
        block(step, max(70, count // 4))  # behind the first, dense samples
        watched = block(step, count)
        run.finish()
        assert run.last_failure == "", run.last_failure
        after = block(step, count)
        bare.append((before + after) / 2)
        added.append(watched - bare[-1])
    low, middle, high = statistics.quantiles(added, n=4)
    result = {
        "case": name,
        "tensors": sum(1 for _ in model.parameters()),
        "bare_us": statistics.median(bare),
        "added_us": middle,
        "quartiles_us": [low, high],
        "ratio": middle / statistics.median(bare),
    }
    print(
        f"{name:32} {result['tensors']:>6} {result['bare_us']:>11.1f} {middle:>+9.1f}  "
        f"[{low:+.1f}, {high:+.1f}]  {100 * result['ratio']:+6.2f} %",
        flush=True,
    )
    return result


def parts(steps: int) -> dict[str, float]:
    """Median time in µs of each part of the probe, called between the operations of a real step.

    A second optimizer's clip and steps run in between, so that caches are as
    full of other things as in a training loop.
    """
    model, other = mlp(), mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    busy = fixed(other, torch.optim.AdamW(other.parameters(), lr=1e-4))
    fixed(model, optimizer)
    run = gradwatch.watch(model, optimizer, max_norm=1.0, model_name="bench", initial_step=101)
    session = run._session
    assert session is not None
    probe = session.probes[0]
    parameters = list(model.parameters())
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    total = torch.linalg.vector_norm(norms)
    event = seam.ClipEvent(parameters, grads, 1.0, total, seam.NormEvent(grads, norms, total, 2.0))

    def clip() -> None:
        session.on_norm(event.norm)
        session.on_clip(event)

    calls: dict[str, Step] = {
        "clip seen": clip,
        "before the step": lambda: probe._before(optimizer, (optimizer,), {}),
        "after the step, row written": lambda: probe._after(optimizer, (optimizer,), {}),
        "log_train": lambda: run.log_train(loss=0.5),
    }
    times: dict[str, list[float]] = {name: [] for name in [*calls, "a sampled step, all in all"]}
    for _ in range(steps):
        took = 0.0
        sampled = is_sampled(probe.taken)
        for name, call in calls.items():
            busy()
            began = perf_counter()
            call()
            seconds = perf_counter() - began
            took += seconds
            if not sampled:
                times[name].append(seconds)
        if sampled:
            times["a sampled step, all in all"].append(took)
    run.finish()
    assert run.last_failure == "", run.last_failure
    medians = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"part: {name:34} {median:8.1f} µs")
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="pairs of blocks (default 20)")
    parser.add_argument("--json", type=Path, help="write the results to FILE")
    options = parser.parse_args()
    os.environ["GRADWATCH_AGENT"] = "0"
    os.environ.pop("GRADWATCH_DIR", None)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    print(f"{'case':32} {'tensors':>6} {'bare µs':>11} {'added µs':>9}  quartiles  of the step")
    results = []
    with tempfile.TemporaryDirectory() as root:
        os.environ["GRADWATCH_DIR"] = root
        model: nn.Module = mlp()
        results.append(compare("micro: MLP", model, lambda o, m=model: fixed(m, o), options.pairs, 300))
        model = mlp((torch.float32, torch.bfloat16))
        results.append(
            compare("micro: MLP, float32 and bfloat16", model, lambda o, m=model: fixed(m, o), options.pairs, 300)
        )
        model = many_tensors()
        results.append(compare("micro: 2,000 tensors", model, lambda o, m=model: fixed(m, o), options.pairs, 20))
        model = mlp()
        results.append(
            compare("loop: MLP, batch 1", model, lambda o, m=model: whole(m, o, torch.randn(1, 8)), options.pairs, 300)
        )
        model = transformer()
        results.append(
            compare(
                "loop: transformer, 8 × 64",
                model,
                lambda o, m=model: whole(m, o, torch.randn(8, 64, 128)),
                max(4, options.pairs // 4),
                10,
            )
        )
        shares = parts(100 * options.pairs)
    if options.json:
        options.json.write_text(json.dumps({"cases": results, "parts_us": shares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
