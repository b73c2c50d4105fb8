"""The global norm of sharded gradients, against the norm of the whole tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwatch.collect.combine import GlobalNorms, shares, weights
from gradwatch.journal.manifest import Manifest, Tensor
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, read_on


def dtensor(kinds: list[str], shape: list[int], coordinate: list[int]) -> dict[str, Any]:
    return {
        "kind": "dtensor",
        "placements": [{"type": kind, "dim": 0} for kind in kinds],
        "mesh": {"shape": shape},
        "coordinate": coordinate,
    }


def manifest(rank: int, *placements: Any) -> Manifest:
    tensors = tuple(Tensor(f"t{i}", (4,), numel=4, placement=p) for i, p in enumerate(placements))
    return Manifest("r", "m", rank=rank, world_size=4, tensors=tensors)


def test_shards_add_up_and_replicas_count_once_on_a_mesh_of_two_by_two() -> None:
    """Hybrid sharding: replicated over the first mesh dimension, sharded over the second; a plain tensor beside."""
    rng = np.random.default_rng(0)
    whole, plain = rng.normal(size=(8, 3)), rng.normal(size=5)
    manifests, norms = {}, {}
    for rank in range(4):
        row, column = divmod(rank, 2)
        manifests[rank] = manifest(rank, dtensor(["replicate", "shard"], [2, 2], [row, column]), None)
        norms[rank] = np.array([np.linalg.norm(whole[4 * column : 4 * column + 4]), np.linalg.norm(plain)])
    known = weights(manifests)
    assert known is not None
    total = math.sqrt(sum(float(norms[r] ** 2 @ known[r]) for r in range(4)))
    assert total == pytest.approx(float(np.linalg.norm(np.concatenate([whole.ravel(), plain]))), rel=1e-12)


def test_what_a_rank_answers_for_can_be_told_from_its_own_manifest() -> None:
    placements = (
        dtensor(["replicate", "shard"], [2, 2], [1, 0]), dtensor(["shard"], [4], [1]), dtensor(["replicate"], [4], [1]),
        {"kind": "flat"}, None,
    )  # fmt: skip
    known = {rank: manifest(rank, *placements) for rank in range(4)}
    share = shares(known[0])
    assert share is not None
    assert share.tolist() == [0.5, 1.0, 0.25, 1.0, 0.25]


@pytest.mark.parametrize(
    "placement",
    [
        dtensor(["partial"], [4], [0]),
        {"kind": "unknown"},
        dtensor(["shard"], [2], [0]),  # a mesh of a part of the world: what the others hold cannot be told
        dtensor(["shard", "shard"], [4], [0, 0]),
        dtensor(["shard"], [-4], [0]),
        {**dtensor(["shard"], [4], [0]), "mesh": None},
    ],
)
def test_a_mesh_that_does_not_cover_the_world_answers_for_nothing(placement: Any) -> None:
    assert shares(manifest(0, placement)) is None


def test_flat_parameters_are_shards_of_every_rank_and_stages_hold_their_own() -> None:
    flat = weights({r: manifest(r, {"kind": "flat"}) for r in range(4)})
    assert flat is not None
    assert [w.tolist() for w in flat.values()] == [[1.0]] * 4
    staged = weights({r: Manifest("r", "m", rank=r, world_size=2, tensors=(Tensor(f"stage{r}.w"),)) for r in range(2)})
    assert staged is not None
    assert [w.tolist() for w in staged.values()] == [[1.0], [1.0]]


@pytest.mark.parametrize("placement", [dtensor(["partial"], [4], [0]), {"kind": "unknown"}, 7, dtensor([], [4], [0])])
def test_what_cannot_be_combined_gives_no_number(placement: Any) -> None:
    norms = GlobalNorms(4)
    for rank in range(4):
        norms.join(rank, manifest(rank, placement))
    assert norms.hopeless


def write_rank(root: Path, rank: int, shards: np.ndarray[Any, Any], clock: FakeClock, world: int = 2) -> JournalBuilder:
    tensors = [Tensor("w", (8,), numel=8, layer="w", placement=dtensor(["shard"], [world], [rank]))]
    journal = JournalBuilder(root, rank=rank, world_size=world, tensors=tensors, clock=clock)
    for row in shards:
        local = float(np.linalg.norm(row))
        journal.step(grad_norm=math.nan, grad_norm_l2=local, nonfinite=0, clip_threshold=3.0, tensors=[local])
    return journal


def test_a_sharded_run_shows_the_global_norm_and_counts_clips_by_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    gradients = rng.normal(size=(50, 8))
    clock = FakeClock()
    builders = [write_rank(tmp_path, r, gradients[:, 4 * r : 4 * r + 4], clock) for r in range(2)]
    run = follow(tmp_path, clock=clock)
    read_on(run)
    state = json.loads(json.dumps(run.to_state()))
    norms = np.linalg.norm(gradients, axis=1)
    run.release()
    again = follow(tmp_path, clock=clock)
    again.restore(state)
    for builder in builders:
        builder.end()
    read_on(again, clock)
    fold = again.fold.optimizers["default"]
    assert fold.steps == 50
    assert fold.last["grad_norm"] == pytest.approx(float(norms[-1]), rel=1e-6)
    assert fold.clipped == int((norms > 3.0).sum()) > 0
    assert fold.norms.sum == pytest.approx(float(norms.sum()), rel=1e-6)
    assert again.views[1].grad_norm_local == pytest.approx(float(np.linalg.norm(gradients[-1, 4:])), rel=1e-6)
    assert again.views[1].grad_norm is None


def test_the_squares_of_ranks_on_several_nodes_add_up_to_the_norm(tmp_path: Path) -> None:
    """Each node's agent sees its own ranks only: Prometheus adds their series."""
    gradients = np.random.default_rng(4).normal(size=(30, 8))
    clock, total = FakeClock(), 0.0
    for rank in range(2):
        node = tmp_path / f"node-{rank}"
        write_rank(node, rank, gradients[:, 4 * rank : 4 * rank + 4], clock).end()
        run = follow(node, clock=clock)
        read_on(run, clock)
        assert run.views[rank].grad_norm is None
        squares = run.views[rank].grad_norm_squares
        assert squares is not None
        total += squares
        again = follow(node, clock=clock)
        again.restore(json.loads(json.dumps(run.to_state())))
        assert again.views[rank].grad_norm_squares == squares
    assert math.sqrt(total) == pytest.approx(float(np.linalg.norm(gradients[-1])), rel=1e-6)


def test_a_missing_rank_gives_no_number(tmp_path: Path) -> None:
    clock = FakeClock()
    write_rank(tmp_path, 0, np.ones((80, 4)), clock).end()
    run = follow(tmp_path, clock=clock)
    read_on(run, clock)
    fold = run.fold.optimizers["default"]
    assert fold.steps == 80
    assert "grad_norm" not in fold.last
    assert fold.clipped == 0
    assert fold.recent.quantiles == {}
