"""A process that writes a journal, as a training does; prints what it has written when it ends."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from gradwatch.testing import FakeClock, JournalBuilder


class RealClock(FakeClock):
    """The time of day; moving it is waiting."""

    def __call__(self) -> float:
        return time.time()

    def advance(self, seconds: float) -> None:
        time.sleep(seconds)


def main(root: str, run: str, steps: int, rate: float, end: str, attempt: int = 0, first: int = 0) -> None:
    journal = JournalBuilder(
        Path(root), run=run, clock=RealClock(), seconds_a_step=1.0 / rate, attempt=attempt, first_step=first
    )
    rng = random.Random(attempt)
    clipped, total = 0, 0.0
    for i in range(steps):
        norm = rng.lognormvariate(0.0, 0.5)
        clipped += norm > 1.5
        total += norm
        journal.step(loss=1.0 / (i + 1), grad_norm=norm, clip_threshold=1.5, samples=32)
    if end == "finish":
        journal.end()
    print(json.dumps({"steps": steps, "clipped": clipped, "norms": total}), flush=True)
    if end == "wait":
        sys.stdin.read()  # live on, holding the lock, until told
        journal.end()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5], *map(int, sys.argv[6:]))
