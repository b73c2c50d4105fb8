"""The demo's two processes: the training, and the agent that watches its journal."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

#: How many ports above the wanted one are tried.
PORTS_TRIED: Final = 50
#: Seconds that a process gets to leave by itself once asked.
PATIENCE: Final = 20.0


def free_port(wanted: int) -> int | None:
    """``wanted``, or the next port above it on which nobody listens; None where all are taken."""
    for port in range(wanted, min(wanted + PORTS_TRIED, 65_536)):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    return None


class Process:
    """A Python module run as a process of its own, its output in a file."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.log = log
        with log.open("wb") as output:
            self.handle = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=directory,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self.handle.poll() is None

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where it is still running after ``seconds``."""
        try:
            return self.handle.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ask it to leave; end it where it does not."""
        if self.running:
            self.handle.terminate()
            if self.wait(PATIENCE) is None:
                self.handle.kill()
                self.handle.wait()

    def last_words(self, lines: int = 15) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
