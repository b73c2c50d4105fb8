"""Journals with curves in them, and what the detectors say of them, whole or cut to pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.detect.detector import Detector
from gradwatch.detect.ledger import DETECTORS, Ledger
from gradwatch.journal.manifest import Optimizer
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, offer, read_on

Write = Callable[[JournalBuilder], None]
ADAM = Optimizer("default", "AdamW", False, ({"name": "", "lr": 1e-3, "weight_decay": 0.01},))
SGD = Optimizer("default", "SGD", True, ({"name": "", "lr": 0.1, "weight_decay": 0.0},))


class Curve:
    """Writes steps whose loss and norm are what a test says, with the noise of a training."""

    def __init__(self, journal: JournalBuilder, seed: int = 0, noise: float = 0.05) -> None:
        self._journal, self._noise = journal, noise
        self._random = np.random.default_rng(seed)

    def steps(
        self,
        count: int,
        loss: float | tuple[float, float] = 1.0,
        norm: float | tuple[float, float] = 1.0,
        **fields: Any,
    ) -> None:
        """``count`` steps; a pair is a straight line from the first value to the second."""
        losses, norms = (np.linspace(*(v if isinstance(v, tuple) else (v, v)), count) for v in (loss, norm))
        for at_loss, at_norm in zip(losses.tolist(), norms.tolist()):
            around = self._random.normal(size=2) * self._noise
            self._journal.step(
                loss=at_loss + float(around[0]) * abs(at_loss), grad_norm=at_norm * float(np.exp(around[1])), **fields
            )


def findings(root: Path, write: Write, **builder: Any) -> list[Finding]:
    """What all detectors say of a journal, in the order of steps."""
    return _tell(root, write, DETECTORS, lambda sequence: False, builder)


def codes(found: Sequence[Finding], *which: str) -> list[tuple[str, str, int]]:
    """(code, severity, step) of the findings, or of those of some codes."""
    return [(f.code, f.severity, f.step) for f in found if not which or f.code in which]


def only(found: Sequence[Finding], code: str) -> Finding:
    """The one finding of a code."""
    [one] = [f for f in found if f.code == code]
    return one


def same_however_cut(root: Path, write: Write, *made: Callable[[], Detector], **builder: Any) -> list[Finding]:
    """What detectors say, proven not to depend on where the stream is cut nor on restarts in between."""
    detectors = made or DETECTORS
    whole = _tell(root / "whole", write, detectors, lambda sequence: False, dict(builder))
    for seed in range(3):
        chance = random.Random(seed)
        longest = (8, 60, 400)[seed]
        at = chance.randint(1, longest)

        def cut(sequence: int) -> bool:
            nonlocal at
            if sequence < at:
                return False
            at = sequence + chance.randint(1, longest)  # noqa: B023
            return True

        assert _tell(root / f"cut-{seed}", write, detectors, cut, dict(builder)) == whole
    return whole


def _tell(
    root: Path,
    write: Write,
    detectors: Sequence[Callable[[], Detector]],
    cut: Callable[[int], bool],
    builder: dict[str, Any],
) -> list[Finding]:
    """Write, and look on wherever ``cut`` says so; each look is by detectors restored from the state of the last."""
    clock = FakeClock()
    run, ledger = follow(root, clock=clock), _ledger(detectors)

    def look() -> None:
        nonlocal ledger
        offer(run, root)
        for seen in run.poll():
            ledger.observe(seen)
        state = json.loads(json.dumps(ledger.to_state(), allow_nan=False))
        ledger = _ledger(detectors)
        ledger.restore(state)

    class Watched(JournalBuilder):
        def step(self, **fields: Any) -> int:
            sequence = super().step(**fields)
            if cut(sequence):
                look()
            return sequence

    with Watched(root, clock=clock, capacity=builder.pop("capacity", 2**20), **builder) as journal:
        write(journal)
    offer(run, root)
    for seen in read_on(run, clock):
        ledger.observe(seen)
    assert len(ledger._detectors) == len(detectors), "a detector failed"
    return ledger.all


def _ledger(detectors: Sequence[Callable[[], Detector]]) -> Ledger:
    ledger = Ledger()
    ledger._detectors = [make() for make in detectors]
    return ledger
