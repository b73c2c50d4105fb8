"""``gradwatch run -- COMMAND``: runs a training as its parent, and knows exactly how it ended."""

from __future__ import annotations

import os
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from gradwatch.cli import CommandError

#: What shells say of a command that cannot be found, and of one that cannot be run.
_NOT_FOUND: Final = 127
_NOT_RUNNABLE: Final = 126


def command(
    arguments: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="The training and its arguments.", show_default=False)
    ],
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the journals go; by default where they go without this.", show_default=False),
    ] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that the agent has, after the end, to deliver what is left.", min=0)
    ] = 10.0,
) -> None:
    """Run a training as its parent: forward signals, learn its true end, and end just as it did.

    The end (exit status, signal, out of memory, core dump) is told to the agent, which this command starts
    unless GRADWATCH_DIR says that a sidecar reads. Works as a container's entry point and below torchrun.

    Examples:

        gradwatch run -- python train.py --epochs 3
        torchrun --nproc-per-node 2 --no-python gradwatch run -- python train.py
    """
    supervise(arguments, directory, drain)


def supervise(arguments: list[str], directory: Path | None, drain: float) -> NoReturn:
    """Run ``arguments`` to their end and end like them."""
    from gradwatch.journal.exits import Exit, write_exit
    from gradwatch.parent.drain import wait_drained
    from gradwatch.parent.memory import oom_kills
    from gradwatch.parent.supervise import Child, end_like
    from gradwatch.probe.launch import default_root, ensure_agent

    root = directory.absolute() if directory is not None else default_root(os.environ)
    name = uuid.uuid4().hex
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot write journals in {root}: {error.strerror or error}; name another --dir") from None
    killed_before = oom_kills()
    try:
        child = Child(arguments, {**os.environ, "GRADWATCH_DIR": str(root), "GRADWATCH_PARENT": name})
    except OSError as error:
        print(f"gradwatch run: {arguments[0]}: {error.strerror or error}", file=sys.stderr)
        sys.exit(_NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_RUNNABLE)
    agent = ensure_agent(root, {**os.environ, "GRADWATCH_DIR": os.environ.get("GRADWATCH_DIR", "")})
    status = child.wait()
    now, killed_after = time.time(), oom_kills()
    signalled = os.WIFSIGNALED(status)
    end = Exit(
        pid=child.pid,
        time=now,
        exit_code=None if signalled else os.waitstatus_to_exitcode(status),
        signal=os.WTERMSIG(status) if signalled else None,
        core_dumped=signalled and os.WCOREDUMP(status),
        oom_kills=None if killed_before is None or killed_after is None else max(0, killed_after - killed_before),
    )
    try:
        write_exit(root, name, end)
    except OSError as error:
        print(f"gradwatch run: the end could not be told: {error.strerror or error}", file=sys.stderr)
    if agent is not None:
        wait_drained(agent, name, now, drain)
    end_like(status)
