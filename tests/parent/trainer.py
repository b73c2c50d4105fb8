"""A real training, small and quick, that ends the way it is told: ``python -m tests.parent.trainer HOW [STEPS]``."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import torch

import gradwatch


def main(how: str, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = gradwatch.watch(model, optimizer, model_name="tiny")

    def train() -> None:
        for _ in range(steps):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.log_train(loss=loss)

    if how == "raise-in-with":
        with run:
            train()
            raise RuntimeError("the data ran out")
    train()
    print(f"trained {os.getpid()}", flush=True)
    if os.environ.get("HOLD_BEFORE_THE_END"):
        sys.stdin.readline()
    if how == "raise":
        raise RuntimeError("the data ran out")
    if how == "exit-3":
        sys.exit(3)
    if how == "system-exit-3":
        raise SystemExit(3)
    if how == "os-exit-3":
        os._exit(3)
    if how == "os-exit-137":
        os._exit(137)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "unfinished":
        return
    if how == "wait":
        time.sleep(120)
        os._exit(99)
    run.finish()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 30)
