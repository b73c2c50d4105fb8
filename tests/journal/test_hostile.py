"""Journals written by nobody's gradwatch: refused in words or read within bounds, never a crash, hang or way out."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.journal import JournalError, JournalReader, JournalWriter, attempt_directory, find_attempts
from gradwatch.journal.manifest import MAX_BYTES, clean_text, parse, plain

Read = Callable[..., JournalReader]


def document(**changes: object) -> bytes:
    return json.dumps({"format": 1, "run": "run", "model": "model"} | changes).encode()


# -- the manifest


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "journal format None"),
        (b'{"format": 2}', "this gradwatch reads format 1"),
        (b'{"format": "' + b"9" * 5000 + b'"}', "use an agent of the trainer's version"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (MAX_BYTES + 1), "larger than"),
        (b'{"format":1,"a":[' + b"0," * 2_000_000 + b"0]}", "more entries"),
        (b'{"format":1,"a":[' + b"[]," * 600_000 + b"0]}", "more entries"),
        (document(tensors=[{}] * 65_537), "more than 65536 tensors"),
        (document(steps={"host": ["a"] * 3000, "device": ["b"] * 3000}), "more than 4096 columns"),
    ],
    ids=range(13),
)
def test_what_is_no_manifest_is_refused_in_words(data: bytes, said: str) -> None:
    with pytest.raises(JournalError, match=said):
        parse(data, "manifest.json")


def test_a_manifest_with_a_million_labels_keeps_a_bounded_number() -> None:
    found = parse(document(hyperparameters={f"k{i}": i for i in range(400_000)}), "here")
    assert len(found.hyperparameters) == 2_000
    with pytest.raises(JournalError):
        parse(document(hyperparameters={f"k{i}": i for i in range(1_600_000)})[: MAX_BYTES + 1], "here")


def test_texts_of_a_manifest_are_on_one_line_bounded_and_printable() -> None:
    nasty = "a\nb\x00\x1b\u202e\ud800" + "x" * 5000
    found = parse(
        document(
            model=nasty,
            run_name=nasty,
            tensors=[{"name": nasty, "layer": nasty, "placement": {nasty: [nasty]}}],
            optimizers=[{"name": nasty, "class": nasty, "groups": [{nasty: nasty}]}],
            steps={"host": [nasty], "device": []},
            config={nasty: {nasty: nasty}},
            budgets={nasty: nasty},
            hyperparameters={nasty: nasty},
            mlflow={nasty: nasty},
            unchecked=[{nasty: nasty}],
        ),
        "here",
    )

    def texts(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, dict):
            return [t for k, v in value.items() for t in [k, *texts(v)]]
        if isinstance(value, tuple | list):
            return [t for v in value for t in texts(v)]
        if hasattr(value, "__dataclass_fields__"):
            return [t for name in value.__dataclass_fields__ for t in texts(getattr(value, name))]
        return []

    everything = texts(found)
    assert sum(t.startswith("a b\ufffd\ufffd\ufffd\ufffdxxx") for t in everything) >= 20
    assert all(t.isprintable() and len(t) <= 1000 for t in everything)


@pytest.mark.parametrize("value", [None, "1", 1.5, True, -1, 2**70, [], {}, float("nan"), float("inf")])
def test_a_number_of_the_wrong_kind_counts_as_absent(value: object) -> None:
    found = parse(document(rank=value, attempt=value, world_size=value, pid=value, start_time=value), "here")
    assert (found.rank, found.attempt, found.world_size, found.pid) == (0, 0, 1, 0)
    assert found.start_time in (0.0, 1.5, -1.0, float(2**70))


def test_a_tensor_points_at_an_optimizer_and_a_group_that_exist() -> None:
    found = parse(
        document(
            optimizers=[{"name": "a", "groups": [{}, {}]}],
            tensors=[{"optimizer": 5, "group": 9}, {"optimizer": 0, "group": 1}],
        ),
        "here",
    )
    assert [(t.optimizer, t.group) for t in found.tensors] == [(0, 0), (0, 1)]


def test_the_last_of_a_key_that_is_there_twice_counts() -> None:
    assert parse(b'{"format":1,"run":"a","run":"b"}', "here").run == "b"


def test_a_plain_value_is_bounded_in_depth_and_number() -> None:
    deep: Any = "end"
    for _ in range(500):
        deep = [deep]
    assert "(too deep)" in str(plain(deep))
    assert len(plain(list(range(200_000)))) < 100_001
    assert plain({"a": [10**400, -(10**400), 2**64, 5]}) == {"a": [float("inf"), float("-inf"), 2.0**64, 5]}


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_is_made_safe(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned.isprintable()
    cleaned.encode()
    assert text.isprintable() is False or cleaned == text[:1000]


# -- files


def forge(path: Path, **fields: int) -> None:
    names = ("slot_size", "host", "device", "width", "capacity")
    values = list(struct.unpack_from("<8sIIIIQ", path.read_bytes()))
    for name, value in fields.items():
        values[1 + names.index(name)] = value
    head = struct.pack("<8sIIIIQ", *values)
    with path.open("r+b") as file:
        file.write(head + struct.pack("<I", zlib.crc32(head)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"capacity": 2**40}, "larger than 1 GiB"),
        ({"capacity": 2**64 - 1}, "larger than 1 GiB"),
        ({"capacity": 0}, "impossible geometry"),
        ({"capacity": 2**17}, "truncated"),
        ({"width": 3}, "impossible geometry"),
        ({"device": 2**31}, "impossible geometry"),
        ({"slot_size": 0}, "slot size 0 does not fit"),
        ({"host": 3}, "does not fit"),
        ({"device": 3, "slot_size": 96, "capacity": 100}, "columns are not the manifest's"),
    ],
)
def test_a_header_with_impossible_numbers_is_refused(
    writer: JournalWriter, directory: Path, read: Read, fields: dict[str, int], said: str
) -> None:
    forge(directory / "steps.ring", **fields)
    with pytest.raises(JournalError, match=said):
        read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: os.truncate(p, 20), "truncated before its header"),
        (lambda p: os.truncate(p, 5000), "truncated"),
        (lambda p: p.write_bytes(bytes(5000)), "not a ring file"),
        (lambda p: p.write_bytes(b"GWRING\x00\x02" + p.read_bytes()[8:]), "reads version 1"),
        (lambda p: p.write_bytes(p.read_bytes()[:9] + b"x" + p.read_bytes()[10:]), "checksum does not fit"),
        (lambda p: p.unlink(), "No such file"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "not a regular file"),
        (lambda p: (p.unlink(), p.symlink_to(p.with_name("steps.ring"))), "not a regular file"),
        (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
        (lambda p: (p.unlink(), os.mknod(p, 0o20666, os.makedev(1, 5))), "not a regular file"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_ring_is_refused(
    writer: JournalWriter, directory: Path, read: Read, change: Callable[[Path], object], said: str
) -> None:
    try:
        change(directory / "tensors.ring")
    except PermissionError:
        pytest.skip("not allowed to make device files")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(JournalError, match=said):
        read()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_ring_that_shrinks_while_it_is_read_shows_what_is_left(
    tmp_path: Path, make_manifest: Callable[..., Any], append: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # By pwrite: a mapped file that somebody else cuts off is the one thing that no writer survives.
    monkeypatch.setattr("gradwatch.journal.mapping.file_system_type", lambda fd: 0)
    writer = JournalWriter(attempt_directory(tmp_path, "run", 0, 0), make_manifest())
    append(writer, 100)
    reader = JournalReader(writer.directory)
    os.truncate(writer.directory / "steps.ring", writer.steps.geometry.offset(51))
    assert reader.poll().steps.sequence.tolist() == list(range(1, 50))  # the newest is kept back
    os.truncate(writer.directory / "steps.ring", 0)
    assert reader.poll().steps.sequence.tolist() == []
    assert len(reader.last_steps(10)) == 0
    reader.close()
    writer.close()


def test_a_row_from_the_far_future_does_not_stop_the_reader(
    writer: JournalWriter, directory: Path, read: Read, append: Callable[..., None]
) -> None:
    append(writer, 5)
    geometry = writer.steps.geometry
    for sequence in (2**63 // geometry.capacity * geometry.capacity + 6, 10**6 * geometry.capacity + 7):
        first = struct.pack("<QQqd2d", sequence, sequence, 2**62, float("nan"), 0.0, 0.0)
        with (directory / "steps.ring").open("r+b") as file:
            file.seek(geometry.offset(sequence))
            file.write(first + struct.pack("<I", zlib.crc32(first)))
    writer.close()
    reader = read()
    got = [reader.poll() for _ in range(3)]
    assert [int(s) for p in got for s in p.steps.sequence][:5] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("place", ["run", "run/rank-0", "run/rank-0/attempt-0"])
def test_a_symbolic_link_on_the_way_is_not_followed(tmp_path: Path, writer: JournalWriter, place: str) -> None:
    root = tmp_path / "other"
    (root / place).parent.mkdir(parents=True)
    (root / place).symlink_to(tmp_path / place)
    assert list(find_attempts(root)) == []
    with pytest.raises(JournalError, match="symbolic links are not followed"):
        JournalReader(attempt_directory(root, "run", 0, 0))


def test_only_names_of_the_journal_are_found(tmp_path: Path) -> None:
    names = [
        "ok/rank-0/attempt-0",
        "ok/rank-12/attempt-3",
        ".agent/rank-0/attempt-0",
        "a b/rank-0/attempt-0",
        "a\nb/rank-0/attempt-0",
        "ok/rank-00/attempt-0",
        "ok/rank-0/attempt--1",
        "ok/rank-٣/attempt-0",
    ]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / os.fsdecode(b"\xff\xfe") / "rank-0" / "attempt-0").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    found = {(p.run, p.rank, p.attempt): p.path for p in find_attempts(tmp_path)}
    assert found == {
        ("ok", 0, 0): tmp_path / "ok/rank-0/attempt-0",
        ("ok", 12, 3): tmp_path / "ok/rank-12/attempt-3",
    }


def test_thousands_of_attempts_are_found_up_to_the_limit(tmp_path: Path) -> None:
    for number in range(1500):
        (tmp_path / f"run-{number}" / "rank-0" / "attempt-0").mkdir(parents=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert len(list(find_attempts(tmp_path))) == 1500
    assert len(list(find_attempts(tmp_path, limit=1000))) == 1000
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert list(find_attempts(tmp_path / "nowhere")) == []


def test_a_journal_cannot_speak_for_another_run(tmp_path: Path, writer: JournalWriter, directory: Path) -> None:
    writer.close()
    (tmp_path / "mine" / "rank-0").mkdir(parents=True)
    directory.rename(tmp_path / "mine" / "rank-0" / "attempt-0")
    with pytest.raises(JournalError, match="speaks for run 'run'"):
        JournalReader(tmp_path / "mine" / "rank-0" / "attempt-0")


# -- memory


MEASURE = """
import resource, sys
from pathlib import Path
from gradwatch.journal import JournalError, JournalReader
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    reader = JournalReader(Path(sys.argv[1]))
    for _ in range(20):
        reader.poll()
    reader.last_steps(1000)
except JournalError:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


def grown(directory: Path) -> int:
    """Megabytes by which a process grows that reads a journal to the end."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, directory], capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize("filler", [b'"ab",', b"[],", b"0.1,", b'{"a":1},'])
def test_a_manifest_full_of_nothing_takes_bounded_memory(writer: JournalWriter, directory: Path, filler: bytes) -> None:
    body = filler * min(1_450_000, (MAX_BYTES - 1000) // len(filler))
    (directory / "manifest.json").write_bytes(b'{"format":1,"config":[' + body + b"0]}")
    assert grown(directory) <= 200


def test_events_without_end_take_bounded_memory(writer: JournalWriter, directory: Path) -> None:
    line = b'{"sequence":0,"kind":"x","a":[' + b"[]," * 300_000 + b"0]}\n"
    (directory / "events.jsonl").write_bytes(line * 60)
    assert grown(directory) <= 100


def test_a_sparse_gigabyte_takes_bounded_memory(
    writer: JournalWriter, directory: Path, append: Callable[..., None]
) -> None:
    append(writer, 100)
    slot = writer.steps.geometry.slot_size
    writer.close()
    capacity = (2**30 - 4096) // slot
    forge(directory / "steps.ring", capacity=capacity)
    os.truncate(directory / "steps.ring", 4096 + capacity * slot)
    assert grown(directory) <= 30


def test_damaged_journals_are_read_or_refused() -> None:
    path = Path(__file__).parents[1] / "faults" / "fuzz_journal.py"
    spec = importlib.util.spec_from_file_location("fuzz_journal", path)
    assert spec is not None
    assert spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    assert fuzz.main(["--examples", "150", "--seed", "20000"]) == 0
