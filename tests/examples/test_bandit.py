"""The bandit at a reduced size: what its page says in kind must come out."""

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
pytestmark = pytest.mark.xdist_group("bandit")


@pytest.fixture(scope="module")
def bandit() -> Iterator[ModuleType]:
    path = ROOT / "examples" / "bandit" / "bandit.py"
    spec = importlib.util.spec_from_file_location("bandit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bandit"] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADWATCH_AGENT", "0")
        threads = torch.get_num_threads()
        spec.loader.exec_module(module)
        yield module
        torch.set_num_threads(threads)


def play(bandit: ModuleType, journals: Path, **setting: object) -> object:
    return bandit.play(bandit.Setting("test", updates=3_000, seed=1, **setting), journals)


def test_broken_rewards_saturate_a_sigmoid_and_gradwatch_says_so(bandit: ModuleType, tmp_path: Path) -> None:
    clipped = play(bandit, tmp_path / "clipped", outliers=0.01)
    unclipped = play(bandit, tmp_path / "unclipped", outliers=0.01, clip=False)
    assert not clipped.failed
    assert clipped.late > 0.9
    assert unclipped.failed
    assert not unclipped.nonfinite
    assert "saturated" in unclipped.found
    assert "saturated" not in clipped.found


def test_they_make_a_linear_head_diverge_and_the_clip_keeps_it(bandit: ModuleType, tmp_path: Path) -> None:
    unclipped = play(bandit, tmp_path / "unclipped", head="linear", rate=0.01, outliers=0.01, clip=False)
    clipped = play(bandit, tmp_path / "clipped", head="linear", rate=0.01, outliers=0.01)
    assert unclipped.nonfinite
    assert {"nonfinite-gradient", "nonfinite-loss"} & set(unclipped.found)
    assert not clipped.failed
    assert clipped.fired > 0.05


def test_the_clip_at_the_source_of_a_sigmoid_never_acts_on_clean_rewards(bandit: ModuleType, tmp_path: Path) -> None:
    """|2 (p − r) p (1 − p)| is at most 8/27 for rewards in [0, 1]."""
    assert play(bandit, tmp_path, outliers=0.0).fired == 0.0
    p = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert (2 * p * p * (1 - p)).max() == pytest.approx(8 / 27, abs=1e-9)


def test_a_game_is_the_same_when_it_is_watched(bandit: ModuleType, tmp_path: Path) -> None:
    setting = bandit.Setting("twin", updates=400, outliers=0.05, drift=0.01, schedule=True, decay=1e-4)
    watched, bare = bandit.play(setting, tmp_path), bandit.play(setting, None)
    assert watched.optimality == bare.optimality
    assert watched.largest == bare.largest
    assert watched.error == bare.error


def test_tables_say_what_the_games_were(bandit: ModuleType, tmp_path: Path) -> None:
    played = bandit.games(bandit.decay(300)[:2], 2, tmp_path, "test")
    assert [len(each) for each in played.values()] == [2, 2]
    assert bandit.row(played["rate 0.001, decay 0"])[1] in {"0 of 2", "1 of 2", "2 of 2"}
    assert bandit.interval([1.0, 1.0]) == "1.000 ± 0.000"
    assert bandit.interval([0.0, 1.0]) == "0.500 ± 6.355"
    assert bandit.interval([math.inf, 1.0]) == "–"
