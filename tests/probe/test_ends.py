"""Each end of a real process is told as it was, and happens as it would have without us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradwatch.probe import ends
from gradwatch.probe.ends import End, end_of, watch_process_end

PRELUDE = """
import json, os, signal, sys, threading, time
from gradwatch.probe import ends
TOLD = {told!r}
def tell(name):
    def callback(end):
        with open(TOLD, "a") as file:
            file.write(json.dumps([name, end.to_event()]) + "\\n")
    return callback
{watch}
"""
WATCH = "watch = ends.watch_process_end(tell('a'))"


def run(
    tmp_path: Path, code: str, watch: str = WATCH, module: bool = False
) -> tuple[list[Any], subprocess.CompletedProcess[str]]:
    """Run ``code`` in a process that is watched; what was told, and how the process ended."""
    told, script = tmp_path / "told.jsonl", tmp_path / "script_under_test.py"
    told.unlink(missing_ok=True)
    script.write_text(PRELUDE.format(told=str(told), watch=watch) + code)
    how = ["-m", "script_under_test"] if module else [str(script)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])}
    done = subprocess.run([sys.executable, *how], env=env, capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    return lines, done


def only(lines: list[Any]) -> dict[str, Any]:
    assert [name for name, _ in lines] == ["a"]
    end: dict[str, Any] = lines[0][1]
    return end


CAUGHT = "try:\n    sys.exit(3)\nexcept SystemExit:\n    "
CASES = {
    "end of the script": ("pass", "finished", None, "", 0),
    "exception": ("raise ValueError('loss is nan')", "failed", 1, "ValueError", 1),
    "sys.exit(0)": ("sys.exit(0)", "finished", 0, "", 0),
    "sys.exit()": ("sys.exit()", "finished", 0, "", 0),
    "sys.exit(3)": ("sys.exit(3)", "failed", 3, "SystemExit", 3),
    "sys.exit(-1)": ("sys.exit(-1)", "failed", 255, "SystemExit", 255),
    "sys.exit(256)": ("sys.exit(256)", "finished", 0, "", 0),
    "sys.exit(text)": ("sys.exit('no data')", "failed", 1, "SystemExit", 1),
    "exit(4)": ("exit(4)", "failed", 4, "SystemExit", 4),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", "killed", None, "KeyboardInterrupt", -2),
    "logged, then exit": ("try:\n    1 / 0\nexcept Exception:\n    sys.exit(5)", "failed", 5, "ZeroDivisionError", 5),
    "argparse": ("import argparse; argparse.ArgumentParser().parse_args(['-x'])", "failed", 2, "SystemExit", 2),
    "caught exit": (CAUGHT + "pass", "finished", None, "", 0),
    "caught in a function": ("def f():\n " + CAUGHT.replace("\n", "\n ") + "pass\nf()", "finished", None, "", 0),
    "caught, then exception": (CAUGHT + "raise KeyError('x') from None", "failed", 1, "KeyError", 1),
    "exit in a thread": ("threading.Thread(target=sys.exit, args=(3,)).start()", "finished", None, "", 0),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", "killed", None, "", -15),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("module", [False, True], ids=["script", "module"])
def test_an_end_is_told_and_not_changed(case: str, module: bool, tmp_path: Path) -> None:
    code, state, exit_code, kind, returncode = CASES[case]
    lines, done = run(tmp_path, code, module=module)
    bare, bare_done = run(tmp_path, code, watch="", module=module)
    end = only(lines)
    assert (end["state"], end["exit_code"], end["type"]) == (state, exit_code, kind)
    assert end["signal"] == (-returncode if returncode < 0 else None)
    assert bare == []
    assert done.returncode == bare_done.returncode == returncode
    assert done.stderr.replace("line 14", "line 13") == bare_done.stderr.replace("line 14", "line 13")


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_what_no_code_survives_is_left_to_the_agent(end: str, tmp_path: Path) -> None:
    assert run(tmp_path, end)[0] == []


def test_all_runs_are_told_and_a_closed_one_is_not(tmp_path: Path) -> None:
    watch = "a, b, c = (ends.watch_process_end(tell(n)) for n in 'abc'); b.close(); b.close()"
    lines, _ = run(tmp_path, "raise ValueError", watch=watch)
    assert [name for name, _ in lines] == ["a", "c"]


def test_a_broken_callback_changes_nothing(tmp_path: Path) -> None:
    watch = "b = ends.watch_process_end(lambda end: 1 / 0); " + WATCH
    lines, done = run(tmp_path, "sys.exit(3)", watch=watch)
    assert only(lines)["exit_code"] == 3
    assert done.returncode == 3
    assert done.stderr == ""


def test_former_hooks_are_called_and_put_back(tmp_path: Path) -> None:
    code = """
sys.excepthook = lambda *what: print("former hook")
hook, leave, quitter = sys.excepthook, sys.exit, type(exit).__call__
watch = ends.watch_process_end(tell("a"))
assert sys.excepthook is not hook and sys.exit is not leave
watch.close()
assert sys.excepthook is hook and sys.exit is leave and type(exit).__call__ is quitter
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
watch = ends.watch_process_end(tell("a"))
raise ValueError
"""
    lines, done = run(tmp_path, code, watch="")
    assert only(lines)["state"] == "failed"
    assert done.stdout == "former hook\n"


def test_a_hook_that_came_later_stays_and_makes_no_circle(tmp_path: Path) -> None:
    code = """
ours = sys.excepthook
def later(*what):
    print("later")
    ours(*what)
sys.excepthook = later
watch.close()
assert sys.excepthook is later
watch = ends.watch_process_end(tell("a"))
raise ValueError("x")
"""
    lines, done = run(tmp_path, code)
    assert only(lines)["message"] == "x"
    assert done.stdout == "later\n"
    assert done.returncode == 1


def test_printing_an_exception_with_the_hook_is_no_end(tmp_path: Path) -> None:
    code = "try:\n    1 / 0\nexcept Exception:\n    sys.excepthook(*sys.exc_info())\n"
    lines, done = run(tmp_path, code)
    assert only(lines)["state"] == "finished"
    assert "ZeroDivisionError" in done.stderr


def test_a_forked_child_tells_nothing(tmp_path: Path) -> None:
    for child in ("sys.exit(7)", "raise ValueError", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"):
        code = f"if os.fork() == 0:\n    {child}\nos.wait()\nsys.exit(3)\n"
        lines, _ = run(tmp_path, code)
        assert only(lines)["exit_code"] == 3


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize(
    ("body", "state", "kind"),
    [("1 / 0", "failed", "ZeroDivisionError"), ("sys.exit(3)", "failed", "SystemExit"), ("pass", "finished", "")],
)
def test_a_run_inside_a_multiprocessing_child(method: str, body: str, state: str, kind: str, tmp_path: Path) -> None:
    code = f"""
import multiprocessing
def work():
    watch = ends.watch_process_end(tell("a"))
    {body}
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=work)
    process.start()
    process.join()
"""
    lines, _ = run(tmp_path, code, watch="")
    end = only(lines)
    assert (end["state"], end["type"]) == (state, kind)


def test_a_handler_of_the_user_is_never_touched(tmp_path: Path) -> None:
    code = "os.kill(os.getpid(), signal.SIGTERM); print('saved'); sys.exit(9)"
    for watch in (
        WATCH,
        "watch = ends.watch_process_end(tell('a'), evidence=__import__('pathlib').Path(TOLD + '.sigterm'))",
    ):
        before = "signal.signal(signal.SIGTERM, lambda *_: print('checkpoint'))\n"
        lines, done = run(tmp_path, code, watch=before + watch)
        assert (only(lines)["exit_code"], done.stdout, done.returncode) == (9, "checkpoint\nsaved\n", 9)
        after = watch + "\nsignal.signal(signal.SIGTERM, lambda *_: print('checkpoint'))\n"
        lines, done = run(tmp_path, "watch.close()\n" + code, watch=after)
        assert (lines, done.stdout, done.returncode) == ([], "checkpoint\nsaved\n", 9)


EVIDENCE = """
from pathlib import Path
folder = Path(TOLD).parent
watches = [ends.watch_process_end(tell(n), evidence=folder / n) for n in "ab"]
"""


def test_evidence_of_sigterm_is_left_while_the_main_thread_is_inside_c_code(tmp_path: Path) -> None:
    # A mutex taken twice: no signal wakes it, as none wakes a rank that waits in a collective. A handler in
    # Python would never run, and the process would live on until SIGKILL.
    code = """
import ctypes
def wait_for_ever():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("waiting", flush=True)
    libc.pthread_mutex_lock(mutex)
wait_for_ever()
"""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE.format(told=str(tmp_path / "told"), watch=EVIDENCE) + code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        until = time.monotonic() + 30
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < until
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -15
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "told").exists()
    for name in "ab":
        assert "wait_for_ever" in (tmp_path / name).read_text()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_evidence_is_taken_back_where_there_was_no_sigterm(tmp_path: Path) -> None:
    code = """
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert (folder / "a").exists() and (folder / "b").exists()
if os.fork() == 0:
    os.kill(os.getpid(), signal.SIGTERM)
os.wait()
assert (folder / "a").stat().st_size == 0
watches[0].close()
assert not (folder / "a").exists()
os.kill(os.getpid(), signal.SIGTERM)
"""
    _, done = run(tmp_path, code, watch=EVIDENCE)
    assert done.returncode == -15, done.stderr
    assert (tmp_path / "b").read_text()
    _, done = run(tmp_path, "(folder / 'b').unlink(missing_ok=True)\nfor w in watches: w.close()\n", watch=EVIDENCE)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "a").exists()


def test_an_evidence_file_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    watch = "from pathlib import Path\nwatch = ends.watch_process_end(tell('a'), evidence=Path('/nowhere/at/all'))"
    lines, done = run(tmp_path, "sys.exit(3)", watch=watch)
    assert only(lines)["exit_code"] == 3
    assert done.stderr == ""


def test_an_exception_becomes_an_end() -> None:
    assert end_of(None) == End("finished", exit_code=0)
    assert end_of(RuntimeError("a\nb")) == End("failed", "RuntimeError: a", "RuntimeError", "a\nb", 1)
    assert end_of(KeyboardInterrupt()).state == "killed"
    assert end_of(SystemExit("out of data")).reason == "exit status 1: out of data"
    assert end_of(SystemExit(True)).exit_code == 1


def test_a_message_is_redacted_and_bounded_and_never_reads_a_tensor() -> None:
    torch = pytest.importorskip("torch")
    end = end_of(OSError("no route to https://bob:hunter2@db/ " + "x" * 10_000))
    assert "hunter2" not in json.dumps(end.to_event())
    assert len(end.message) == ends.MESSAGE_LIMIT
    assert end_of(ValueError(torch.zeros(3))).message == ""

    class HostileError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert end_of(HostileError()).reason.endswith("HostileError")


def test_watching_is_restored_in_this_process_too() -> None:
    hook, leave = sys.excepthook, sys.exit
    told: list[End] = []
    watch = watch_process_end(told.append)
    watch.close()
    assert (sys.excepthook, sys.exit) == (hook, leave)
    assert told == []
