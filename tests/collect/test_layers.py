"""Layers: a fixed set of names, squares that add up, and other for the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from gradwatch.collect.layers import TOP, Layers, choose
from gradwatch.journal.manifest import Tensor
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, read_on


def tensor(name: str, numel: int, optimizer: int = 0) -> Tensor:
    return Tensor(name, (numel,), "float32", numel, optimizer, 0, name.rpartition(".")[0])


def test_the_largest_layers_have_names_of_their_own() -> None:
    tensors = [tensor(f"l{i}.weight", 100 + i) for i in range(30)] + [tensor("l3.bias", 1_000)]
    names = choose(tensors)
    assert len(names) == TOP
    assert names[:2] == ["l3", "l29"]
    assert "l9" not in names


def test_a_layers_norm_is_the_root_of_the_sum_of_squares_and_other_holds_the_rest(tmp_path: Path) -> None:
    clock = FakeClock()
    sizes = [10 * (i + 1) for i in range(25)]
    tensors = [tensor(f"l{i}.{kind}", size) for i, size in enumerate(sizes) for kind in ("weight", "bias")]
    rng = np.random.default_rng(1)
    with JournalBuilder(tmp_path, tensors=tensors, clock=clock) as journal:
        journal.step(tensors=rng.lognormal(size=50).tolist())
        norms = rng.lognormal(size=50)
        journal.step(tensors=norms.tolist())
        weights, updates = rng.lognormal(size=50), rng.lognormal(size=50) / 100
        journal.sample(weights.tolist(), updates.tolist())
    run = follow(tmp_path, clock=clock)
    tables = [table for seen in read_on(run, clock) for table in seen.told.tables]
    layers = run.fold.layers
    assert layers is not None
    grads, ratios = layers.grad_norms(), layers.update_ratios()
    for i in range(5, 25):
        assert grads[f"l{i}"] == pytest.approx(math.hypot(norms[2 * i], norms[2 * i + 1]), rel=1e-6)
        update = math.hypot(updates[2 * i], updates[2 * i + 1])
        weight = math.hypot(weights[2 * i], weights[2 * i + 1])
        assert ratios[f"l{i}"] == pytest.approx(update / weight, rel=1e-5)
    assert grads["other"] == pytest.approx(float(np.linalg.norm(norms[:10])), rel=1e-6)
    assert sum(v * v for v in grads.values()) == pytest.approx(float(norms @ norms), rel=1e-6)
    [table] = tables
    assert table.step == 1
    assert table.weight_norm == pytest.approx(weights.tolist(), rel=1e-6)
    assert table.grad_norm == pytest.approx(norms.tolist(), rel=1e-6)
    assert table.update_ratio == pytest.approx((updates / weights).tolist(), rel=1e-5)


def test_membership_is_kept_over_attempts_and_restarts(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    with JournalBuilder(first, tensors=[tensor(f"l{i}.w", 100 + i) for i in range(25)]) as journal:
        journal.step()
    run = follow(first)
    read_on(run)
    layers = run.fold.layers
    assert layers is not None
    with JournalBuilder(second, tensors=[tensor(f"l{i}.w", 200 - i) for i in range(25)]) as journal:
        manifest = journal.manifest
    grown = Layers(manifest, layers.names)
    assert grown.names == layers.names != choose(manifest.tensors)
    again = Layers(run.fold.facts.manifest, layers.names)  # type: ignore[union-attr]
    again.restore(json.loads(json.dumps(layers.to_state())))
    assert again.grad_norms() == layers.grad_norms()


def test_each_optimizers_tensors_keep_their_own_last_values(tmp_path: Path) -> None:
    tensors = [tensor("g.w", 10, 0), tensor("d.w", 10, 1), tensor("d.b", 10, 1)]
    nan = math.nan
    with JournalBuilder(tmp_path, optimizers=("g", "d"), tensors=tensors) as journal:
        journal.step(optimizer=0, tensors=[3.0, nan, nan])
        journal.step(optimizer=1, tensors=[nan, 4.0, 3.0])
        journal.step(optimizer=1, tensors=[nan, 8.0, nan])
    run = follow(tmp_path)
    read_on(run)
    assert run.fold.layers is not None
    assert run.fold.layers.grad_norms() == {"g": 3.0, "d": 8.0}
