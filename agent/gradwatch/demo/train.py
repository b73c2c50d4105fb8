"""The training of the demo: ``python -m gradwatch.demo.train --steps 1200``.

Ordinary PyTorch. What gradwatch needs of it are ``watch`` in front of the loop, two ``log_`` lines and the
``with``; everything else, the clip among it, stands as it would without.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np
import torch

import gradwatch
from gradwatch.demo.data import batches, collate, make_customers
from gradwatch.demo.model import ChurnLSTM, area_under_curve, predict

CUSTOMERS = 6_000
BATCH_SIZE = 64
LEARNING_RATE = 3e-4
MAX_NORM = 1.0

log = logging.getLogger("demo")


def corrupt_steps(steps: int) -> list[int]:
    """The steps, counted from 0, whose batch is corrupt: four, in the later two thirds of the run."""
    return [int(steps * share) for share in (0.40, 0.55, 0.70, 0.85)]


def train(steps: int, seed: int = 0) -> None:
    """Train the classifier for ``steps`` optimizer steps, watched."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # a model this small gains nothing from more, and the agent wants a core too
    training, held_out = make_customers(CUSTOMERS, seed).split(CUSTOMERS * 5 // 6)
    validation = collate(held_out, np.arange(len(held_out)))
    model = ChurnLSTM()
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    criterion = torch.nn.BCEWithLogitsLoss()
    corrupt = set(corrupt_steps(steps))
    config = {"batch_size": BATCH_SIZE, "customers": CUSTOMERS, "seed": seed, "steps": steps}

    with gradwatch.watch(
        model,
        optimizer,
        model_name="churn-lstm",
        max_norm=MAX_NORM,
        config=config,
        clip_rate_budget=0.5,
    ) as run:
        for step, batch in zip(range(steps), batches(training, BATCH_SIZE, seed), strict=False):
            if step in corrupt:
                batch = batch.corrupted()
                log.info("step %d: corrupt batch", step)
            loss = criterion(model(batch.events, batch.lengths), batch.left)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            run.log_train(loss=loss, samples=BATCH_SIZE)

            if (step + 1) % max(1, min(100, steps // 4)) == 0:
                logits = predict(model, validation.events, validation.lengths)
                loss_value = criterion(logits, validation.left).item()
                auc = area_under_curve(logits.double().numpy(), validation.left.double().numpy())
                run.log_validation(loss=loss_value, auc=auc)
                log.info("step %d: validation loss %.4f, AUC %.3f", step, loss_value, auc)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
