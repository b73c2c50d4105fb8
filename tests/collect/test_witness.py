"""The kernel's word on real processes that are not our children, or not reaped yet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradwatch.collect.witness import Witness
from tests.services import eventually


def kernel_tells() -> bool:
    """Whether this kernel tells the status of a process that others have reaped."""
    child = subprocess.Popen(["sleep", "60"])
    witness = Witness.of(lambda: child.pid)
    child.kill()
    child.wait()
    told = witness is not None and witness.status() == signal.SIGKILL
    if witness is not None:
        witness.close()
    return told


needs_the_kernel = pytest.mark.skipif(not kernel_tells(), reason="this kernel keeps the status to the parent (< 6.15)")


def grandchild(code: str) -> tuple[subprocess.Popen[str], int]:
    """A process whose parent is another one, which waits for it; it goes on when that one's stdin closes."""
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {code!r}]); "
        "print(p.pid, flush=True); p.wait(); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


@needs_the_kernel
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("raise SystemExit(3)", 3 << 8),
        ("import os; os._exit(0)", 0),
        ("import os; os.kill(os.getpid(), 9)", 9),
        ("import ctypes; ctypes.string_at(0)", 11),
    ],
)
def test_the_status_of_a_process_that_others_have_reaped(code: str, status: int) -> None:
    parent, pid = grandchild("import sys; sys.stdin.readline(); " + code)
    witness = Witness.of(lambda: pid)
    assert witness is not None
    try:
        assert witness.status() is None, "it lives"
        assert parent.stdin is not None
        parent.stdin.write("\n")
        parent.stdin.flush()
        told = eventually(lambda: None if (s := witness.status()) is None else (s,), "the kernel's word")
        assert told[0] & ~0x80 == status  # without the bit of a core dump
    finally:
        witness.close()
        parent.kill()
        parent.wait()
    assert witness.status() is None
    witness.close()


def test_a_process_that_nobody_has_reaped_tells_it_in_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input(); raise SystemExit(4)"], stdin=subprocess.PIPE)
    witness = Witness.of(lambda: child.pid)
    if witness is None:
        pytest.skip("this kernel gives no information by a pidfd (< 6.13)")
    monkeypatch.setattr("gradwatch.collect.witness._EXIT", 0)  # as a kernel before 6.15 answers
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert witness.status() == 4 << 8
    child.wait()
    assert witness.status() is None
    witness.close()


def test_nobody_testifies_for_who_does_not_hold_the_lock_any_more() -> None:
    answers: list[int | None] = [os.getpid(), None]
    before = len(list(Path("/proc/self/fd").iterdir()))
    holder: Callable[[], int | None] = lambda: answers.pop(0)  # noqa: E731
    assert Witness.of(holder) is None
    assert Witness.of(lambda: None) is None
    assert Witness.of(lambda: 0) is None
    assert Witness.of(lambda: 2**22 + 1) is None
    assert len(list(Path("/proc/self/fd").iterdir())) == before
