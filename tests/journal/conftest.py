"""A journal to write and read: small, with known columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradwatch.journal import JournalReader, JournalWriter, attempt_directory
from gradwatch.journal.manifest import Manifest, Optimizer, Section, Tensor

HOST = ("optimizer", "duration")
DEVICE = ("loss", "grad_norm")
TENSORS = 3


def manifest(run: str = "run", attempt: int = 0, tensors: int = TENSORS) -> Manifest:
    return Manifest(
        run=run,
        model="model",
        attempt=attempt,
        optimizers=(Optimizer("default", "SGD", True, ({"name": "0", "lr": 0.1},)),),
        tensors=tuple(Tensor(f"layer.{i}.weight", (2, 2), "torch.float32", 4) for i in range(tensors)),
        host_columns=HOST,
        device_columns=DEVICE,
        sections=(Section("global", 0, 8), Section("weight_norm", 8, tensors)),
    )


class Clock:
    """Monotonic time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return attempt_directory(tmp_path, "run", 0, 0)


@pytest.fixture
def writer(directory: Path) -> Iterator[JournalWriter]:
    made = JournalWriter(directory, manifest(), 2**20)
    yield made
    made.close()


@pytest.fixture
def read(directory: Path, clock: Clock) -> Iterator[Callable[..., JournalReader]]:
    opened: list[JournalReader] = []

    def make(cursor: dict[str, object] | None = None) -> JournalReader:
        opened.append(JournalReader(directory, cursor, clock=clock))
        return opened[-1]

    yield make
    for reader in opened:
        reader.close()


@pytest.fixture
def make_manifest() -> Callable[..., Manifest]:
    return manifest


@pytest.fixture
def append() -> Callable[..., None]:
    return _append


def _append(writer: JournalWriter, count: int = 1, loss: float = 1.0, whole: bool = True) -> None:
    """``count`` rows of steps and of tensors whose values tell their sequence number."""
    for _ in range(count):
        number = writer.steps.sequence + 1
        writer.steps.append(number, float(number), (0.0, 0.5), (loss, float(number)) if whole else None)
        writer.tensors.payload[:] = number
        writer.tensors.append(number, number, float(number))
