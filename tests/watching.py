"""Fixtures: runs that write below a temporary directory, start no agent, and are read back through the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch.journal import Events, JournalReader


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADWATCH_DIR", "GRADWATCH_RUN", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GRADWATCH_AGENT", "0")


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., gradwatch.Run]]:
    """``gradwatch.watch`` below a temporary root; every run is finished, and none may have failed."""
    runs: list[gradwatch.Run] = []

    def start(*args: Any, **kwargs: Any) -> gradwatch.Run:
        run = gradwatch.watch(*args, root=tmp_path / "runs", **kwargs)
        assert run.last_failure == ""
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.finish()
        assert run.last_failure == "", "the probe swallowed a failure of its own"


@pytest.fixture
def read() -> Callable[[gradwatch.Run], Events]:
    """Everything that a run's journal holds; finishes the run first, so that all rows are settled."""

    def everything(run: gradwatch.Run) -> Events:
        run.finish()
        assert run.last_failure == ""
        assert run.directory is not None
        reader = JournalReader(run.directory)
        try:
            return reader.poll(100_000)
        finally:
            reader.close()

    return everything


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
