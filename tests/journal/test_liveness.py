"""Whether a writer lives, asked of real processes: killed, forked, zombies, in other PID namespaces."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradwatch.journal import JournalReader, JournalWriter, Lock, attempt_directory, is_locked
from gradwatch.journal.liveness import _FLOCK

HOLD = """
import os, sys, time
from pathlib import Path
from gradwatch.journal import Lock
lock = Lock(Path(sys.argv[1]))
if "fork" in sys.argv and os.fork() == 0:
    os.write(1, f"child {os.getpid()}\\n".encode())
    time.sleep(60)
    os._exit(0)
os.write(1, f"held {os.getpid()}\\n".encode())
time.sleep(60)
"""

ASK = """
import sys
from pathlib import Path
from gradwatch.journal import is_locked
print(is_locked(Path(sys.argv[1])))
"""

WRITE = """
import sys
from pathlib import Path
from gradwatch.journal import JournalWriter
from gradwatch.journal.manifest import Manifest, Tensor
writer = JournalWriter(Path(sys.argv[1]), Manifest("run", "model", attempt=int(sys.argv[2]),
    host_columns=("a", "b"), device_columns=("c",), tensors=(Tensor("t"),) * 50))
print("ready", flush=True)
step = 0
while True:
    step += 1
    row = writer.steps.append(step, float(step), (step, -step), None if step % 3 else (step,))
    writer.steps.complete(row, (step,))
    writer.tensors.payload[:] = step
    writer.tensors.append(row, step, float(step))
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().split()


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_a_lock_is_held_while_its_process_lives_and_free_when_it_was_killed(tmp_path: Path, start) -> None:
    path = tmp_path / "lock"
    process = start(HOLD, path)
    assert line(process)[0] == "held"
    assert is_locked(path)
    process.kill()
    process.wait(30)
    assert not is_locked(path)


def test_a_lock_is_free_while_its_dead_process_is_a_zombie(tmp_path: Path, start) -> None:
    path = tmp_path / "lock"
    process = start(HOLD, path)
    line(process)
    process.kill()
    state = Path(f"/proc/{process.pid}/stat")
    assert until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z")
    assert not is_locked(path)


def test_a_lock_is_free_while_a_forked_child_of_its_dead_process_lives(tmp_path: Path, start) -> None:
    path = tmp_path / "lock"
    process = start(HOLD, path, "fork")
    told = dict(tuple(line(process)) for _ in range(2))
    child = int(told["child"])
    assert is_locked(path)
    process.kill()
    process.wait(30)
    try:
        os.kill(child, 0)
        assert not is_locked(path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_is_seen_from_another_pid_namespace(tmp_path: Path, start) -> None:
    path = tmp_path / "lock"
    process = start(HOLD, path)
    line(process)
    ask = (
        "import os, sys; from pathlib import Path; from gradwatch.journal import is_locked;"
        "print('pid', os.getpid(), is_locked(Path(sys.argv[1])))"
    )
    asked = start(ask, path, prefix=("unshare", "--pid", "--fork"))
    told = line(asked)
    if not told:
        pytest.skip("no PID namespace here")
    assert told == ["pid", "1", "True"]


def test_asking_takes_nothing(tmp_path: Path, start) -> None:
    path = tmp_path / "lock"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    assert not is_locked(path)
    os.close(fd)
    held = Lock(path)
    held.release()
    process = start(HOLD, path)
    line(process)
    assert [is_locked(path) for _ in range(3)] == [True, True, True]
    with pytest.raises(BlockingIOError):
        Lock(path)
    assert is_locked(path)


def test_asking_in_the_holders_own_process_does_not_drop_the_lock(tmp_path: Path, start) -> None:
    path = tmp_path / "lock"
    lock = Lock(path)
    assert is_locked(path)
    with pytest.raises(BlockingIOError):
        Lock(path)
    assert line(start(ASK, path)) == ["True"]
    lock.release()
    assert not is_locked(path)


def test_reading_in_the_writers_own_process_does_not_drop_the_lock(
    writer: JournalWriter, directory: Path, start
) -> None:
    reader = JournalReader(directory)
    assert reader.alive()
    reader.close()
    assert line(start(ASK, directory / "lock")) == ["True"]


def test_a_reader_knows_a_living_writer_whose_directory_was_deleted(tmp_path: Path, start) -> None:
    directory = attempt_directory(tmp_path, "run", 0, 0)
    process = start(WRITE, directory, 0)
    line(process)
    reader = JournalReader(directory)
    assert until(lambda: len(reader.last_steps(1)) > 0)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    assert reader.alive()
    process.kill()
    process.wait(30)
    assert not reader.alive()
    assert len(reader.poll().steps) > 0
    reader.close()


@pytest.mark.parametrize("what", ["missing", "fifo", "link", "directory"])
def test_what_is_no_lock_counts_as_free(tmp_path: Path, what: str) -> None:
    path = tmp_path / "lock"
    {
        "missing": lambda: None,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path),
        "directory": path.mkdir,
    }[what]()
    assert not is_locked(path)


def test_the_question_has_the_layout_of_the_kernels_struct(tmp_path: Path, start) -> None:
    class Flock(ctypes.Structure):
        _fields_ = (
            ("l_type", ctypes.c_short),
            ("l_whence", ctypes.c_short),
            ("l_start", ctypes.c_longlong),
            ("l_len", ctypes.c_longlong),
            ("l_pid", ctypes.c_int),
        )

    assert _FLOCK.size == ctypes.sizeof(Flock)
    path = tmp_path / "lock"
    process = start(HOLD, path)
    pid = int(line(process)[1])
    with path.open("rb") as file:
        answer = fcntl.fcntl(file, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 1, 0))
    assert _FLOCK.unpack(answer) == (fcntl.F_WRLCK, 0, 0, 1, pid)
    assert Flock.from_buffer_copy(answer).l_pid == pid


# -- forks


def in_a_child(work: Callable[[], None]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_leaves_the_journal_alone(
    writer: JournalWriter, directory: Path, append: Callable[..., None], start
) -> None:
    append(writer, 3)
    before = {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "lock"}

    def everything() -> None:
        append(writer, 5)
        writer.steps.complete(1, (9.0, 9.0))
        writer.samples.append(1, 1, 1.0)
        writer.events.write({"kind": "x"})
        writer.close()

    in_a_child(everything)
    assert {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "lock"} == before
    append(writer, 1)
    assert line(start(ASK, directory / "lock")) == ["True"]
    writer.close()
    reader = JournalReader(directory)
    assert reader.poll().steps.sequence.tolist() == [1, 2, 3, 4]
    reader.close()


def test_a_forked_child_sees_that_its_parent_lives(writer: JournalWriter, directory: Path) -> None:
    def ask() -> None:
        assert is_locked(directory / "lock")
        reader = JournalReader(directory)
        assert reader.alive()
        reader.close()

    in_a_child(ask)


# -- death at any instant


def test_a_writer_killed_at_any_instant_leaves_every_row_that_it_had_written(tmp_path: Path, start) -> None:
    chance = random.Random(4)
    for attempt in range(30):
        directory = attempt_directory(tmp_path, "run", 0, attempt)
        process = start(WRITE, directory, attempt)
        assert line(process) == ["ready"]
        reader = JournalReader(directory)
        assert until(lambda reader=reader: len(reader.last_steps(2)) > 1)
        live = reader.poll() if attempt % 2 else None
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.wait(30)
        assert not reader.alive()
        polls = [live] if live else []
        while True:
            polls.append(reader.poll())
            if not polls[-1].more:
                break
        sequence = [int(s) for p in polls for s in p.steps.sequence]
        assert sequence == list(range(sequence[0], sequence[-1] + 1))
        assert sequence[0] == 1 + sum(p.missed for p in polls)
        for poll in polls:
            for rows in (poll.steps, poll.amended):
                step = rows.step.astype(float)
                assert (rows["a"] == step).all()
                assert (rows["b"] == -step).all()
                # Only the row at which it died may lack what comes second.
                assert ((rows["c"] == step) | (rows.sequence >= sequence[-1])).all() or poll is live
            assert (poll.tensors.values == poll.tensors.row[:, None]).all()
        # Behind the row at which it died stands its row of norms, or that one is the one lost.
        norms = [int(r) for p in polls for r in p.tensors.row]
        assert norms == list(range(norms[0], norms[-1] + 1))
        assert norms[-1] in (sequence[-1], sequence[-1] - 1)
        last = reader.last_steps(10)
        assert last.sequence.tolist() == sequence[-10:]
        reader.close()
