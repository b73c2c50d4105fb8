"""One rank of a training by FSDP1 with its own scaler and its own clip; started by torchrun from ``test_fsdp1.py``.

    fsdp1_worker.py flat|original STEPS

flat: the optimizer holds flat parameters; original: it holds views into them,
some of which are empty on a rank. The loss of one step is infinite on the last
rank alone: ShardedGradScaler makes all ranks skip it.
"""

from __future__ import annotations

import math
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import gradwatch
from tests.recipes.distributed_worker import BATCH, batch, model

SKIPPED = 2
THRESHOLD = 0.5


def main() -> None:
    kind, steps = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    net = FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=kind == "original")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    scaler = ShardedGradScaler("cpu", init_scale=2.0**6, growth_interval=100)
    run = gradwatch.watch(net, optimizer, max_norm=THRESHOLD, config={"batch_size": BATCH}, model_name="fsdp1")
    for step in range(steps):
        optimizer.zero_grad()
        x, y = (part.chunk(world)[rank] for part in batch(step))
        loss = nn.functional.mse_loss(net(x), y)
        if step == SKIPPED and rank == world - 1:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        total = net.clip_grad_norm_(THRESHOLD)
        run.log_clip(total, THRESHOLD)
        scaler.step(optimizer)
        scaler.update()
        run.log_train(loss=loss, samples=len(x))
    run.finish()
    assert run.failures == 0, run.last_failure
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
