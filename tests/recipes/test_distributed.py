"""Several processes, no collective of ours: each rank writes what it holds, and the whole comes out true.

Real process groups (gloo) under torchrun, two and four of them; the reference
is one process that trains on the whole batch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.collect.combine import GlobalNorms
from gradwatch.journal import Events, JournalReader, find_attempts
from gradwatch.journal.manifest import Manifest
from tests.recipes import distributed_worker as worker

STEPS = 5


def launch(tmp_path: Path, mode: str, world: int, *more: str) -> dict[int, tuple[Manifest, Events]]:
    """Run the worker under torchrun and read every rank's journal."""
    root = tmp_path / "journals"
    environment = {
        **os.environ,
        "GRADWATCH_DIR": str(root),
        "GRADWATCH_RUN": "job",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(world), worker.__file__, mode, str(STEPS), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    journals = {}
    for place in find_attempts(root):
        reader = JournalReader(place.path)
        journals[place.rank] = (reader.manifest, reader.poll())
        reader.close()
    return journals


def reference() -> tuple[list[float], list[list[float]]]:
    """Norms of the whole batch in one process: global, and of each tensor."""
    net = worker.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    whole, each = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = worker.batch(step)
        nn.functional.mse_loss(net(x), y).backward()
        grads = [p.grad.double() for p in net.parameters() if p.grad is not None]
        each.append([float(g.norm()) for g in grads])
        whole.append(float(np.linalg.norm(each[-1])))
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    return whole, each


@pytest.mark.parametrize("world", [2, 4])
def test_ddp(tmp_path: Path, world: int) -> None:
    journals = launch(tmp_path, "ddp", world)
    assert sorted(journals) == list(range(world))
    whole, each = reference()
    for manifest, events in journals.values():
        assert (manifest.run, manifest.world_size) == ("job", world)
        np.testing.assert_allclose(events.steps["grad_norm"], whole, rtol=1e-5)
        np.testing.assert_allclose(events.tensors.values, each, rtol=1e-5)
        np.testing.assert_array_equal(events.steps["backwards"], 1)
        assert [e["code"] for e in events.events if e["kind"] == "finding"] == []


@pytest.mark.parametrize(("mode", "world"), [("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_sharded_norms_combine_to_the_norm_of_one_process(tmp_path: Path, mode: str, world: int) -> None:
    journals = launch(tmp_path, mode, world)
    assert sorted(journals) == list(range(world))
    whole, _ = reference()
    norms = GlobalNorms(world)
    for rank, (manifest, events) in sorted(journals.items()):
        assert [e["code"] for e in events.events if e["kind"] == "finding"] == []
        assert any(t.placement for t in manifest.tensors)
        norms.join(rank, manifest)
        norms.add(rank, events.tensors)
        partial = norms.norm(int(events.steps.sequence[0]))
        assert partial is None or rank == max(journals), "a number before every rank was read"
    combined = [norms.norm(int(row)) for row in journals[0][1].steps.sequence]
    np.testing.assert_allclose(np.array(combined, dtype=float), whole, rtol=1e-5)
    for _, events in journals.values():
        assert np.isnan(events.steps["grad_norm"]).all(), "a rank's own number is of its shards and not the norm"


def test_nothing_waits_for_ranks_that_are_not_watched(tmp_path: Path) -> None:
    journals = launch(tmp_path, "fsdp2", 2, "first")
    assert sorted(journals) == [0]
    manifest, events = journals[0]
    assert len(events.steps) == STEPS
    norms = GlobalNorms(2)
    norms.join(0, manifest)
    norms.add(0, events.tensors)
    assert norms.norm(1) is None


def test_ranks_that_disagree_write_what_each_used(tmp_path: Path) -> None:
    journals = launch(tmp_path, "local-norm", 2)
    first, second = (journals[rank][1].steps["grad_norm"] for rank in (0, 1))
    np.testing.assert_allclose(second[0], 2 * first[0], rtol=1e-4)
