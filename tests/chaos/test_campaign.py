"""The campaign in small: it loses nothing, and it can fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos.campaign import Row, _settle, kill_agents, kill_trainers


@pytest.mark.services
def test_killed_trainers_and_agents_lose_no_step(tmp_path: Path) -> None:
    rows = [kill_trainers(tmp_path / "t", 4, random.Random(0)), kill_agents(tmp_path / "a", 2, random.Random(0), 500)]
    assert [(row.lost, row.doubled) for row in rows] == [(0, 0), (0, 0)]
    assert all(row.written > 0 for row in rows)


class _Forgetful:
    """An agent that counts one step fewer in one run, and more in another."""

    def metrics(self) -> dict[tuple[str, str], float]:
        states = {("state:abrupt", run): 1.0 for run in "ab"}
        return {**states, ("steps_total", "a"): 9.0, ("steps_total", "b"): 12.0}


def test_a_lost_and_a_doubled_step_are_seen() -> None:
    row = Row("", 2, 0, 0, 0, 0, [])
    _settle(_Forgetful(), row, {"a": 0.0, "b": 0.0}, {"a": 10, "b": 10})  # type: ignore[arg-type]
    assert (row.lost, row.doubled) == (1, 1)
