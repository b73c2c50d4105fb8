"""``gradwatch run`` as a process: signals through, the true end out, as PID 1 and in pipes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.journal.exits import Exit, read_exit, write_exit
from gradwatch.parent.memory import oom_kills
from tests.agent.processes import environment

ROOT = Path(__file__).parents[2]


def start(root: Path, *command: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    line = [*before, sys.executable, "-m", "gradwatch", "run", "--dir", str(root), "--", *command]
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment(), "GRADWATCH_AGENT": "0"},
    )


def the_exit(root: Path) -> Exit:
    [file] = (root / ".parent").glob("*.json")
    found = read_exit(root, file.stem)
    assert found is not None
    return found


@pytest.mark.parametrize("code", [0, 3, 137])
def test_the_exit_code_is_the_commands(tmp_path: Path, code: int) -> None:
    process = start(tmp_path, "sh", "-c", f"exit {code}")
    process.communicate(timeout=60)
    assert process.returncode == code
    assert (the_exit(tmp_path).exit_code, the_exit(tmp_path).signal) == (code, None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGHUP])
def test_a_commands_signal_is_our_own_end(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "sh", "-c", f"kill -{int(number)} $$")
    process.communicate(timeout=60)
    assert process.returncode == -number
    assert (the_exit(tmp_path).exit_code, the_exit(tmp_path).signal) == (None, number)


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2"])
def test_signals_reach_the_command(tmp_path: Path, name: str) -> None:
    program = (
        f"import signal, sys\nsignal.signal(signal.SIG{name}, lambda *_: sys.exit(40))\n"
        "print('ready', flush=True)\nwhile True: signal.pause()"
    )
    process = start(tmp_path, sys.executable, "-c", program)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=60)
    assert process.returncode == 40


def test_standard_streams_are_the_commands(tmp_path: Path) -> None:
    process = start(tmp_path, "sh", "-c", "echo out; echo err >&2")
    assert process.communicate(timeout=60) == ("out\n", "err\n")


def test_a_command_that_is_not_there_is_127(tmp_path: Path) -> None:
    process = start(tmp_path, "no-such-training")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 127
    assert "no-such-training" in said


def test_the_commands_dispositions_are_not_pythons(tmp_path: Path) -> None:
    process = start(tmp_path, "sh", "-c", "grep -E '^Sig(Blk|Ign)' /proc/self/status")
    out, _ = process.communicate(timeout=60)
    assert int(out.split()[1], 16) == 0
    assert not int(out.split()[3], 16) & (1 << (signal.SIGPIPE - 1))


def _namespaces() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not _namespaces(), reason="this sandbox allows no PID namespace")
def test_as_pid_1_orphans_are_reaped_and_the_exit_code_tells_the_signal(tmp_path: Path) -> None:
    program = (
        "import os, subprocess, time\n"
        "subprocess.run(['sh', '-c', 'sleep 0.1 &'])\n"
        "until = time.monotonic() + 20\n"
        "def children(): return open('/proc/1/task/1/children').read().split()\n"
        "time.sleep(0.3)\n"
        "while len(children()) > 1 and time.monotonic() < until: time.sleep(0.05)\n"
        "print(os.getppid(), len(children()), flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    process = start(tmp_path, sys.executable, "-c", program, before=("unshare", "--pid", "--fork", "--mount-proc"))
    out, said = process.communicate(timeout=60)
    assert out == "1 1\n", said
    assert process.returncode == 137
    assert the_exit(tmp_path).signal == 9


def test_the_parent_imports_no_torch() -> None:
    code = (
        "import sys, gradwatch.cli.run, gradwatch.parent.drain, gradwatch.parent.memory; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("line", "file"), [("0::/pod", "pod/memory.events"), ("4:cpu,memory:/pod", "memory/pod/memory.oom_control")]
)
def test_oom_kills_are_read_from_either_version_of_cgroups(tmp_path: Path, line: str, file: str) -> None:
    (tmp_path / "own").write_text(line + "\n")
    assert oom_kills(tmp_path / "own", tmp_path) is None
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("low 0\noom 2\noom_kill 5\n")
    assert oom_kills(tmp_path / "own", tmp_path) == 5


NAME = "0" * 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"pid": 1}',
        '{"pid": -1, "time": 1.0, "exit_code": 0}',
        '{"pid": 1, "time": NaN, "exit_code": 0}',
        '{"pid": 1, "time": 1.0, "exit_code": 0, "signal": 9}',
        '{"pid": true, "time": 1.0, "exit_code": 0}',
        "[" * 4_000,
    ],
)
def test_an_end_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    write_exit(tmp_path, NAME, Exit(1, 1.0, exit_code=0))
    assert read_exit(tmp_path, NAME) == Exit(1, 1.0, exit_code=0)
    (tmp_path / ".parent" / f"{NAME}.json").write_text(text)
    assert read_exit(tmp_path, NAME) is None


def test_an_end_is_not_read_through_a_link_nor_from_elsewhere(tmp_path: Path) -> None:
    write_exit(tmp_path / "elsewhere", NAME, Exit(1, 1.0, exit_code=0))
    write_exit(tmp_path / "root", "1" * 32, Exit(1, 1.0, exit_code=0))
    (tmp_path / "root/.parent" / f"{NAME}.json").symlink_to(tmp_path / "elsewhere/.parent" / f"{NAME}.json")
    assert read_exit(tmp_path / "root", NAME) is None
    assert read_exit(tmp_path / "root", f"../../elsewhere/.parent/{NAME}") is None
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/.parent").symlink_to(tmp_path / "elsewhere/.parent")
    assert read_exit(tmp_path / "linked", NAME) is None
