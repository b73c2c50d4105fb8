"""What a row costs the training thread, beside the naive ways to keep one, and how fast a reader is.

    python benchmarks/bench_journal.py

Blocks of the ways alternate, so that a busy machine slows all of them alike;
printed are the median and the quartiles over the blocks, in microseconds a row.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

from gradwatch.journal import JournalReader, JournalWriter, attempt_directory
from gradwatch.journal.manifest import Manifest, Tensor

HOST, DEVICE = 10, 6


def journal(root: Path, tensors: int) -> JournalWriter:
    manifest = Manifest(
        run=f"run-{tensors}",
        model="model",
        host_columns=tuple(f"h{i}" for i in range(HOST)),
        device_columns=tuple(f"d{i}" for i in range(DEVICE)),
        tensors=tuple(Tensor(f"t{i}") for i in range(tensors)),
    )
    return JournalWriter(attempt_directory(root, manifest.run, 0, 0), manifest)


def ways(root: Path, tensors: int) -> dict[str, Callable[[int], object]]:
    """Each way to keep a step: a function of its number."""
    host, device = [1.5] * HOST, [2.5] * DEVICE
    writer = journal(root, tensors)
    writer.tensors.payload[:] = 1.0
    steps, norms = writer.steps, writer.tensors
    packed = struct.Struct(f"<qd{HOST + DEVICE}d{tensors}f")
    values = [1.0] * tensors
    binary = (root / "rows.bin").open("wb")
    text = (root / "rows.jsonl").open("w")
    flushed = (root / "flushed.jsonl").open("w")
    names = [f"c{i}" for i in range(HOST + DEVICE)]
    database = sqlite3.connect(root / "rows.db", isolation_level=None)
    database.execute("pragma journal_mode=wal")
    database.execute("pragma synchronous=off")
    database.execute(f"create table rows (step, {', '.join(names)})")
    insert = f"insert into rows values ({', '.join('?' * (HOST + DEVICE + 1))})"

    def both(step: int) -> None:
        norms.append(steps.append(step, 1.0, host, device), step, 1.0)

    def as_json(step: int) -> str:
        return json.dumps({"step": step, "columns": dict(zip(names, host + device, strict=True)), "norms": values})

    def json_flushed(step: int) -> None:
        flushed.write(as_json(step) + "\n")
        flushed.flush()

    return {
        "journal: step and norms": both,
        "  of that steps.append": lambda step: steps.append(step, 1.0, host, device),
        "  of that tensors.append": lambda step: norms.append(step, step, 1.0),
        "journal: complete (late loss)": lambda step: steps.complete(steps.sequence, device),
        "struct + buffered write (lost at a kill)": lambda step: binary.write(
            packed.pack(step, 1.0, *host, *device, *values)
        ),
        "JSON line, buffered (lost at a kill)": lambda step: text.write(as_json(step) + "\n"),
        "JSON line, flushed": json_flushed,
        "sqlite insert, WAL, unsynchronised, no norms": lambda step: database.execute(insert, (step, *host, *device)),
    }


def writing(root: Path, tensors: int, blocks: int, rows: int) -> None:
    print(f"\n{tensors} tensors, {HOST + DEVICE} columns: µs a row, median (quartiles) of {blocks} blocks of {rows}")
    candidates = ways(root, tensors)
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(blocks):
        for name, keep in candidates.items():
            began = time.perf_counter()
            for step in range(rows):
                keep(step)
            taken[name].append((time.perf_counter() - began) / rows * 1e6)
    for name, seconds in taken.items():
        low, median, high = quantiles(seconds, n=4)
        print(f"  {name:46} {median:8.2f}  ({low:.2f} to {high:.2f})")


def reading(root: Path, ranks: int, rows: int) -> None:
    """Sixteen ranks of 100 tensors: processor time to read what they write in a second at 200 steps/s."""
    place = root / "reading"
    writers = []
    for rank in range(ranks):
        manifest = Manifest(
            run="run",
            model="model",
            rank=rank,
            host_columns=tuple(f"h{i}" for i in range(HOST)),
            device_columns=tuple(f"d{i}" for i in range(DEVICE)),
            tensors=tuple(Tensor(f"t{i}") for i in range(100)),
        )
        writers.append(JournalWriter(attempt_directory(place, "run", rank, 0), manifest, 8 * 2**20))
    readers = [JournalReader(writer.directory) for writer in writers]
    read, busy = 0, 0.0
    for _ in range(rows // 50):
        for writer in writers:
            for step in range(50):  # a quarter of a second at 200 steps/s
                writer.tensors.append(writer.steps.append(step, 1.0, [1.5] * HOST, [2.5] * DEVICE), step, 1.0)
        began = time.process_time()
        for reader in readers:
            polled = reader.poll()
            read += len(polled.steps) + len(polled.tensors)
        busy += time.process_time() - began
    began = time.process_time()
    for _ in range(20):
        for reader in readers:
            reader.poll()
    idle = (time.process_time() - began) / (20 * ranks)
    print(f"\nreading {ranks} ranks × 200 steps/s × 100 tensors at 4 polls a second, {read} rows:")
    print(
        f"  {busy / (rows / 200) * 100:.1f} % of one core ({read / busy:,.0f} rows/s); an idle poll {idle * 1e6:.0f} µs"
    )
    began = time.process_time()
    count = 0
    for writer in writers:
        reader = JournalReader(writer.directory)
        more = True
        while more:
            polled = reader.poll()
            more = polled.more
            count += len(polled.steps) + len(polled.tensors)
    print(f"  catching up from the beginning: {count / (time.process_time() - began):,.0f} rows/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    for tensors in (6, 100):
        with tempfile.TemporaryDirectory() as place:
            writing(Path(place), tensors, options.blocks, options.rows)
    with tempfile.TemporaryDirectory() as place:
        reading(Path(place), 16, 2000)


if __name__ == "__main__":
    main()
