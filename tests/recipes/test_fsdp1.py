"""FSDP1 and its ShardedGradScaler with two real ranks: gradients in pieces, one decision to skip, a true norm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradwatch.collect.combine import GlobalNorms
from tests import torchrun
from tests.recipes import distributed_worker, fsdp1_worker

STEPS = 5
TAKEN = [step for step in range(STEPS) if step != fsdp1_worker.SKIPPED]


def reference() -> list[float]:
    """Global norms of the whole batch in one process, unscaled, the skipped step left out."""
    net = distributed_worker.model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    norms = []
    for step in TAKEN:
        optimizer.zero_grad()
        x, y = distributed_worker.batch(step)
        nn.functional.mse_loss(net(x), y).backward()
        norms.append(
            float(torch.cat([p.grad.double().flatten() for p in net.parameters() if p.grad is not None]).norm())
        )
        torch.nn.utils.clip_grad_norm_(net.parameters(), fsdp1_worker.THRESHOLD)
        optimizer.step()
    return norms


@pytest.mark.parametrize("kind", ["flat", "original"])
def test_two_ranks(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "journals"
    job = torchrun.run(root, Path(fsdp1_worker.__file__), 2, kind, str(STEPS))
    assert job.status == 0, job.output
    whole = reference()
    norms = GlobalNorms(2)
    for rank, (manifest, events) in sorted(job.journals.items()):
        assert [e["code"] for e in events.events if e["kind"] == "finding"] == []
        assert {(t.placement or {}).get("kind") for t in manifest.tensors} == {"flat"}
        assert any("FSDP1" in entry["check"] for entry in manifest.unchecked)
        rows = events.steps
        skipped = (rows["flags"].astype(int) & 1) != 0
        assert np.flatnonzero(skipped).tolist() == [fsdp1_worker.SKIPPED]
        assert rows.step[~skipped].tolist() == list(range(STEPS - 1))
        # What FSDP's clip used is what it returned; each rank was told the same.
        np.testing.assert_allclose(rows["grad_norm"][~skipped], whole, rtol=1e-5)
        np.testing.assert_array_equal(rows["loss_scale"], [64.0] * 3 + [32.0] * 2)
        norms.join(rank, manifest)
        norms.add(rank, events.tensors)
    sequences = job.journals[0][1].steps.sequence[~skipped]
    combined = [norms.norm(int(row)) for row in sequences]
    np.testing.assert_allclose(np.array(combined, dtype=float), whole, rtol=1e-4)
    series = torchrun.serve(root)
    shown = [v for name, v in series.items() if name.startswith("gradwatch_grad_norm{")]
    assert shown == [pytest.approx(whole[-1], rel=1e-4)]
    assert [n for n, v in series.items() if n.startswith("gradwatch_finding_active{") and v == 1] == []
