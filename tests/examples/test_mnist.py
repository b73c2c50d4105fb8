"""The MNIST sandbox at a reduced size: what its page says in kind must come out."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[ModuleType]:
    path = ROOT / "examples" / "mnist" / "sandbox.py"
    spec = importlib.util.spec_from_file_location("mnist_sandbox", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mnist_sandbox"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADWATCH_AGENT", "0")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        spec.loader.exec_module(module)
        yield module
        torch.set_num_threads(threads)


@pytest.mark.xdist_group("mnist")
def test_the_experiments_come_out_as_the_page_says(sandbox: ModuleType, tmp_path: Path) -> None:
    digits = sandbox.Digits.load()
    low, right, high = sandbox.rates(digits, tmp_path / "rates", 12)
    assert low.train[-1] < low.train[0]
    assert low.validation[-1] > 2.2
    assert right.accuracy[-1] > 0.82
    assert high.validation[-1] > 2.3
    assert "learning-rate-too-high" in high.found
    assert "learning-rate-too-high" not in right.found

    none, strong = sandbox.decay(digits, tmp_path / "decay", 20)
    assert strong.train[-1] > none.train[-1]
    assert strong.validation[-1] < none.validation[-1]
    assert sum(strong.sizes) == pytest.approx(1)
    assert sum(strong.sizes[10:]) < sum(none.sizes[10:]), "decay empties the upper buckets"

    outcomes = {o.setting.name: o for o in sandbox.corrupt(digits, tmp_path / "corrupt", 12)}
    clean, corrupt, clipped = (outcomes[f"SGD, {what}"] for what in ("clean", "corrupt", "corrupt, clip 1.0"))
    assert clean.validation[-1] < clipped.validation[-1] < corrupt.validation[-1]


@pytest.mark.xdist_group("mnist")
def test_a_study_watches_every_trial_in_one_process(sandbox: ModuleType, tmp_path: Path) -> None:
    told, outcomes = sandbox.study(sandbox.Digits.load(), tmp_path, 2, 6)
    assert len(outcomes) == len(list(tmp_path.glob("mnist-*"))) == 6
    assert told.count("\n") == 7, "a head, and the best and the worst three"
    assert all(math.isfinite(outcome.validation[-1]) for outcome in outcomes)
