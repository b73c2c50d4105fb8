"""Several processes, no collective of ours: each rank writes what it holds, and the whole comes out true.

Real process groups (gloo) under torchrun, two and four of them; the reference
is one process that trains on the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.collect.combine import GlobalNorms
from tests import torchrun
from tests.recipes import distributed_worker as worker
from tests.torchrun import Job

STEPS = 5
THRESHOLD = 0.5


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Job]:
    """Run the worker under torchrun, and read every rank's journal."""

    def job(mode: str, world: int, *more: str, ok: bool = True) -> Job:
        done = torchrun.run(tmp_path / "journals", Path(worker.__file__), world, mode, str(STEPS), *more)
        assert (done.status == 0) is ok, done.output
        return done

    return job


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


def findings(job: Job) -> list[str]:
    return [e["code"] for _, events in job.journals.values() for e in events.events if e["kind"] == "finding"]


def combined(job: Job, world: int) -> list[float | None]:
    """The global norm of each of rank 0's rows, as an agent that reads all ranks combines it."""
    norms = GlobalNorms(world)
    for rank, (manifest, events) in sorted(job.journals.items()):
        norms.join(rank, manifest)
        norms.add(rank, events.tensors)
        partial = norms.norm(int(events.steps.sequence[0]))
        assert partial is None or rank == world - 1, "a number before every rank was read"
    return [norms.norm(int(row)) for row in job.journals[0][1].steps.sequence]


class Shown:
    """What the agent exports of a job."""

    def __init__(self, tmp_path: Path) -> None:
        self.series = torchrun.serve(tmp_path / "journals")

    def __getitem__(self, metric: str) -> list[float]:
        return [value for name, value in self.series.items() if name.startswith(f"gradwatch_{metric}{{")]

    @property
    def findings(self) -> list[str]:
        return [n for n, v in self.series.items() if n.startswith("gradwatch_finding_active{") and v == 1]

    @property
    def norms(self) -> list[float]:
        return [value for value in self["grad_norm"] if not np.isnan(value)]


@pytest.mark.parametrize("world", [2])
def test_accumulation_without_synchronisation(launch: Callable[..., Job], world: int) -> None:
    """DDP's `no_sync`: two backward passes a step, the last of which reduces; the norm is that of the whole batch."""
    job = launch("no-sync", world)
    whole, each = reference()
    for _, events in job.journals.values():
        np.testing.assert_allclose(events.steps["grad_norm"], whole, rtol=1e-5)
        np.testing.assert_allclose(events.tensors.values, each, rtol=1e-5)
        np.testing.assert_array_equal(events.steps["backwards"], 2)
    assert findings(job) == []


@pytest.mark.parametrize("world", [2, 4])
def test_ddp(launch: Callable[..., Job], world: int) -> None:
    job = launch("ddp", world)
    assert sorted(job.journals) == list(range(world))
    whole, each = reference()
    for manifest, events in job.journals.values():
        assert (manifest.run, manifest.world_size) == ("job", world)
        np.testing.assert_allclose(events.steps["grad_norm"], whole, rtol=1e-5)
        np.testing.assert_allclose(events.tensors.values, each, rtol=1e-5)
        np.testing.assert_array_equal(events.steps["backwards"], 1)
    assert findings(job) == []


@pytest.mark.parametrize(("mode", "world"), [("fsdp2", 2), ("fsdp2", 4), ("own-norm", 2)])
def test_sharded_norms_combine_to_the_norm_of_one_process(launch: Callable[..., Job], mode: str, world: int) -> None:
    job = launch(mode, world)
    assert sorted(job.journals) == list(range(world))
    whole, _ = reference()
    np.testing.assert_allclose(np.array(combined(job, world), dtype=float), whole, rtol=1e-5)
    assert findings(job) == []
    for manifest, events in job.journals.values():
        assert any(t.placement for t in manifest.tensors)
        assert any("clip-before-backward" in entry["check"] for entry in manifest.unchecked)
        if mode == "fsdp2":
            assert np.isnan(events.steps["grad_norm"]).all(), "a rank's own number is of its shards and not the norm"
        else:
            # The norm that the loop gathered is what each rank used.
            np.testing.assert_allclose(events.steps["grad_norm"], whole, rtol=1e-5)


def test_the_agent_shows_the_global_norm_once_and_each_rank_beside_it(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    job = launch("hsdp", 4)
    whole, _ = reference()
    np.testing.assert_allclose(np.array(combined(job, 4), dtype=float), whole, rtol=1e-5)
    shown = Shown(tmp_path)
    assert shown.norms == [pytest.approx(whole[-1], rel=1e-5)]
    assert shown["clip_coefficient"] == [pytest.approx(min(1.0, THRESHOLD / (whole[-1] + 1e-6)), rel=1e-5)]
    assert shown["clipped_steps_total"] == [sum(norm > THRESHOLD for norm in whole)]
    local = shown["rank_grad_norm_local"]
    assert len(local) == 4
    # Two replicas of two shards: the shards' squares add up to the whole, twice.
    assert np.sqrt(sum(np.square(local)) / 2) == pytest.approx(whole[-1], rel=1e-5)
    # What each rank answers for is without the replicas: agents of several nodes export their part of this sum.
    squares = shown["rank_grad_norm_squares"]
    assert len(squares) == 4
    assert np.sqrt(sum(squares)) == pytest.approx(whole[-1], rel=1e-5)
    assert shown.findings == []


@pytest.mark.parametrize("watched", [0, 1])
def test_nothing_waits_for_ranks_that_are_not_watched_and_no_norm_is_shown(
    launch: Callable[..., Job], tmp_path: Path, watched: int
) -> None:
    job = launch("fsdp2", 2, ["first", "last"][watched])
    assert sorted(job.journals) == [watched]
    manifest, events = job.journals[watched]
    assert len(events.steps) == STEPS
    norms = GlobalNorms(2)
    norms.join(watched, manifest)
    norms.add(watched, events.tensors)
    assert norms.norm(1) is None
    shown = Shown(tmp_path)
    assert shown.norms == []
    assert shown["steps_total"] == ([STEPS] if watched == 0 else [])
    assert shown.findings == []


def test_ranks_that_are_watched_from_different_steps_on_give_no_norm(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    job = launch("fsdp2", 2, "late")
    assert [len(job.journals[rank][1].steps) for rank in (0, 1)] == [STEPS, STEPS - 2]
    # Rows of the same number, and even of the same step where the optimizer does not count, are of different steps.
    assert job.journals[0][1].steps.step[0] == job.journals[1][1].steps.step[0] == 0
    assert combined(job, 2) == [None] * STEPS
    shown = Shown(tmp_path)
    assert shown.norms == []
    assert shown["steps_total"] == [STEPS]
    assert shown.findings == []


def test_a_late_rank_of_replicas_does_not_disagree(launch: Callable[..., Job], tmp_path: Path) -> None:
    launch("ddp", 2, "late")
    shown = Shown(tmp_path)
    whole, _ = reference()
    assert shown.norms == [pytest.approx(whole[-1], rel=1e-5)]
    assert shown.findings == []


def test_a_rank_that_dies_ends_the_job_and_leaves_no_number_of_the_step_that_it_did_not_take(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    job = launch("fsdp2", 2, "all", "dies", ok=False)
    assert [len(job.journals[rank][1].steps) for rank in (0, 1)] == [3, 2]
    whole, _ = reference()
    first, second, third = combined(job, 2)
    np.testing.assert_allclose([first, second], whole[:2], rtol=1e-5)
    assert third is None
    shown = Shown(tmp_path)
    assert [norm for norm in shown.norms if not np.isclose(norm, whole[1], rtol=1e-5)] == []
    states = {n for n, v in shown.series.items() if n.startswith("gradwatch_run_state{") and v == 1}
    assert len(states) == 1
    assert not any('state="finished"' in n or 'state="running"' in n for n in states)


def test_ranks_that_disagree_write_what_each_used_and_that_is_a_finding(
    launch: Callable[..., Job], tmp_path: Path
) -> None:
    job = launch("local-norm", 2)
    first, second = (job.journals[rank][1].steps["grad_norm"] for rank in (0, 1))
    np.testing.assert_allclose(second[0], 2 * first[0], rtol=1e-4)
    (finding,) = Shown(tmp_path).findings
    assert 'code="norm-differs-between-ranks"' in finding
