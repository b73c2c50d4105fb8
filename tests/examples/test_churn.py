"""The churn incident at a reduced size: what its page says in kind must come out."""

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
pytestmark = pytest.mark.xdist_group("churn")


@pytest.fixture(scope="module")
def churn() -> Iterator[ModuleType]:
    path = ROOT / "examples" / "churn" / "churn.py"
    spec = importlib.util.spec_from_file_location("churn", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["churn"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADWATCH_AGENT", "0")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        spec.loader.exec_module(module)
        yield module
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def size(churn: ModuleType) -> object:
    return churn.Size(days=20, hidden=16, users=2_000, epochs=4, rate=3e-3)


def test_the_mask_is_right_for_all_but_batches_with_a_long_history(churn: ModuleType) -> None:
    users = churn.Users.make(4, 5, 10, seed=0)
    long = churn.Users.make(1, 20, 20, seed=1)
    users.events += long.events
    users.leaving += long.leaving
    for broken in (True, False):
        _, labels, mask = users.batch([0, 1, 2, 3], 10, broken)
        assert (labels[mask > 0] != churn.PADDING).all()
    _, labels, mask = users.batch([0, 1, 4], 10, True)
    assert (labels[mask > 0] == churn.PADDING).sum() == 20, "ten columns of two users count that should not"
    _, labels, mask = users.batch([0, 1, 4], 10, False)
    assert (labels[mask > 0] != churn.PADDING).all()


def test_sgd_breaks_without_the_clip_and_holds_with_it(churn: ModuleType, size: object, tmp_path: Path) -> None:
    bare, clipped = (
        churn.train(churn.Setting("test", "sgd", clip), size, tmp_path / str(clip)) for clip in (math.inf, 1.0)
    )
    assert bare.broke
    assert "nonfinite-gradient" in bare.found
    assert clipped.broke is None
    assert clipped.area > 0.85
    assert 0.005 < clipped.affected < 0.15
    share = sum(norm > 1.0 for norm in clipped.norms) / len(clipped.norms)
    assert share == pytest.approx(clipped.affected, abs=0.05)
    assert max(clipped.norms) > 100 * sorted(clipped.norms)[len(clipped.norms) // 2]


def test_adam_is_never_broken_by_the_mask(churn: ModuleType, size: object, tmp_path: Path) -> None:
    broken = churn.train(churn.Setting("test", "adamw"), size, tmp_path / "broken")
    right = churn.train(churn.Setting("test", "adamw", broken=False), size, tmp_path / "right")
    assert broken.broke is None
    assert broken.area < right.area
    assert max(broken.norms) > 100 * max(right.norms)


def test_no_clip_cures_a_log_of_zero(churn: ModuleType, tmp_path: Path) -> None:
    p = torch.sigmoid(torch.tensor([200.0], requires_grad=True))
    loss = churn.loss_of(torch.full((1, 1), 200.0), torch.ones(1, 1) * 0, torch.ones(1, 1), 1, True)
    assert p == 1.0
    assert torch.isinf(loss)
    longer = churn.Size(days=60, hidden=32, users=1_500, epochs=4, rate=3e-3)
    clipped = churn.train(churn.Setting("test", "log", 1.0), longer, tmp_path)
    assert clipped.broke
    assert "nonfinite-gradient" in clipped.found
