"""A long life in short: does memory stay flat, do descriptors stay few, and is every step counted?

    python benchmarks/soak.py                                          # short: some seconds
    python benchmarks/soak.py --written 10000000 --trained 1000000     # what docs/overhead.md shows

Two lives, each with an agent and a tracking server of MLflow as processes of
their own, on loopback: one in which rows are *written* by the journal's writer
without a training, paced by the agent's own counter so that none is overwritten
before it is read, and one in which a small model is *trained* under
``gradwatch.watch`` as fast as it goes. Memory (``RssAnon``, which leaves out
mapped files), descriptors and threads of both processes are looked at fifty
times, once MLflow has the run. Flat means: at the end no more than after a fifth of the way, plus 16 MiB
and, of descriptors, what two scrapes hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "agent")]

from tests.agent.processes import AgentProcess, agent, environment  # noqa: E402
from tests.chaos.mlflow_side import client_of, fill, find  # noqa: E402
from tests.services import MlflowServer  # noqa: E402

LOOKS = 50
#: How much more than after a fifth of the way is flat.
BYTES, DESCRIPTORS = 16 * 2**20, 2
#: Rows that a writer may be ahead of the agent; a ring holds some more.
AHEAD = 30_000
CHUNK = 2_000
LAST_STEPS = 1_000


@dataclass(frozen=True, slots=True)
class Look:
    done: int
    memory: int
    descriptors: int
    threads: int


@dataclass
class Watched:
    """One process, looked at from outside."""

    name: str
    pid: int
    looks: list[Look] = field(default_factory=list)

    def look(self, done: int) -> None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 (names are all that is wanted)
        self.looks.append(Look(done, int(status["RssAnon"].split()[0]) * 1024, descriptors, int(status["Threads"])))

    @property
    def early(self) -> Look:
        return self.looks[len(self.looks) // 5]

    def flat(self) -> bool:
        end, early = self.looks[-1], self.early
        return end.memory <= early.memory + BYTES and end.descriptors <= early.descriptors + DESCRIPTORS

    def to_json(self) -> dict[str, Any]:
        return {
            "process": self.name,
            "memory_mib": {
                "after_a_fifth": round(self.early.memory / 2**20, 1),
                "at_the_end": round(self.looks[-1].memory / 2**20, 1),
                "most": round(max(look.memory for look in self.looks) / 2**20, 1),
            },
            "descriptors": [self.early.descriptors, self.looks[-1].descriptors],
            "threads": [self.early.threads, self.looks[-1].threads],
            "flat": self.flat(),
        }


# -- the two trainers, each a process that is told how far to go


def write_rows(root: Path, steps: int) -> None:
    """Write rows as a training does, a chunk for each line on stdin."""
    from gradwatch.testing import FakeClock, JournalBuilder

    class RealClock(FakeClock):
        def __call__(self) -> float:
            return time.time()

        def advance(self, seconds: float) -> None:
            pass

    journal = JournalBuilder(root, run="written", clock=RealClock(), capacity=32 * 2**20)
    host = [0.0, 1.0, 1e-3, 32.0, 1e-6, 4.0, 1.0, float("nan"), *[0.1, 0.0]]
    done = 0
    for _ in sys.stdin:
        until = min(steps, done + CHUNK)
        for step in range(done, until):
            norm = 0.5 + (step % 17) / 16
            now, device = time.time(), [0.7, norm, norm, min(1.0, 1.0 / norm), 0.0, float("nan")]
            sequence = journal.writer.steps.append(step, now, host, device)
            journal.writer.tensors.append_values(sequence, step, now, [norm / 2, norm / 2])
        done = until
        print(done, flush=True)
    journal.end()


def train(root: Path, steps: int) -> None:
    """Train a small model as fast as it goes; a chunk for each line on stdin."""
    import torch

    import gradwatch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(16, 8), torch.randn(16, 2)
    run = gradwatch.watch(model, optimizer, model_name="soak", max_norm=1.0, root=root)
    done = 0
    for _ in sys.stdin:
        until = min(steps, done + CHUNK)
        while done < until:
            loss = (model(x) - y).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.log_train(loss=loss)
            done += 1
        print(done, flush=True)
    run.finish()


# -- a life


@contextmanager
def trainer(how: str, root: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    env = {**environment(), "GRADWATCH_DIR": str(root), "GRADWATCH_RUN": how}
    env = {key: value for key, value in env.items() if key not in ("GRADWATCH_PARENT", "MLFLOW_RUN_ID")}
    command = [sys.executable, __file__, "--as", how, "--dir", str(root), "--steps", str(steps)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def live(how: str, steps: int, scratch: Path, server: MlflowServer) -> dict[str, Any]:
    """One life of a trainer and its agent; what was measured of it."""
    root = scratch / how
    root.mkdir()
    began = time.monotonic()
    os.environ["MLFLOW_TRACKING_URI"] = server.url
    with agent(root) as beside, trainer(how, root, steps) as process:
        both = [Watched("trainer", process.pid), Watched("agent", beside.handle.pid)]
        assert process.stdin is not None
        assert process.stdout is not None
        client = client_of(server.url)
        done = counted = 0
        next_look = 0.0
        while done < steps:
            if done - counted > AHEAD:
                counted = _counted(beside, how)
                time.sleep(0.0 if done - counted <= AHEAD else 0.05)
                continue
            process.stdin.write("\n")
            process.stdin.flush()
            done = int(process.stdout.readline())
            if done == CHUNK:  # what a process loads once is no growth
                _until(lambda: find(client, how) is not None, 120)
            if done >= next_look:
                next_look = done + steps / LOOKS
                for one in both:
                    one.look(done)
                _progress(how, done, steps, both)
        _until(lambda: _counted(beside, how) >= steps, 600)
        for one in both:
            one.look(done)
        process.stdin.close()
        process.wait(60)
        _until(lambda: (held := find(client, how)) is not None and held.ended, 120)
        held = find(client, how)
        assert held is not None
        held = fill(client, held)
        counted = _counted(beside, how)
    table = held.last_steps == list(range(max(0, steps - LAST_STEPS), steps))
    return {
        "life": how,
        "steps": steps,
        "counted_by_the_agent": counted,
        "folded_in_mlflow": held.folded,
        "doubled_in_mlflow": len(held.doubled),
        "last_steps_whole": table,
        "status": held.status,
        "seconds": round(time.monotonic() - began),
        "processes": [one.to_json() for one in both],
        "good": counted == held.folded == steps and table and not held.doubled and all(one.flat() for one in both),
    }


def _counted(beside: AgentProcess, run: str) -> int:
    return int(beside.metrics().get(("steps_total", run), 0))


def _until(done: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise SystemExit(f"not within {seconds:g} s")
        time.sleep(0.1)


def _progress(how: str, done: int, steps: int, both: list[Watched]) -> None:
    facts = ", ".join(f"{one.name} {one.looks[-1].memory >> 20} MiB {one.looks[-1].descriptors} fd" for one in both)
    print(f"{how}: {done:,} of {steps:,}; {facts}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--written", type=int, default=100_000)
    parser.add_argument("--trained", type=int, default=10_000)
    parser.add_argument("--write", type=Path, help="append the results here, a JSON object a line")
    parser.add_argument("--as", dest="how", choices=["written", "trained"], help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.how:
        {"written": write_rows, "trained": train}[given.how](given.dir, given.steps)
        return
    good = True
    with tempfile.TemporaryDirectory() as name, MlflowServer(Path(name) / "mlflow") as server:
        for how, steps in (("trained", given.trained), ("written", given.written)):
            if steps:
                result = live(how, steps, Path(name), server)
                good &= bool(result["good"])
                print(json.dumps(result), flush=True)
                if given.write:
                    with given.write.open("a") as file:
                        file.write(json.dumps(result) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
