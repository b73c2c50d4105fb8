"""Fixtures and settings for all tests."""

from __future__ import annotations

import os
import signal

import pytest

from tests.services import mlflow_server

__all__ = ["mlflow_server"]

# A shell starts background jobs with Ctrl-C ignored, which would be inherited by every process under test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Two workers share two cores: more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: What the surroundings may say about runs; a test says it itself.
_SURROUNDINGS = ("GRADWATCH_", "MLFLOW_", "JOBSET_", "TORCHELASTIC_", "SLURM_", "OMPI_", "PMI_")
_KEPT = ("GRADWATCH_REQUIRE_SERVICES",)


@pytest.fixture(autouse=True)
def plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is told its run, rank or tracking server by the environment that it happens to run in."""
    for name in list(os.environ):
        if name.startswith(_SURROUNDINGS) and name not in _KEPT:
            monkeypatch.delenv(name)
