"""One rank of a small training by a framework; started by torchrun from ``test_two_ranks.py``.

    distributed_worker.py FRAMEWORK DIRECTORY

FRAMEWORK: transformers or accelerate. Each rank writes the norms that it saw
itself, as a flat float64 vector has them, to DIRECTORY/rank<k>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gradwatch


def transformers(directory: Path) -> tuple[list[float], int]:
    """Transformers' Trainer with accumulation and its own clip."""
    from gradwatch.integrations.transformers import GradwatchCallback
    from tests.integrations.test_transformers import trainer

    callback = GradwatchCallback()
    training = trainer(
        directory,
        callback,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_strategy="no",
        ddp_backend="gloo",
        eval_strategy="steps",
        eval_steps=2,
    )
    training.train()
    assert callback.run is not None
    return training.norms[1::2], callback.run.failures


def accelerate(directory: Path) -> tuple[list[float], int]:
    """Accelerate's documented loop with accumulation and its clip."""
    from accelerate import Accelerator

    from tests.integrations.test_accelerate import CONFIG, prepared, train

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, data, scheduler = prepared(accelerator)
    run = gradwatch.watch(model, optimizer, max_norm=0.5, config=CONFIG, scheduler=scheduler)
    norms: Any = train(accelerator, model, optimizer, data, scheduler, True)
    run.finish()
    return norms, run.failures


def main() -> None:
    framework, directory = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    norms, failures = {"transformers": transformers, "accelerate": accelerate}[framework](directory)
    assert failures == 0
    (directory / f"rank{os.environ['RANK']}.json").write_text(json.dumps(norms))
    # Neither ends the process group, whose threads would race with the interpreter's end.
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
