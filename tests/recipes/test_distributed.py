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

from gradwatch.agent.service import Agent, Settings
from gradwatch.agent.store import Store
from gradwatch.collect.combine import GlobalNorms
from gradwatch.journal import Events, JournalReader, find_attempts
from gradwatch.journal.manifest import Manifest
from tests.recipes import distributed_worker as worker
from tests.services import eventually

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
        assert any("clip-before-backward" in entry["check"] for entry in manifest.unchecked)
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


def serve(root: Path) -> dict[str, float]:
    """What an agent that comes behind the job shows of it: series (name and labels) and values."""
    agent = Agent(Settings(root), Store(root / ".agent"))
    eventually(lambda: not agent.tick() and agent.runs and all(r.over for r in agent.runs.values()), "the end")
    text = agent.exposition.render()[0].decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_the_agent_shows_the_global_norm_once_and_each_rank_beside_it(tmp_path: Path) -> None:
    launch(tmp_path, "hsdp", 4)
    whole, _ = reference()
    series = serve(tmp_path / "journals")
    norms = {name: value for name, value in series.items() if name.startswith("gradwatch_grad_norm{")}
    assert list(norms.values()) == [pytest.approx(whole[-1], rel=1e-5)]
    (coefficient,) = (v for n, v in series.items() if n.startswith("gradwatch_clip_coefficient{"))
    assert coefficient == pytest.approx(min(1.0, 0.5 / (whole[-1] + 1e-6)), rel=1e-5)
    (clipped,) = (v for n, v in series.items() if n.startswith("gradwatch_clipped_steps_total{"))
    assert clipped == sum(norm > 0.5 for norm in whole)
    local = [value for name, value in series.items() if name.startswith("gradwatch_rank_grad_norm_local{")]
    assert len(local) == 4
    # Two replicas of two shards: the shards' squares add up to the whole, twice.
    assert np.sqrt(sum(np.square(local)) / 2) == pytest.approx(whole[-1], rel=1e-5)
    findings = [n for n, v in series.items() if n.startswith("gradwatch_finding_active{") and v == 1]
    assert findings == []


def test_a_missing_rank_gives_no_norm(tmp_path: Path) -> None:
    launch(tmp_path, "fsdp2", 2, "first")
    series = serve(tmp_path / "journals")
    assert [v for n, v in series.items() if n.startswith("gradwatch_grad_norm{") and not np.isnan(v)] == []
    (steps,) = (v for n, v in series.items() if n.startswith("gradwatch_steps_total{"))
    assert steps == STEPS


def test_ranks_that_disagree_are_a_finding(tmp_path: Path) -> None:
    launch(tmp_path, "local-norm", 2)
    series = serve(tmp_path / "journals")
    active = [n for n, v in series.items() if n.startswith("gradwatch_finding_active{") and v == 1]
    assert len(active) == 1
    assert 'code="norm-differs-between-ranks"' in active[0]
