"""Journals that nobody would write: valid ones with files damaged, replaced or made up.

    python tests/faults/fuzz_journal.py --examples 10000 [--seed 1]

Each example takes one small good journal, damages it at random, and reads it to
the end. The reader may refuse it with a ``JournalError`` and nothing else,
within seconds, and whatever it shows is bounded. Prints one line of counts and
leaves with 1 at the first example that broke a promise, naming its seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import stat
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gradwatch.journal import JournalError, JournalReader, JournalWriter, attempt_directory
from gradwatch.journal.manifest import Manifest, Optimizer, Section, Tensor

RINGS = ("steps.ring", "tensors.ring", "samples.ring")
FILES = (*RINGS, "events.jsonl", "manifest.json", "lock")
#: Texts and values that have broken readers of other formats.
NASTY = [
    float("nan"),
    float("inf"),
    -1,
    0,
    2**31,
    2**63,
    2**64,
    10**400,
    "",
    "x" * 5000,
    "a\nb\r\t\x00\x1b[31m",
    "<script>alert(1)</script>",
    'quote"\\{}',
    "\ud800",
    "\u202e\ufeff",
    None,
    True,
    [],
    {},
    [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]],
    {"a": {"b": [1, {"c": "d"}]}},
    "../../etc/passwd",
]
MAX_SECONDS = 5.0
#: What planted links lead to: good JSON that nobody may show, and nobody may touch.
DECOY = "../decoy"
SECRET = b'{"sequence":1,"kind":"secret","time":1.0,"row":1,"step":1}\n'


def good(directory: Path) -> None:
    """A journal of some laps, with samples and events."""
    manifest = Manifest(
        run="run",
        model="model",
        optimizers=(Optimizer("default", "SGD", True, ({"name": "0", "lr": 0.1},)),),
        tensors=tuple(Tensor(f"t{i}", (2,), "torch.float32", 2) for i in range(3)),
        host_columns=("optimizer", "duration"),
        device_columns=("loss", "grad_norm"),
        sections=(Section("global", 0, 8), Section("weight_norm", 8, 3)),
        hyperparameters={"lr": 0.1},
        config={"a": [1, 2]},
    )
    writer = JournalWriter(directory, replace(manifest), 20_000)
    for step in range(2 * writer.steps.geometry.capacity + 5):
        row = writer.steps.append(step, float(step), (0.0, 1.0), (0.5, 2.0))
        writer.tensors.append(row, step, float(step))
        if step % 10 == 0:
            writer.samples.append(row, step, float(step))
            writer.events.write({"kind": "validation", "time": 1.0, "row": row, "step": step, "metrics": {"loss": 1.0}})
    writer.close()


# -- damages: each takes the directory and a source of chance


# Whoever runs this may be root: every damage goes through these three, which touch regular files below the working
# directory and nothing else. A planted link points at the decoy beside the journal, which must stay as it is.


def regular(path: Path) -> Path:
    """``path`` where it is a regular file of a bearable size; never through a symbolic link."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > 2**23:
        raise OSError(f"{path} is damaged enough")
    return path


def content(path: Path) -> bytes:
    return regular(path).read_bytes()


def overwrite(path: Path, data: bytes) -> None:
    """Put ``data`` in the place of what is there, in a new file."""
    if path.is_dir() and not path.is_symlink():
        raise OSError(f"{path} is damaged enough")
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(data)


def resize(path: Path, size: int) -> None:
    os.truncate(regular(path), size)


def flip_bytes(directory: Path, chance: random.Random) -> None:
    path = directory / chance.choice(FILES)
    data = bytearray(content(path))
    for _ in range(chance.choice((1, 3, 100))):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    overwrite(path, data)


def truncate(directory: Path, chance: random.Random) -> None:
    path = directory / chance.choice(FILES)
    resize(path, chance.randrange(regular(path).stat().st_size + 1))


def lengthen(directory: Path, chance: random.Random) -> None:
    path = directory / chance.choice(FILES)
    resize(path, regular(path).stat().st_size + chance.choice((1, 4096, 2**20, 2**33)))


def zero(directory: Path, chance: random.Random) -> None:
    path = directory / chance.choice(RINGS)
    data = content(path)
    keep = chance.choice((0, 36, 4096))
    overwrite(path, data[:keep] + bytes(len(data) - keep))


def garbage(directory: Path, chance: random.Random) -> None:
    overwrite(directory / chance.choice(FILES), chance.randbytes(chance.choice((0, 1, 40, 5000))))


def replace_file(directory: Path, chance: random.Random) -> None:
    path = directory / chance.choice(FILES)
    path.unlink()
    kind = chance.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(chance.choice((directory / DECOY, path, directory / "nowhere")))
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.hardlink_to(regular(directory / chance.choice(FILES)))


def swap_files(directory: Path, chance: random.Random) -> None:
    one, other = chance.sample(FILES, 2)
    data = content(directory / one)
    overwrite(directory / one, content(directory / other))
    overwrite(directory / other, data)


def forge_header(directory: Path, chance: random.Random) -> None:
    """A header whose checksum fits, with numbers that do not."""
    path = directory / chance.choice(RINGS)
    fields = list(struct.unpack_from("<8sIIIIQ", content(path)))
    fields[chance.randrange(1, 6)] = chance.choice((0, 1, 4, 8, 7, 255, 4096, 2**20, 2**31, 2**32 - 1))
    if chance.random() < 0.4:
        fields[5] = chance.choice((0, 1, 2**20, 2**40, 2**63))
    if chance.random() < 0.6:
        fields[1] = 32 + fields[2] * fields[4] + 8 + 8 + (fields[3] * fields[4] + 7) // 8 * 8 + 8 & 0xFFFFFFFF
    head = struct.pack("<8sIIIIQ", *fields)
    with regular(path).open("r+b") as file:
        file.write(head + struct.pack("<I", zlib.crc32(head)))
        if chance.random() < 0.3:
            file.truncate(min(4096 + fields[1] * min(fields[5], 2**40), 2**33))


def forge_rows(directory: Path, chance: random.Random) -> None:
    """Rows whose checksums fit: from the future, out of order, with strange numbers."""
    path = directory / "steps.ring"
    data = bytearray(content(path))
    slot, host, device = struct.unpack_from("<III", data, 8)
    if not 0 < slot <= 4096 or host + device > 500:
        raise ValueError("an earlier damage left no rows to forge")
    capacity = (len(data) - 4096) // slot
    for _ in range(chance.choice((1, 10, 100))):
        at = chance.randrange(capacity)
        lap = chance.choice((0, 1, 2, 3, 2**30, 2**55, 2**60 // capacity))
        sequence = (lap * capacity + at) % 2**64
        value = chance.choice((float("nan"), float("inf"), 1e308, -1.0))
        first = struct.pack("<QQqd", sequence, sequence, chance.choice((-(2**63), 2**63 - 1, 5)), value)
        first += struct.pack(f"<{host}d", *[value] * host)
        second = struct.pack(f"<Q{device}d", sequence, *[value] * device)
        row = first + struct.pack("<II", zlib.crc32(first), 0) + second + struct.pack("<II", zlib.crc32(second), 0)
        data[4096 + at * slot : 4096 + (at + 1) * slot] = row
    overwrite(path, data)


def forge_manifest(directory: Path, chance: random.Random) -> None:
    path = directory / "manifest.json"
    document = json.loads(content(path))
    for _ in range(chance.choice((1, 2, 10))):
        node = document
        key = chance.choice(list(node))
        while isinstance(node[key], dict | list) and node[key] and chance.random() < 0.7:
            node = node[key]
            key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        node[key] = chance.choice(NASTY)
    text = json.dumps(document)
    text = chance.choice((text, text, text.replace("0.1", "1e999"), text[:-1] + ',"run":"twice","run":"run"}'))
    overwrite(path, text.encode("utf-8", "surrogatepass"))


def forge_events(directory: Path, chance: random.Random) -> None:
    lines = []
    for _ in range(chance.choice((1, 20))):
        event = {"sequence": chance.choice((1, 2, 5, 2**61, -1)), "kind": "end", "time": 1.0, "row": 1, "step": 1}
        event[chance.choice((*event, "other"))] = chance.choice(NASTY)
        lines.append(json.dumps(event).encode())
    lines.append(chance.choice((b"", b"[" * 100_000, b"\xff" * 10, b'{"kind":"x"', b"x" * 2**21)))
    overwrite(directory / chance.choice(("events.jsonl", "events.jsonl.1")), b"\n".join(lines) + b"\n")


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip_bytes,
    truncate,
    lengthen,
    zero,
    garbage,
    replace_file,
    swap_files,
    forge_header,
    forge_rows,
    forge_manifest,
    forge_events,
)


def try_one(template: Path, work: Path, seed: int) -> str:
    """Damage a copy, read it, and say how that went. Raises whatever a promise of the reader's was broken by."""
    chance = random.Random(seed)
    directory = attempt_directory(work, "run", 0, 0)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(template, directory)
    decoy = directory / DECOY
    decoy.write_bytes(SECRET)
    for _ in range(chance.choice((1, 1, 2, 3))):
        try:
            chance.choice(DAMAGES)(directory, chance)
        except (OSError, ValueError, ArithmeticError, struct.error, LookupError, TypeError):
            continue  # a second damage found no file, or no journal, to damage
    began = time.monotonic()
    outcome = "read"
    reader = None
    cursor = None
    try:
        for _ in range(2):
            reader = JournalReader(directory, cursor)
            for _ in range(10):
                polled = reader.poll(1000)
                assert len(polled.steps) <= 1000
                assert len(polled.tensors) <= 1000
                assert polled.missed >= 0
                assert all(isinstance(event["kind"], str) for event in polled.events)
                assert all(event["kind"] != "secret" for event in polled.events)
                if not polled.more:
                    break
            reader.last_steps(100)
            cursor = json.loads(json.dumps(reader.cursor))
            reader.close()
    except JournalError as error:
        if not str(error):
            raise AssertionError("a refusal without a word") from None
        outcome = "refused"
        if reader is not None:
            reader.close()
    assert decoy.read_bytes() == SECRET
    took = time.monotonic() - began
    assert took < MAX_SECONDS, f"took {took:.1f} s"
    return outcome


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as place:
        template = attempt_directory(Path(place) / "good", "run", 0, 0)
        good(template)
        descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (a count is all that is wanted)
        for seed in range(options.seed, options.seed + options.examples):
            began = time.monotonic()
            try:
                counts[try_one(template, Path(place) / "work", seed)] += 1
            except BaseException as error:
                traceback.print_exc()
                print(f"example {seed} broke a promise: {type(error).__name__}; again with --seed {seed} --examples 1")
                return 1
            slowest = max(slowest, time.monotonic() - began)
        leaked = len(os.listdir("/proc/self/fd")) - descriptors  # noqa: PTH208
    print(
        f"{options.examples} damaged journals: {counts['read']} read, {counts['refused']} refused, 0 crashes, "
        f"{leaked} descriptors leaked, slowest {slowest:.2f} s"
    )
    return 1 if leaked else 0


if __name__ == "__main__":
    sys.exit(main())
