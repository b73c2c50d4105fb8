"""One rank of a small distributed training; started by ``torchrun`` from ``test_distributed.py``.

    distributed_worker.py MODE STEPS [WATCHERS [FATE]]

MODE: ddp, no-sync (DDP that accumulates two halves of its batch), fsdp2 (one
mesh dimension), hsdp (two: replicate × shard), own-norm (fsdp2 whose loop
gathers the norm by itself and clips by it), local-norm (DDP whose loop clips by
a norm of its own rank). WATCHERS: all, first (only rank 0 is
watched), last (only the last rank), or late (ranks but the first are watched
from step 2 on). FATE: dies (the last rank, killed in front of its third step).
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gradwatch

BATCH = 24


def model() -> nn.Sequential:
    torch.manual_seed(0)
    # 7 and 13 divide by neither 2 nor 4: shards are uneven, and the bias of one row leaves ranks empty-handed.
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator) * (1 + step)
    return x, x.sum(1, keepdim=True)


def wrap(net: nn.Sequential, mode: str) -> nn.Module:
    if mode in ("ddp", "no-sync", "local-norm"):
        return nn.parallel.DistributedDataParallel(net)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    if mode == "hsdp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def main() -> None:
    mode, steps = sys.argv[1], int(sys.argv[2])
    watchers, fate = [*sys.argv[3:], "all", ""][:2] if len(sys.argv) < 5 else sys.argv[3:5]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    net = wrap(model(), mode)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    run = None
    begins = {"all": 0, "first": 0 if rank == 0 else steps, "last": 0 if rank == world - 1 else steps}
    begin = begins.get(watchers, 0 if rank == 0 else 2)
    for step in range(steps):
        if step == begin:
            run = gradwatch.watch(net, optimizer, max_norm=0.5, config={"batch_size": BATCH}, model_name="distributed")
            assert run.failures == 0, run.last_failure
        optimizer.zero_grad()
        x, y = (part.chunk(world)[rank] for part in batch(step))
        if isinstance(net, nn.parallel.DistributedDataParallel) and mode == "no-sync":
            (x, first), (y, second) = x.chunk(2), y.chunk(2)
            with net.no_sync():
                (nn.functional.mse_loss(net(x), y) / 2).backward()
            x, y = first, second
        loss = nn.functional.mse_loss(net(x), y)
        (loss / 2 if mode == "no-sync" else loss).backward()
        if mode == "local-norm":
            for p in net.parameters():  # what a forgotten all-reduce leaves: gradients of this rank's data
                assert p.grad is not None
                p.grad.mul_(1 + rank)
        if mode == "own-norm":
            total: Any = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
            torch.nn.utils.clip_grads_with_norm_(net.parameters(), 0.5, total.full_tensor())
        else:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        if fate == "dies" and step == 2 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        if run is not None:
            run.log_train(loss=loss, samples=len(x))
    if run is not None:
        run.finish()
        assert run.failures == 0, run.last_failure
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print("done", os.environ["GRADWATCH_DIR"])


if __name__ == "__main__":
    main()
