"""Transformers and Accelerate under torchrun, two ranks of one run: every rank's norms are true, and no finding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import torchrun
from tests.integrations import distributed_worker
from tests.integrations.truth import codes, end, validations


@pytest.mark.parametrize(("framework", "steps"), [("transformers", 4), ("accelerate", 3)])
def test_two_ranks(tmp_path: Path, framework: str, steps: int) -> None:
    root = tmp_path / "journals"
    script = Path(distributed_worker.__file__)
    job = torchrun.run(root, script, 2, framework, str(tmp_path), run=None)
    assert job.status == 0, job.output
    assert sorted(job.journals) == [0, 1]
    assert len({manifest.run for manifest, _ in job.journals.values()}) == 1, "the ranks are of one run"
    used = []
    for rank, (manifest, events) in job.journals.items():
        assert (manifest.rank, manifest.world_size, manifest.attempt) == (rank, 2, 0)
        assert codes(events) == []
        assert end(events) == ("finished", "finished")
        true = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert len(true) == len(events.steps) == steps
        np.testing.assert_allclose(events.steps["grad_norm"], true, rtol=1e-5)
        np.testing.assert_array_equal(events.steps["clip_threshold"], 0.5)
        np.testing.assert_array_equal(events.steps["backwards"], 2)
        used.append(events.steps["grad_norm"])
    np.testing.assert_allclose(used[0], used[1], rtol=1e-5)
    manifest, events = job.journals[0]
    if framework == "transformers":
        assert manifest.config["batch_size"] == 4 * 2 * 2
        assert len(validations(events)) == 2
    series = torchrun.serve(root)
    (shown,) = (v for name, v in series.items() if name.startswith("gradwatch_grad_norm{"))
    assert shown == pytest.approx(used[0][-1], rel=1e-5)
    (counted,) = (v for name, v in series.items() if name.startswith("gradwatch_steps_total{"))
    assert counted == steps
